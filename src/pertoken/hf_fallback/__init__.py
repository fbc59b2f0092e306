"""Any other causal language model, in transformers' own code."""
