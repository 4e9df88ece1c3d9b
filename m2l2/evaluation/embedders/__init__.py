"""Embedding networks of audio, for Frechet distances and probes."""
