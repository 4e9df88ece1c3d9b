"""Kernels: chunk-causal attention, convolutions and norms."""
