"""Model folders: open and save."""
