"""How a decoder is run."""
