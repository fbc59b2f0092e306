"""Samples to micro-batches: order, packing, the share of a rank."""
