"""Hidden states to sums."""
