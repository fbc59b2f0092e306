"""Models, tokenizers and data by their names on the hub: what a name means, which files, and their download."""
