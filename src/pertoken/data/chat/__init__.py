"""Conversations to text with spans."""
