"""The convolution's own gradient of its kernel against XLA's, and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2.kernels import convolution
from m2l2.kernels.chunk_causal import compiling_for

CASES = [  # map [N, F, T, I], kernel [A, B, O], padding
    ((2, 64, 32, 8), (3, 3, 5), ((1, 1), (1, 1))),
    ((1, 1024, 4, 3), (3, 3, 4), ((1, 1), (1, 1))),   # several blocks of rows
    ((3, 66, 17, 4), (2, 3, 6), ((0, 0), (1, 1))),    # what packed maps take
    ((2, 131, 16, 2), (2, 2, 2), ((1, 1), (1, 1))),   # 132 rows of the result
    ((1, 37, 600, 2), (3, 3, 2), ((1, 1), (1, 1))),   # no two rows fit: blocks of one
]


def draw(shape, size):
  keys = jax.random.split(jax.random.key(0), 2)
  return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (*size[:2], shape[-1], size[2]))


@pytest.mark.parametrize('shape,size,padding', CASES)
def test_result_and_gradients_are_those_of_the_plain_convolution(shape, size, padding):
  x, kernel = draw(shape, size)
  out, pull = jax.vjp(lambda x, kernel: convolution.convolve(x, kernel, padding), x, kernel)
  expected, plain_pull = jax.vjp(lambda x, kernel: convolution._plain(x, kernel, padding, (1, 1)), x, kernel)
  np.testing.assert_array_equal(out, expected)
  weight = jax.random.normal(jax.random.key(1), out.shape)
  for ours, theirs in zip(pull(weight), plain_pull(weight), strict=True):
    assert jnp.abs(ours - theirs).max() < 1e-5 * jnp.abs(theirs).max()


@pytest.mark.parametrize('exact,error,dilation', [(False, 4e-3, (1, 1)), (True, 1e-5, (1, 1)), (True, 1e-5, (1, 4))])
def test_products_of_float32_maps_may_read_bfloat16(exact, error, dilation):
  x, kernel = draw((2, 8, 16, 4), (3, 3, 4))
  low = kernel.astype(jnp.bfloat16)
  out, pull = jax.vjp(jax.jit(lambda x, kernel: convolution.convolve(
      x, kernel, ((1, 1), (1, 1)), exact=exact, dilation=dilation)), x, low)
  expected, plain = jax.vjp(lambda x, kernel: convolution._plain(x, kernel, ((1, 1), (1, 1)), dilation), x,
                            low.astype(jnp.float32))
  assert out.dtype == jnp.float32
  assert 0 < jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected) < error
  weight = jax.random.normal(jax.random.key(1), out.shape)
  for ours, theirs, dtype in zip(pull(weight), plain(weight), (jnp.float32, jnp.bfloat16), strict=True):
    assert ours.dtype == dtype
    assert jnp.linalg.norm(ours.astype(jnp.float32) - theirs) < 1e-2 * jnp.linalg.norm(theirs)


def test_it_is_as_exact_as_float32_sums_are():
  x, kernel = draw((2, 256, 16, 4), (3, 3, 4))
  gradient = jax.random.normal(jax.random.key(1), x.shape)
  padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  exact = np.stack([[np.einsum('nfti,nfto->io', padded[:, i:i + 256, j:j + 16], np.asarray(gradient, np.float64))
                     for j in range(3)] for i in range(3)])
  ours = convolution.kernel_gradient(x, gradient, (3, 3), ((1, 1), (1, 1)))
  assert np.abs(ours - exact).max() < 2e-6 * np.abs(exact).max()


def primitives(x, kernel):
  gradient = jax.grad(lambda kernel: jnp.sum(jnp.square(convolution.convolve(x, kernel, ((1, 1), (1, 1))))))
  return str(jax.make_jaxpr(gradient)(kernel))


def test_it_serves_one_cpu_and_large_maps_alone():
  x, kernel = draw((1, 64, 32, 4), (3, 3, 4))
  assert 'scan' in primitives(x, kernel)
  assert 'scan' not in primitives(x[:, :4], kernel)
  with compiling_for('tpu'):
    assert 'scan' not in primitives(x, kernel)
  with jax.set_mesh(jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))):
    assert 'scan' not in primitives(x, kernel)
