"""Checkpoints: read, write, export."""
