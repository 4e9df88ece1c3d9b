"""The convolution's own gradient of its kernel against XLA's, and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2.kernels import convolution
from m2l2.kernels.chunk_causal import compiling_for
from m2l2.planning.flops import count_flops

CASES = [  # map [N, F, T, I], kernel [A, B, O], padding
    ((2, 64, 32, 8), (3, 3, 5), ((1, 1), (1, 1))),
    ((1, 1024, 4, 3), (3, 3, 4), ((1, 1), (1, 1))),   # several blocks of rows
    ((3, 66, 17, 4), (2, 3, 6), ((0, 0), (1, 1))),    # what packed maps take
    ((2, 131, 16, 2), (2, 2, 2), ((1, 1), (1, 1))),   # 132 rows of the result
    ((1, 37, 600, 2), (3, 3, 2), ((1, 1), (1, 1))),   # no two rows fit: blocks of one
]


def draw(shape, size, padding=((1, 1), (1, 1)), dilation=(1, 1)):
  """A map, a kernel, and a weight for each number of the result; by numpy, of which nothing is compiled."""
  rng = np.random.default_rng(0)
  out = [n + sum(pad) - d * (k - 1) for n, k, pad, d in zip(shape[1:3], size[:2], padding, dilation)]
  shapes = shape, (*size[:2], shape[-1], size[2]), (shape[0], *out, size[2])
  return [rng.standard_normal(s, np.float32) for s in shapes]


def with_gradients(function):
  """(map, kernel, weight) -> the result and its gradients, in one program."""
  @jax.jit
  def call(x, kernel, weight):
    out, pull = jax.vjp(function, x, kernel)
    return out, *pull(weight)
  return call


@pytest.mark.parametrize('shape,size,padding', CASES)
def test_result_and_gradients_are_those_of_the_plain_convolution(shape, size, padding):
  arrays = draw(shape, size, padding)
  ours = with_gradients(lambda x, kernel: convolution.convolve(x, kernel, padding))(*arrays)
  plain = with_gradients(lambda x, kernel: convolution._plain(x, kernel, padding, (1, 1)))(*arrays)
  np.testing.assert_array_equal(ours[0], plain[0])
  for got, want in zip(ours[1:], plain[1:], strict=True):
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize('dilation', [(1, 1), (1, 4)])
def test_products_of_float32_maps_may_read_two_bfloat16(dilation):
  x, kernel, weight = draw((2, 8, 16, 4), (3, 3, 4), dilation=dilation)
  low = kernel.astype(jnp.bfloat16)
  ours = with_gradients(lambda x, kernel: convolution.convolve(
      x, kernel, ((1, 1), (1, 1)), dilation=dilation))(x, low, weight)
  plain = with_gradients(lambda x, kernel: convolution._plain(x, kernel, ((1, 1), (1, 1)), dilation))(
      x, low.astype(np.float32), weight)
  assert [a.dtype for a in ours] == [jnp.float32, jnp.float32, jnp.bfloat16]
  out, *gradients = [np.asarray(a, np.float32) for a in ours]
  assert 0 < np.linalg.norm(out - plain[0]) / np.linalg.norm(plain[0]) < 1e-5
  for got, want in zip(gradients, plain[1:], strict=True):
    assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


def test_it_is_as_exact_as_float32_sums_are():
  x, _, gradient = draw((2, 256, 16, 4), (3, 3, 4))
  padded = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
  exact = np.stack([[np.einsum('nfti,nfto->io', padded[:, i:i + 256, j:j + 16], np.float64(gradient))
                     for j in range(3)] for i in range(3)])
  ours = convolution.kernel_gradient(x, gradient, (3, 3), ((1, 1), (1, 1)))
  assert np.abs(ours - exact).max() < 2e-6 * np.abs(exact).max()


def primitives(x, kernel):
  gradient = jax.grad(lambda kernel: jnp.sum(jnp.square(convolution.convolve(x, kernel, ((1, 1), (1, 1))))))
  return str(jax.make_jaxpr(gradient)(kernel))


def test_it_serves_one_cpu_and_large_maps_alone():
  x, kernel, _ = map(jnp.asarray, draw((1, 64, 32, 4), (3, 3, 4)))
  assert 'scan' in primitives(x, kernel)
  assert 'scan' not in primitives(x[:, :4], kernel)
  with compiling_for('tpu'):
    assert 'scan' not in primitives(x, kernel)
  with jax.set_mesh(jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))):
    assert 'scan' not in primitives(x, kernel)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_gradient_takes_twice_the_flops_of_the_forward_pass(dtype):
  """The kernel's by blocks, or as a convolution; nothing is computed again."""
  forward = lambda x, kernel: convolution.convolve(x, kernel, ((1, 1), (1, 1)))
  both = lambda x, kernel: jax.vjp(forward, x, kernel)[1](x)
  x, kernel = jax.ShapeDtypeStruct((2, 64, 32, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 4), dtype)
  once, all_three = (count_flops(jax.make_jaxpr(function)(x, kernel).jaxpr).total for function in (forward, both))
  parts = 2 if dtype == jnp.bfloat16 else 1  # x is read as two numbers, forward alone
  assert once == parts * 2 * 2 * 64 * 32 * 9 * 4 * 4 and all_three == once * (1 + 2 / parts)
