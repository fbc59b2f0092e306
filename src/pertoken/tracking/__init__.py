"""What a run records and tells."""
