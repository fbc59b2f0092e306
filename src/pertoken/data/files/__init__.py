"""Files to rows: finding, hashing, reading, and where each row is."""
