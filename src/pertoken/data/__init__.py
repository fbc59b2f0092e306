"""From files to micro-batches. Knows nothing of models."""
