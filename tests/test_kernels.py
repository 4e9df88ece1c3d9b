"""Chunk-causal attention, every implementation: values, gradients, and what is refused where."""

import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2 import build
from m2l2.configs import base
from m2l2.errors import UserError
from m2l2.kernels import chunk_causal, pallas_tpu
from m2l2.kernels.chunk_causal import IMPLEMENTATIONS, chunk_causal_attention, compiling_for, masked_dense_attention
from m2l2.planning.flops import count_flops

pytestmark = pytest.mark.usefixtures('strict_dtypes')


def _qkv(chunks, dtype=jnp.float32, *, tokens=5, width=4):
  shape = (2, tokens * chunks, 3, width)
  return [jnp.asarray(np.random.normal(size=shape), dtype) for _ in range(3)]


def _gradients(attention, qkv, weight):
  """Values and gradients of a weighted sum."""
  out = lambda qkv: attention(*qkv)
  loss = lambda qkv: (jnp.sum(out(qkv).astype(jnp.float32) * weight), out(qkv))
  return jax.jit(jax.grad(loss, has_aux=True))(qkv)


@pytest.mark.parametrize('chunks', [1, 2, 3])
def test_values_and_gradients_equal_the_masked_dense_twin(chunks):
  qkv = _qkv(chunks)
  weight = jnp.asarray(np.random.normal(size=qkv[0].shape), jnp.float32)
  got, want = (_gradients(functools.partial(attention, num_chunks=chunks), qkv, weight)
               for attention in (chunk_causal_attention, masked_dense_attention))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)


def _float64(qkv, weight, chunks):
  """Values and gradients by numpy in float64."""
  q, k, v, do = (np.asarray(x, np.float64) for x in (*qkv, weight))
  chunk = np.arange(q.shape[1]) // (q.shape[1] // chunks)
  scale = q.shape[-1] ** -0.5
  logits = np.where(chunk[:, None] >= chunk[None, :], np.einsum('bqhk,bphk->bhqp', q, k) * scale, -np.inf)
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  p /= p.sum(axis=-1, keepdims=True)
  dp = np.einsum('bqhk,bphk->bhqp', do, v)
  ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
  return (np.einsum('bhqp,bphk->bqhk', p, v), np.einsum('bhqp,bphk->bqhk', ds, k),
          np.einsum('bhqp,bqhk->bphk', ds, q), np.einsum('bhqp,bqhk->bphk', p, do))


@pytest.mark.parametrize('tokens,chunks,dtype,bound', [
    (512, 2, jnp.float32, 2e-6), (1041, 1, jnp.float32, 2e-6), (37, 3, jnp.float32, 2e-6),
    (520, 2, jnp.bfloat16, 1e-2), *(pytest.param(*case, marks=pytest.mark.soak) for case in (
        (520, 2, jnp.float32, 2e-6), (3, 2, jnp.float32, 2e-6), (1041, 1, jnp.bfloat16, 1e-2),
        (128, 3, jnp.bfloat16, 1e-2)))])
def test_the_tpu_kernel_against_float64(tokens, chunks, dtype, bound):
  """In interpret mode: whole lanes and broken ones, more queries than one block has."""
  qkv = [x[:1, :, :1] for x in _qkv(chunks, dtype, tokens=tokens, width=128)]
  weight = jnp.asarray(np.random.normal(size=qkv[0].shape), dtype).astype(jnp.float32)
  (dq, dk, dv), out = _gradients(
      functools.partial(pallas_tpu.attention, num_chunks=chunks, interpret=True), qkv, weight)
  for got, want in zip((out, dq, dk, dv), _float64(qkv, weight, chunks)):
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert got.dtype == dtype and (error < bound or not np.linalg.norm(want)), error


def test_the_tpu_kernel_for_several_heads_and_items():
  qkv = _qkv(2, tokens=40, width=128)
  got = pallas_tpu.attention(*qkv, num_chunks=2, interpret=True)
  np.testing.assert_allclose(got, masked_dense_attention(*qkv, num_chunks=2), atol=2e-6)


