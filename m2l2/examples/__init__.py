"""What can be built on latents: examples that are used, each in one file."""
