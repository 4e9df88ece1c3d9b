"""Packed maps: the same network with its narrow levels rearranged, piece by piece and whole."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_codec import make_params

from m2l2 import build
from m2l2.configs import base
from m2l2.errors import UserError
from m2l2.model.patches import depth_to_space, space_to_depth
from m2l2.variants import packing

PACKS = [(1, 2), (2, 1), (2, 2)]


def conv(x, kernel, padding):
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def draw(*shape):
  return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('pack', PACKS)
def test_two_convolutions_of_packed_places_are_two_of_plain_ones(pack):
  @jax.jit  # op by op, each would be a program
  def both(x, first, second):
    plain = conv(conv(x, first, 'SAME'), second, 'SAME')
    packed = space_to_depth(x, pack)
    between = conv(packed, packing.packed_kernel(first, pack), ((1, 1), (1, 1)))
    between = packing.clear_edges(between, pack)
    inward = [(0, 0) if p > 1 else (1, 1) for p in pack]
    out = conv(between, packing.packed_kernel(second, pack), inward)
    return depth_to_space(out, pack), plain

  packed_output, plain = both(draw(2, 6, 8, 5), draw(3, 3, 5, 4), draw(3, 3, 4, 3))
  np.testing.assert_allclose(packed_output, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('pack', PACKS)
def test_from_plain_to_packed_and_between_aligned_places(pack):
  @jax.jit
  def all_three(x, kernel):
    plain = conv(x, kernel, 'SAME')
    windows = packing.windows(x, pack)
    entered = windows @ packing.window_kernel(kernel, pack).reshape(windows.shape[-1], -1)
    aligned = conv(space_to_depth(x, pack), packing.packed_kernel(kernel, pack, aligned=True), ((1, 1), (1, 1)))
    return plain, depth_to_space(entered, pack), depth_to_space(aligned, pack)

  plain, *others = all_three(draw(2, 6, 8, 5), draw(3, 3, 5, 4))
  for output in others:
    np.testing.assert_allclose(output, plain, rtol=1e-5, atol=1e-5)


def test_frames_are_packed_first_and_only_what_the_next_stride_divides():
  chosen = [packing.pack_of(width, tile=tile, stride=stride) for width, tile, stride in (
      (64, 128, (2, 2)), (64, 256, (2, 2)), (128, 128, (4, 2)), (128, 256, (4, 2)), (64, 0, (2, 2)), (32, 128, (4, 1)),
      (96, 128, (2, 2)))]
  assert chosen == [(1, 2), (2, 2), (1, 1), (1, 2), (1, 1), (2, 1), (1, 1)]


def away_from_zero(params):
  """Zero-initialised layers would hide half of a network."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1) * rng.standard_normal(x.shape, np.float32), params)


def assert_close(wanted, actual, rtol):
  for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(actual), strict=True):
    assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(a)


def test_the_whole_network():
  config = base.get_config('debug')
  config.model.update(layers=1, head_dim=8, widths=(8, 16), blocks=(1, 1), strides=((4, 4),))
  config.variants.envelope.on = True
  plain, packed = (build.network({**config, 'variants': {**config.variants, 'packing': {'tile': tile}}})
                   for tile in ('0', '128'))
  params = make_params(config)
  spec = draw(1, 2, plain.arch.bins, plain.arch.frames, 2 * plain.arch.channels)

  def outcome(network, params, spec):
    z = jnp.tanh(network.encode(params, spec))
    features = network.decode(params, z)
    return z, features['log_magnitude'], network.denoise(params, spec, jnp.array([[1.0, 0.5]]), features)

  assert_close(*(jax.jit(functools.partial(outcome, network))(params, spec) for network in (plain, packed)), rtol=1e-5)


@pytest.mark.soak
def test_gradients_through_both_ladders():
  shape = dict(widths=(16, 32, 64), blocks=(1, 1, 1), strides=((2, 2), (4, 2)), remat='none')

  def gradients(tile):
    packs = packing.ladder_packs(shape['widths'], shape['strides'], tile=tile)
    up = packing.PackedDePatchifier(grid=(2, 2), packs=packs, rngs=nnx.Rngs(1), **shape)
    down = packing.PackedPatchifier(2, stem=(1, 1), packs=packs, rngs=nnx.Rngs(0), **shape)
    head = packing.PackedOutputHead(16, 2, stem=(1, 1), pack=packs[0], rngs=nnx.Rngs(2))
    graph, params = nnx.split((down, up, head))

    def loss(params, x):
      down, up, head = nnx.merge(graph, params)
      tokens, maps = down(x, gain=jnp.linspace(0.5, 1.5, 16))
      out, _ = up(tokens, features=maps)
      return jnp.mean(jnp.square(head(out) - x))

    params = away_from_zero(nnx.to_pure_dict(params))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, draw(2, 16, 8, 2))

  assert_close(*(gradients(tile) for tile in (0, 64)), rtol=1e-5)


def test_a_width_that_is_none_is_refused():
  with pytest.raises(UserError, match=r"^variants.packing.tile is 'wide'; choose from \('auto', 0, 128, 256\)"):
    build.network({**base.get_config('debug'), 'variants': {'packing': {'tile': 'wide'}}})
