"""Element-wise kernels for CPUs, compiled for the processor at hand when they are first needed."""
