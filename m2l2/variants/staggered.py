"""CoDiCodec's parallel decoding: all chunks of a block at once, in pairs that change from step to step."""

import jax
import jax.numpy as jnp
import numpy as np


def sample_staggered(consistency, denoiser, features, noises, sigmas, *, carried, first):
  """A block of parallel decoding (CoDiCodec): chunks change between the left and the right of a pair.

  At even steps the pairs are (0, 1)(2, 3)..., at odd steps 0 stands alone and the pairs are (1, 2)(3, 4)...
  The signal comes in blocks of an even number M of chunks. In the block that starts at chunk a, step k
  takes the chunks a - k ... a - k + M - 1: each step runs one chunk behind the step before, so no pair is cut
  by a block's border and nothing is computed twice.

  Args:
    consistency: whose multi-step sampling it is.
    denoiser: features -> bound consistency function over [N, 2, ...].
    features: of the chunks from a - (steps - 1) on; leaves [B, M + steps - 1, ...].
    noises: one [B, M, ...] per level, of the chunks of its step.
    carried: steps - 1 arrays [B, ...] from the block before; anything finite in the first block.
    first: whether this is the first block (bool, or a traced one): chunk 0 then has no left neighbour. What
      is computed for negative chunks means nothing.

  Returns:
    (x [B, M, ...] of the chunks from a - (steps - 1) on, carried for the next block).
  """
  lag, chunks = len(sigmas) - 1, noises[0].shape[1]
  carry: list[jax.Array] = []

  def denoise(x, sigma):
    k = len(carry)
    window = jax.tree.map(lambda leaf: leaf[:, lag - k:lag - k + chunks], features)
    order: np.ndarray | jax.Array = np.arange(chunks)
    if k % 2:  # chunk 0 would be right of chunk -1, which is none: they change places
      swapped = np.arange(chunks)
      swapped[[k - 1, k]] = k, k - 1
      order = jnp.where(first, swapped, order)
    paired = jax.tree.map(
        lambda leaf: jnp.take(leaf, order, axis=1).reshape(-1, 2, *leaf.shape[2:]), (x, sigma, window))
    out = denoiser(paired[2])(*paired[:2]).reshape(x.shape)
    out = jnp.take(out, order, axis=1)
    carry.append(out[:, -1])
    if k == lag:
      return out
    return jnp.concatenate([carried[k][:, None], out[:, :-1]], axis=1)  # one chunk back, for the next step

  x = consistency.sample(denoise, noises, sigmas)
  return x, tuple(carry[:-1])
