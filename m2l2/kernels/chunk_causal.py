"""Chunk-causal attention: full inside a chunk, a later chunk also sees the earlier ones (paper, figure 1).

For S chunks it is S dense attentions, chunk s over chunks <= s: no mask tensor and no masked work, 3/4 of
the masked-dense cost at S = 2.
"""

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ('xla',)


def chunk_causal_attention(q, k, v, *, num_chunks: int, impl: str = 'xla'):
  """Scaled dot-product attention under the chunk-level causal mask.

  Args:
    q, k, v: [B, S*P, H, K], the tokens of chunk 0 first; q and k already normalised if they are to be.
    num_chunks: S.
    impl: one of IMPLEMENTATIONS.

  Returns:
    [B, S*P, H, K] in q's dtype; the softmax is taken in float32.

  Raises:
    ValueError: for an unknown `impl`, or a sequence that does not divide into chunks.
  """
  if impl not in IMPLEMENTATIONS:
    raise ValueError(f'attention impl is {impl!r}; choose from {IMPLEMENTATIONS}')
  length, rest = divmod(q.shape[1], num_chunks)
  if rest:
    raise ValueError(f'{q.shape[1]} tokens do not divide into {num_chunks} chunks')
  with jax.named_scope('chunk_causal_attention'):
    outputs = [
        _dense(q[:, s * length:(s + 1) * length], k[:, :(s + 1) * length], v[:, :(s + 1) * length])
        for s in range(num_chunks)]
    return jnp.concatenate(outputs, axis=1)


def masked_dense_attention(q, k, v, *, num_chunks: int):
  """The same by one dense attention and a mask: the reference that the tests hold the others against."""
  chunk = jnp.arange(q.shape[1]) // (q.shape[1] // num_chunks)
  return _dense(q, k, v, mask=chunk[:, None] >= chunk[None, :])


def _dense(q, k, v, *, mask=None):
  logits = jnp.einsum('bqhk,bphk->bhqp', q, k, preferred_element_type=jnp.float32)
  logits = logits * jnp.float32(q.shape[-1] ** -0.5)
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum('bhqp,bphk->bqhk', weights, v)
