"""Local embeddings (`variants.local_embeddings`): in order, each belongs to a slot of the chunk's frames, as in an
ordinary autoencoder. What the paper's summary embeddings are compared with: each slot goes through the transformers of
encoder and decoder by itself and has its share of the embeddings."""

import jax.numpy as jnp


def split_slots(x, grid, slots):
  """Tokens [N, P, D] of a (F, T) grid -> [N * slots, P / slots, D], each slot its own stretch of frames."""
  n, tokens, d = x.shape
  x = x.reshape(n, grid[0], slots, grid[1] // slots, d)
  return jnp.moveaxis(x, 2, 1).reshape(n * slots, tokens // slots, d)


def join_slots(x, grid, slots):
  """The inverse of `split_slots`."""
  n, tokens, d = x.shape
  x = x.reshape(n // slots, slots, grid[0], grid[1] // slots, d)
  return jnp.moveaxis(x, 1, 2).reshape(n // slots, tokens * slots, d)
