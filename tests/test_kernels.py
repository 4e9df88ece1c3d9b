"""Chunk-causal attention against one dense attention with a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2.kernels.chunk_causal import (
  IMPLEMENTATIONS, chunk_causal_attention, masked_dense_attention)

pytestmark = pytest.mark.usefixtures('strict_dtypes')


def _qkv(chunks, dtype=jnp.float32):
  shape = (2, 5 * chunks, 3, 4)
  return [jnp.asarray(np.random.normal(size=shape), dtype) for _ in range(3)]


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('chunks', [1, 2, 3])
def test_values_and_gradients_equal_the_masked_dense_twin(impl, chunks):
  qkv = _qkv(chunks)
  weight = jnp.asarray(np.random.normal(size=qkv[0].shape), jnp.float32)

  def run(attention, **kwargs):
    out = lambda qkv: attention(*qkv, num_chunks=chunks, **kwargs)
    loss = lambda qkv: (jnp.sum(out(qkv) * weight), out(qkv))
    return jax.jit(jax.grad(loss, has_aux=True))(qkv)

  got, want = run(chunk_causal_attention, impl=impl), run(masked_dense_attention)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)


def test_first_position_of_one_chunk_by_hand():
  q, k, v = _qkv(1)
  logits = np.einsum('k,pk->p', q[0, 0, 0], k[0, :, 0]) / 2  # sqrt of the head width
  weights = np.exp(logits) / np.exp(logits).sum()
  got = chunk_causal_attention(q, k, v, num_chunks=1)
  np.testing.assert_allclose(got[0, 0, 0], weights @ v[0, :, 0], atol=2e-6)


def test_a_chunk_sees_all_of_itself_and_nothing_later():
  q, k, v = _qkv(3)
  grad = jax.grad(lambda v: jnp.sum(chunk_causal_attention(q, k, v, num_chunks=3)[:, 5:10]))(v)
  assert np.all(grad[:, :10] != 0) and np.all(grad[:, 10:] == 0)


def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
  got = chunk_causal_attention(*_qkv(2, jnp.bfloat16), num_chunks=2)
  np.random.seed(0)
  want = chunk_causal_attention(*_qkv(2), num_chunks=2)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=.03)


def test_errors():
  with pytest.raises(ValueError, match='magic.*choose from'):
    chunk_causal_attention(*_qkv(2), num_chunks=2, impl='magic')
  with pytest.raises(ValueError, match='10 tokens do not divide into 3 chunks'):
    chunk_causal_attention(*_qkv(2), num_chunks=3)