def test_first_position_of_one_chunk_by_hand():
  q, k, v = _qkv(1)
  logits = np.einsum('k,pk->p', q[0, 0, 0], k[0, :, 0]) / 2  # sqrt of the head width
  weights = np.exp(logits) / np.exp(logits).sum()
  got = chunk_causal_attention(q, k, v, num_chunks=1)
  np.testing.assert_allclose(got[0, 0, 0], weights @ v[0, :, 0], atol=2e-6)


def test_a_chunk_sees_all_of_itself_and_nothing_later():
  q, k, v = _qkv(3)
  loss = lambda v: jnp.sum(chunk_causal_attention(q, k, v, num_chunks=3)[:, 5:10])
  grad = np.asarray(jax.jit(jax.grad(loss))(v))
  assert np.all(grad[:, :10] != 0) and np.all(grad[:, 10:] == 0)


def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
  got = chunk_causal_attention(*_qkv(2, jnp.bfloat16), num_chunks=2)
  np.random.seed(0)
  want = chunk_causal_attention(*_qkv(2), num_chunks=2)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=.03)


def test_no_masked_work():
  """Multiplications of both products: 3/4 of the masked-dense ones at two chunks.

  Padded to a matrix unit it is the same for chunks of 512 tokens, which fill it; of 520, in part: .81.
  """
  for tokens, padded in ((512, 0.75), (520, 0.8056)):
    x = jax.ShapeDtypeStruct((1, 2 * tokens, 1, 128), jnp.bfloat16)
    plain, masked = (count_flops(jax.make_jaxpr(functools.partial(attention, num_chunks=2))(x, x, x).jaxpr)
                     for attention in (functools.partial(chunk_causal_attention, impl='xla'), masked_dense_attention))
    assert plain.total / masked.total == 0.75 and plain.padded / masked.padded == pytest.approx(padded, abs=1e-4)
  qkv = _qkv(2, tokens=128, width=128)
  kernel = functools.partial(pallas_tpu.attention, interpret=True)
  counts = [count_flops(jax.make_jaxpr(functools.partial(attention, num_chunks=2))(*qkv).jaxpr).total
            for attention in (masked_dense_attention, chunk_causal_attention, kernel)]
  assert counts == [counts[0], 0.75 * counts[0], 0.75 * counts[0]] and counts[0] > 0


