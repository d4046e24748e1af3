"""Where networks come from, by name."""
