"""Other people's models and latents, in and out."""