@pytest.mark.parametrize('tokens', [128, 200])
def test_a_kernel_tells_its_own_flops_and_bytes(tokens):
  """What no compiler can see inside: those of its products, as `count_flops` counts them, padding to lanes included."""
  x = jax.ShapeDtypeStruct((2, 2 * tokens, 3, 128), jnp.bfloat16)
  kernel = functools.partial(pallas_tpu.attention, num_chunks=2)
  traced = jax.make_jaxpr(lambda q, k, v: jax.vjp(kernel, q, k, v)[1](q))(x, x, x).jaxpr
  told = [eqn.params['cost_estimate'] for eqn in _equations(traced) if eqn.primitive.name == 'pallas_call']
  assert len(told) == 2 and sum(cost.flops for cost in told) == count_flops(traced).total > 0
  array = 2 * 3 * 2 * (-tokens // 128 * -128) * 128 * 2
  assert sorted(cost.bytes_accessed for cost in told) == [4 * array, 7 * array]


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from _equations(inner)


# ---- what runs where -----------------------------------------------------------------------------


def test_errors():
  with pytest.raises(ValueError, match='magic.*choose from'):
    chunk_causal_attention(*_qkv(2), num_chunks=2, impl='magic')
  with pytest.raises(ValueError, match='10 tokens do not divide into 3 chunks'):
    chunk_causal_attention(*_qkv(2), num_chunks=3)


@pytest.mark.parametrize('impl,needs', [('cudnn', 'gpu'), ('pallas_tpu', 'tpu')])
def test_the_wrong_platform_is_refused_with_what_works(impl, needs):
  with pytest.raises(ValueError, match=f"'{impl}' needs a {needs}, this is a cpu; here work auto, xla"):
    chunk_causal_attention(*_qkv(2), num_chunks=2, impl=impl)
  config = base.get_config('debug')
  config.model.attention = impl
  with pytest.raises(UserError, match=f'config.model: .*needs a {needs}'):
    build.network(config)


def test_cudnn_takes_half_precision_only():
  with compiling_for('gpu'), pytest.raises(ValueError, match='bfloat16 or float16, not float32'):
    chunk_causal_attention(*_qkv(2), num_chunks=2, impl='cudnn')


@pytest.mark.parametrize('tokens', [512, 520, 1041])
def test_cudnn_lowers_to_one_fused_attention_a_chunk_each_way(tokens, monkeypatch):
  """No GPU needed: how it is lowered, not what it computes (that is the next test, marked gpu)."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn
  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91200)
  monkeypatch.setattr(cudnn, 'check_compute_capability', lambda capability: True)
  shape = jax.ShapeDtypeStruct((2, 2 * tokens, 4, 128), jnp.bfloat16)

  def loss(q, k, v):
    return jnp.sum(chunk_causal_attention(q, k, v, num_chunks=2, impl='cudnn').astype(jnp.float32))

  with compiling_for('gpu'):
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(shape, shape, shape)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  calls = re.findall(r'custom_call @(__cudnn\$fmha\w+)\(.*?: \((.*?)\) ->', text)
  keys = [re.findall(r'tensor<([\dx]+)xbf16>', types)[1] for _, types in calls]
  assert sorted(name for name, _ in calls) == 2 * ['__cudnn$fmhaSoftmax'] + 2 * ['__cudnn$fmhaSoftmaxBackward']
  # Chunk 0 meets its own keys (an odd number of them and one that is masked), chunk 1 those of both: no masked work.
  assert sorted(keys) == sorted(2 * [f'2x{tokens + tokens % 2}x4x128', f'2x{2 * tokens}x4x128'])


@pytest.mark.gpu
@pytest.mark.parametrize('tokens,chunks', [(512, 2), (520, 2), (1041, 1), (37, 3)])
def test_cudnn_against_float64(tokens, chunks):
  qkv = _qkv(chunks, jnp.bfloat16, tokens=tokens, width=128)
  weight = jnp.asarray(np.random.normal(size=qkv[0].shape), jnp.float32)
  weight = weight.astype(jnp.bfloat16).astype(jnp.float32)
  attention = functools.partial(chunk_causal_attention, num_chunks=chunks, impl='cudnn')
  gradients, out = _gradients(attention, qkv, weight)
  for got, want in zip((out, *gradients), _float64(qkv, weight, chunks), strict=True):
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize('platform,dtype,width,expected', [
    ('cpu', jnp.bfloat16, 128, 'xla'), ('tpu', jnp.float32, 128, 'pallas_tpu'), ('tpu', jnp.bfloat16, 64, 'xla'),
    ('gpu', jnp.bfloat16, 128, 'cudnn'), ('gpu', jnp.float32, 128, 'xla')])
def test_auto_takes_the_fastest(platform, dtype, width, expected):
  with compiling_for(platform):
    assert chunk_causal._fastest(jnp.zeros((1, 1, 1, width), dtype)) == expected
  assert chunk_causal.platform() == 'cpu' and set(IMPLEMENTATIONS) == {'auto', *chunk_causal._PLATFORMS}


def test_on_a_mesh_each_device_runs_its_own_items_and_heads(monkeypatch):
  """The kernel under shard_map: batch over data and fsdp, heads over tensor."""
  from m2l2 import sharding
  monkeypatch.setattr(pallas_tpu, 'attention', functools.partial(pallas_tpu.attention, interpret=True))
  q, k, v = (jnp.asarray(np.random.normal(size=(4, 16, 2, 128)), jnp.float32) for _ in range(3))
  want = masked_dense_attention(q, k, v, num_chunks=2)
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
    spec = sharding.activation_spec(q.shape, 'batch', None, 'heads', None)

    @jax.jit
    def run(q, k, v):
      with compiling_for('tpu'):
        return chunk_causal_attention(q, k, v, num_chunks=2, spec=spec)
    got = run(q, k, v)
  assert {shard.data.shape for shard in got.addressable_shards} == {(1, 16, 1, 128)}
  np.testing.assert_allclose(got, want, atol=2e-6)
