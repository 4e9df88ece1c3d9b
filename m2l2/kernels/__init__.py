"""Chunk-causal attention: a reference and its fused twins, one signature."""
