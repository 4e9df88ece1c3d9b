"""Norms, SiLU and products with gradients of their own against the definitions and what JAX derives from these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2.kernels import norms
from m2l2.kernels.contraction import contract

EPS = 1e-4


def draw(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def agree(ours, plain, *calls):
  """Values, and the gradients of a weighted sum of them in all arguments, for each of some lists of arguments."""
  def total(function):
    def run(*args):
      return sum(jnp.sum(jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) * x)
                 for x in jax.tree.leaves(function(*args)))
    return run

  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
  every = tuple(range(len(calls[0])))
  both = [jax.jit(lambda *args, f=f: (f(*args), jax.grad(total(f), every)(*args))) for f in (ours, plain)]
  for args in calls:
    jax.tree.map(close, *(run(*args) for run in both))


def plain_rows(x, scale, centred):
  x = x - x.mean(-1, keepdims=True) if centred else x
  return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS) * scale


@pytest.mark.parametrize('centred', [True, False])
@pytest.mark.parametrize('shape', [(1, 1, 1, 6), (2, 3, 1, 6)])  # a gain of its own, or one a chunk
def test_norms_of_rows(centred, shape):
  ours = norms.layer_norm if centred else norms.rms_norm
  x, scale = draw((2, 3, 5, 6), shape)
  agree(lambda x, s: ours(x, s, eps=EPS), lambda x, s: plain_rows(x, s, centred), (x, scale), (x + 3, scale))


@pytest.mark.parametrize('items', [1, 3])
@pytest.mark.parametrize('packed', [1, 2])
def test_norm_of_groups(items, packed):
  """Groups are shared by places that lie side by side in the channels; a mean far from 0 loses nothing."""
  def plain(x, scale):
    y = x.reshape(*x.shape[:3], packed, 2, 4)
    y = y - y.mean((1, 2, 3, 5), keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 2, 3, 5), keepdims=True) + EPS)
    return y.reshape(x.shape) * jnp.tile(scale, (1, packed))[:, None, None]

  x, scale = draw((3, 4, 5, 8 * packed), (items, 8))
  agree(lambda x, s: norms.group_norm(x, s, groups=2, eps=EPS), plain, (x + 3, scale))


def test_silu_and_its_gate():
  agree(norms.silu, lambda x: x / (1 + jnp.exp(-x)), draw((4, 7)))
  agree(norms.swiglu_product, lambda a, b, w: (jax.nn.silu(a) * b) @ w, draw((3, 5), (3, 5), (5, 4)))


def test_what_swiglu_stores_is_half_precision():
  arrays = draw((3, 64), (3, 64))
  kernel = draw((64, 8))[0].astype(jnp.bfloat16)
  _, pull = jax.vjp(lambda a, b: norms.swiglu_product(a, b, kernel, jnp.bfloat16), *arrays)
  stored = [x for x in jax.tree.leaves(pull) if x.shape == (3, 64)]
  assert [x.dtype for x in stored] == [jnp.bfloat16] * 2  # a and b; not what they make
  assert all(gradient.dtype == jnp.float32 for gradient in pull(jnp.ones((3, 8))))


def test_heads_are_normalised_one_by_one():
  agree(lambda x, gain: norms.head_norm(x, gain, eps=EPS),
        lambda x, gain: plain_rows(x, gain.reshape(1, 1, 1, -1), False), draw((2, 5, 3, 4), (4,)))


@pytest.mark.parametrize('x,kernel,axes', [
    ((2, 3, 4), (4, 5), 1), ((2, 3, 4), (4, 2, 3), 1), ((2, 3, 4, 5), (4, 5, 6), 2)])
def test_products(x, kernel, axes):
  agree(lambda x, w: contract(x, w, axes), lambda x, w: jnp.tensordot(x, w, axes), draw(x, kernel))


def test_half_precision_stays_what_it_is():
  x, scale, kernel = draw((2, 3, 5, 8), (1, 1, 1, 8), (8, 4))
  x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
  for function, args in ((lambda x, s: norms.layer_norm(x, s, eps=EPS), (x, scale)), (contract, (x, kernel)),
                         (lambda x, s: norms.group_norm(x, s[0, 0], groups=2, eps=EPS), (x, scale))):
    out, pull = jax.vjp(jax.jit(function), *args)
    assert out.dtype == jnp.bfloat16 and [g.dtype for g in pull(out)] == [a.dtype for a in args]
