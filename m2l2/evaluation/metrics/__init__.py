"""Metrics of pairs of signals, of two sets of embeddings, and at chunk borders."""
