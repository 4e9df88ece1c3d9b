"""Chunk-causal attention: full inside a chunk, a later chunk also sees the earlier ones (paper, figure 1).

For S chunks it is S dense attentions, chunk s over chunks <= s: no mask tensor and no masked work, 3/4 of
the masked-dense cost at S = 2. One signature, several implementations:

  xla          plain JAX, everywhere; the reference
  cudnn        a fused cuDNN attention per chunk; NVIDIA GPUs, bfloat16 or float16
  pallas_tpu   one Pallas kernel forward and one backward (pallas_tpu.py); TPUs
  auto         the fastest of these that runs here
"""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn', 'pallas_tpu')
_PLATFORMS = {'xla': ('cpu', 'gpu', 'tpu'), 'cudnn': ('gpu',), 'pallas_tpu': ('tpu',)}
_LANES = 128  # head dimensions of the TPU's kernel are multiples of it
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar('target', default=None)


@contextlib.contextmanager
def compiling_for(platform: str):
  """Traces inside the block for "cpu", "gpu" or "tpu", whatever this process runs on, for ahead-of-time compiling."""
  token = _target.set(platform)
  try:
    yield
  finally:
    _target.reset(token)


def platform() -> str:
  """The platform that programs are traced for: 'cpu', 'gpu' or 'tpu'."""
  name = _target.get() or jax.default_backend()
  return 'gpu' if name in ('cuda', 'rocm') else name


def check_implementation(impl: str, *, dtype=None):
  """Raises ValueError for an implementation that is unknown or does not run on this platform or in `dtype`."""
  if impl not in IMPLEMENTATIONS:
    raise ValueError(f'attention impl is {impl!r}; choose from {IMPLEMENTATIONS}')
  here = platform()
  if impl != 'auto' and here not in _PLATFORMS[impl]:
    works = ['auto', *(name for name, platforms in _PLATFORMS.items() if here in platforms)]
    raise ValueError(f'attention {impl!r} needs a {" or ".join(_PLATFORMS[impl])}, this is a {here}; here work '
                     f'{", ".join(works)}')
  if impl == 'cudnn' and dtype not in (None, jnp.bfloat16, jnp.float16):
    raise ValueError(f"attention 'cudnn' takes bfloat16 or float16, not {dtype}: set model.dtype, or take 'xla'")


def chunk_causal_attention(
    q: Float[Array, 'B L H K'], k: Float[Array, 'B L H K'], v: Float[Array, 'B L H K'], *, num_chunks: int,
    impl: str = 'auto', spec: PartitionSpec | None = None) -> Float[Array, 'B L H K']:
  """Scaled dot-product attention under the chunk-level causal mask.

  Args:
    q, k, v: [B, S*P, H, K], the tokens of chunk 0 first; q and k already normalised, if at all.
    num_chunks: S.
    impl: one of IMPLEMENTATIONS.
    spec: how [B, S*P, H, K] lies on the mesh of `jax.set_mesh` (batch and heads only), for the kernels that the
      compiler cannot split by itself.

  Returns:
    [B, S*P, H, K] in q's dtype; the softmax is taken in float32.

  Raises:
    ValueError: an unknown `impl`, one that does not run on this platform or in this dtype, or a sequence that does not
      divide into chunks.
  """
  check_implementation(impl, dtype=q.dtype)
  length, rest = divmod(q.shape[1], num_chunks)
  if rest:
    raise ValueError(f'{q.shape[1]} tokens do not divide into {num_chunks} chunks')
  if impl == 'auto':
    impl = _fastest(q)
  with jax.named_scope(f'chunk_causal_attention_{impl}'):
    if impl == 'pallas_tpu':
      from m2l2.kernels import pallas_tpu  # Pallas takes a third of a second to import
      return _on_mesh(functools.partial(pallas_tpu.attention, num_chunks=num_chunks), spec)(q, k, v)
    if impl == 'xla':
      return _xla(q, k, v, num_chunks)
    outputs = [
        _cudnn(q[:, s * length:(s + 1) * length], k[:, :(s + 1) * length], v[:, :(s + 1) * length])
        for s in range(num_chunks)]
    return jnp.concatenate(outputs, axis=1)


