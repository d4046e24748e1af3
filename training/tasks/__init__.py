"""What a network is trained to do: its loss, its sums over a split, its scores."""
