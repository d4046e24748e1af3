"""What sums and rows of a split say: confusion, ranks, intervals, and how it is told."""
