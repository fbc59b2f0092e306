"""The same objective inside other engines."""
