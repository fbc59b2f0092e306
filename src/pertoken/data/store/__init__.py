"""Samples on disk: parts, workers, columns, checksums."""
