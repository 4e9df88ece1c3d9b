"""FLOPs by hand, by XLA on programs without loops, and through every kind of loop."""

import functools

import jax
import jax.numpy as jnp
import pytest

from m2l2.planning.flops import count_flops


def flops(function, *shapes, unit=128):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return count_flops(jax.make_jaxpr(function)(*arrays).jaxpr, unit=unit)


def conv(x, kernel, stride=1, **options):
  return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **options)


def test_by_hand():
  assert flops(jnp.dot, (3, 5), (5, 7)).total == 2 * 3 * 5 * 7
  assert flops(lambda a, b: jnp.einsum('bij,bjk->bik', a, b), (4, 3, 5), (4, 5, 7)).total == 2 * 4 * 3 * 5 * 7
  counted = flops(conv, (2, 8, 6, 5), (3, 3, 5, 7))
  assert counted.total == counted.convolutions == 2 * 2 * 8 * 6 * 9 * 5 * 7 and not counted.products


def test_padding_to_the_matrix_unit():
  assert flops(jnp.dot, (1000, 64), (64, 100)).padded == 2 * 1000 * 128 * 128
  assert flops(jnp.dot, (1000, 64), (64, 100), unit=256).padded == 2 * 1000 * 256 * 256
  assert flops(jnp.dot, (512, 256), (256, 128)).padded == flops(jnp.dot, (512, 256), (256, 128)).total
  assert flops(conv, (2, 8, 6, 64), (3, 3, 64, 64)).padded == 2 * 2 * 8 * 6 * 9 * 128 * 128
  gradient = jax.grad(lambda kernel, x: jnp.sum(conv(x, kernel) ** 2))  # and that sum's own forward pass
  both = flops(gradient, (3, 3, 64, 64), (2, 8, 16, 64))
  assert both.padded == 2 * 2 * 8 * 16 * 9 * (128 * 128 + 64 * 128) and both.total == 2 * 2 * 2 * 8 * 16 * 9 * 64 * 64


@pytest.mark.parametrize('function,shapes', [
    (lambda a, b: jnp.sum(jnp.dot(a, b)), ((32, 64), (64, 48))),
    (lambda x, k: jnp.sum(conv(x, k)), ((2, 16, 16, 8), (1, 1, 8, 16))),
    (lambda x, k: jnp.sum(conv(x, k, stride=2)), ((2, 16, 16, 8), (2, 2, 8, 16)))])
def test_gradients_are_counted_as_xla_counts_them(function, shapes):
  """Without padding at borders, where XLA leaves out what meets zeros."""
  gradient = jax.value_and_grad(function, argnums=(0, 1))
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  analysis = jax.jit(gradient).lower(*arrays).cost_analysis()
  assert flops(gradient, *shapes).total == pytest.approx(analysis['flops'], rel=0.06)


def test_loops_branches_and_what_is_inside_them():
  def layer(x, kernel):
    return jnp.dot(x, kernel), None

  once = 2 * 4 * 8 * 8
  assert flops(lambda x, ks: jax.lax.scan(layer, x, ks)[0], (4, 8), (12, 8, 8)).total == 12 * once
  inner = lambda x, ks: jax.lax.scan(lambda x, k: jax.lax.scan(layer, x, k), x, ks)[0]
  assert flops(inner, (4, 8), (3, 12, 8, 8)).total == 36 * once
  assert flops(jax.jit(jax.checkpoint(jnp.dot)), (4, 8), (8, 8)).total == once
  branches = lambda x, k: jax.lax.cond(x[0, 0] > 0, lambda: jnp.dot(x, k), lambda: jnp.dot(jnp.dot(x, k), k))
  assert flops(branches, (4, 8), (8, 8)).total == 2 * once


def test_attention_is_told_apart():
  from m2l2.kernels.chunk_causal import chunk_causal_attention
  shape = (2, 12, 3, 4)
  counted = flops(functools.partial(chunk_causal_attention, num_chunks=2), *[shape] * 3)
  assert counted.attention == counted.total == 2 * 2 * 2 * 3 * 4 * (6 * 6 + 6 * 12)