def _fastest(q) -> str:
  here = platform()
  if here == 'tpu' and q.shape[-1] % _LANES == 0:
    return 'pallas_tpu'
  if here == 'gpu' and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0:
    return 'cudnn'
  return 'xla'


def _on_mesh(attention, spec):
  """Each device runs the kernel on its own items and heads."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or spec is None:
    return attention
  return jax.shard_map(attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)


def _cudnn(q, k, v):
  """cuDNN's flash attention. JAX differentiates it for even lengths only, so odd ones are padded by a masked token."""
  attention = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')
  if q.shape[1] % 2 == k.shape[1] % 2 == 0:
    return attention(q, k, v)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
  length = lambda x: jnp.full(x.shape[0], x.shape[1], jnp.int32)
  out = attention(pad(q), pad(k), pad(v), query_seq_lengths=length(q), key_value_seq_lengths=length(k))
  return out[:, :q.shape[1]]


def masked_dense_attention(
    q: Float[Array, 'B L H K'], k: Float[Array, 'B L H K'], v: Float[Array, 'B L H K'], *,
    num_chunks: int) -> Float[Array, 'B L H K']:
  """The same by one dense attention and a mask: the reference of the tests."""
  chunk = jnp.arange(q.shape[1]) // (q.shape[1] // num_chunks)
  logits = jnp.einsum('bqhk,bphk->bhqp', q, k, preferred_element_type=jnp.float32)
  logits = logits * jnp.float32(q.shape[-1] ** -0.5)
  logits = jnp.where(chunk[:, None] >= chunk[None, :], logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum('bhqp,bphk->bqhk', weights, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _xla(q, k, v, num_chunks):
  return _xla_forward(q, k, v, num_chunks)[0]


def _xla_forward(q, k, v, num_chunks):
  # An explicit transposition to heads first: else XLA's CPU backend multiplies matrices with strided rows.
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  weights, outputs = [], []
  for own, seen in _spans(q.shape[2], num_chunks):
    logits = _matmul('bhqk,bhpk->bhqp', q[:, :, own], k[:, :, seen]) * jnp.float32(q.shape[-1] ** -0.5)
    weights.append(jax.nn.softmax(logits, axis=-1).astype(v.dtype))
    outputs.append(_matmul('bhqp,bhpk->bhqk', weights[-1], v[:, :, seen]).astype(v.dtype))
  return jnp.concatenate(outputs, axis=2).swapaxes(1, 2), (q, k, v, weights)


def _xla_backward(num_chunks, saved, gradient):
  q, k, v, weights = saved
  gradient = gradient.swapaxes(1, 2)
  dq: list[jax.Array] = []
  dk = dv = None
  for (own, seen), w in reversed(list(zip(_spans(q.shape[2], num_chunks), weights))):
    inner = _matmul('bhqk,bhpk->bhqp', gradient[:, :, own], v[:, :, seen])
    w32 = w.astype(jnp.float32)
    inner = w32 * (inner - jnp.sum(inner * w32, axis=-1, keepdims=True)) * jnp.float32(q.shape[-1] ** -0.5)
    inner = inner.astype(q.dtype)
    dq.insert(0, _matmul('bhqp,bhpk->bhqk', inner, k[:, :, seen]))
    dk = _add_first(dk, _matmul('bhqp,bhqk->bhpk', inner, q[:, :, own]))
    dv = _add_first(dv, _matmul('bhqp,bhqk->bhpk', w, gradient[:, :, own]))
  assert dk is not None and dv is not None
  return tuple(x.swapaxes(1, 2).astype(q.dtype) for x in (jnp.concatenate(dq, axis=2), dk, dv))


_xla.defvjp(_xla_forward, _xla_backward)


def _spans(tokens, num_chunks):
  """(queries, keys) of each chunk, as slices."""
  length = tokens // num_chunks
  return [(slice(s * length, (s + 1) * length), slice(0, (s + 1) * length)) for s in range(num_chunks)]


def _add_first(total, part):
  """Adds `part` to the first tokens of `total` [B, H, P, K]."""
  if total is None:
    return part
  count = part.shape[2]
  return jnp.concatenate([total[:, :, :count] + part, total[:, :, count:]], axis=2)


def _matmul(names, x, y):
  return jnp.einsum(names, x, y, preferred_element_type=jnp.float32)
