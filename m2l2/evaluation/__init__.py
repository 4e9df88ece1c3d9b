"""Evaluation: the quality of reconstructions and latents."""
