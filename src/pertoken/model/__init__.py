"""The decoder, on flat tokens."""
