"""Chunk-causal attention as Pallas kernels for TPU: the whole sequence of one head is in VMEM.

A pair of chunks is some thousand tokens: keys and values of a head take 512 KiB in bfloat16, so nothing is
streamed and the softmax is a plain one. Chunk s multiplies with the keys of chunks <= s only: no masked work. The
backward kernel recomputes the probabilities and holds all three gradients of its head.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

LANES = 128      # a chunk's tokens are padded to a multiple of it
ROWS = 256       # queries at a time: the probabilities of 256 x 1280 take 1.3 MB
_MASKED = -1e30  # logits of padding; finite, so that a row of nothing but padding gives no nan


def attention(
    q: Float[Array, 'B L H K'], k: Float[Array, 'B L H K'], v: Float[Array, 'B L H K'], *, num_chunks: int,
    interpret: bool = False) -> Float[Array, 'B L H K']:
  """q, k, v [B, S*P, H, K] -> [B, S*P, H, K], chunk-causal over S chunks; any P, softmax in float32.

  interpret: run on any platform, slowly, for tests.
  """
  return _attention(q, k, v, num_chunks, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q, k, v, num_chunks, interpret):
  return _forward(q, k, v, num_chunks, interpret)[0]


def _forward(q, k, v, num_chunks, interpret):
  tokens = q.shape[1] // num_chunks
  padded = [_to_kernel(x, num_chunks) for x in (q, k, v)]
  out = _call(_forward_kernel, padded, outputs=1, tokens=tokens, num_chunks=num_chunks, interpret=interpret)[0]
  return _from_kernel(out, q.shape, num_chunks), (q, k, v)


def _backward(num_chunks, interpret, residuals, grad):
  tokens = grad.shape[1] // num_chunks
  padded = [_to_kernel(x, num_chunks) for x in (*residuals, grad)]
  grads = _call(_backward_kernel, padded, outputs=3, tokens=tokens, num_chunks=num_chunks, interpret=interpret)
  return tuple(_from_kernel(g, grad.shape, num_chunks) for g in grads)


_attention.defvjp(_forward, _backward)


def _to_kernel(x, num_chunks):
  """[B, S*P, H, K] -> [B, H, S*P', K] with P padded to whole lanes."""
  b, n, h, d = x.shape
  x = x.reshape(b, num_chunks, n // num_chunks, h, d)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, 0), (0, 0)))
  return x.reshape(b, -1, h, d).swapaxes(1, 2)


def _from_kernel(x, shape, num_chunks):
  b, n, h, d = shape
  x = x.swapaxes(1, 2).reshape(b, num_chunks, -1, h, d)
  return x[:, :, :n // num_chunks].reshape(shape)


def _call(kernel, arrays, *, outputs, tokens, num_chunks, interpret):
  b, h, n, d = arrays[0].shape
  block = pl.BlockSpec((None, None, n, d), lambda i, j: (i, j, 0, 0))
  scratch = [pltpu.VMEM((n, d), jnp.float32)] * 2 if outputs > 1 else []
  return pl.pallas_call(
      functools.partial(kernel, tokens=tokens, num_chunks=num_chunks),
      grid=(b, h), in_specs=[block] * len(arrays), out_specs=[block] * outputs, scratch_shapes=scratch,
      out_shape=[jax.ShapeDtypeStruct((b, h, n, d), arrays[0].dtype)] * outputs, interpret=interpret,
      cost_estimate=_cost(arrays, outputs, num_chunks),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
      name=f'chunk_causal_{"backward" if outputs > 1 else "forward"}')(*arrays)


def _cost(arrays, outputs, num_chunks) -> pl.CostEstimate:
  """The cost of a call for the compiler: FLOPs, exponentials, and bytes read and written."""
  b, h, n, d = arrays[0].shape
  pairs = b * h * sum(rows * keys for _, rows, keys in _blocks(n, num_chunks))
  products = 2 if outputs == 1 else 5
  return pl.CostEstimate(flops=2 * products * pairs * d, transcendentals=pairs,
                         bytes_accessed=(len(arrays) + outputs) * b * h * n * d * arrays[0].dtype.itemsize)


def _blocks(length, num_chunks):
  """(start, rows, keys) of each block of queries: chunk s sees the first (s + 1) P' keys."""
  size = length // num_chunks
  for chunk in range(num_chunks):
    for start in range(0, size, ROWS):
      yield chunk * size + start, min(ROWS, size - start), (chunk + 1) * size


def _probabilities(q, k, *, tokens, chunk_size):
  """softmax(q k^T / sqrt K) float32; zero for keys that are padding."""
  logits = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
  logits = logits * jnp.float32(q.shape[-1] ** -0.5)
  if tokens < chunk_size:
    place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) % chunk_size
    logits = jnp.where(place < tokens, logits, jnp.float32(_MASKED))
  weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
  return weights / jnp.sum(weights, axis=1, keepdims=True)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, tokens, num_chunks):
  length = q_ref.shape[0]
  for start, rows, keys in _blocks(length, num_chunks):
    p = _probabilities(q_ref[start:start + rows], k_ref[:keys], tokens=tokens, chunk_size=length // num_chunks)
    out = jax.lax.dot_general(p.astype(v_ref.dtype), v_ref[:keys], (((1,), (0,)), ((), ())),
                              preferred_element_type=jnp.float32)
    out_ref[start:start + rows] = out.astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, dk_sum, dv_sum, *, tokens, num_chunks):
  length, dtype = q_ref.shape[0], q_ref.dtype
  scale = jnp.float32(q_ref.shape[1] ** -0.5)
  dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
  dk_sum[...] = jnp.zeros_like(dk_sum)
  dv_sum[...] = jnp.zeros_like(dv_sum)
  for start, rows, keys in _blocks(length, num_chunks):
    q, do = q_ref[start:start + rows], do_ref[start:start + rows]
    k, v = k_ref[:keys], v_ref[:keys]
    p = _probabilities(q, k, tokens=tokens, chunk_size=length // num_chunks)
    dp = dot(do, v, (((1,), (1,)), ((), ())))
    ds = (p * (dp - jnp.sum(p * dp, axis=1, keepdims=True)) * scale).astype(dtype)
    dq_ref[start:start + rows] = dot(ds, k, (((1,), (0,)), ((), ()))).astype(dtype)
    dk_sum[:keys] += dot(ds, q, (((0,), (0,)), ((), ())))
    dv_sum[:keys] += dot(p.astype(dtype), do, (((0,), (0,)), ((), ())))
  dk_ref[...] = dk_sum[...].astype(dtype)
  dv_ref[...] = dv_sum[...].astype(dtype)
