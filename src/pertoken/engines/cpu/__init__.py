"""A decoder on a CPU, through the kernels."""
