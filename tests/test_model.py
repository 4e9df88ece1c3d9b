"""The network: what it is at init, what sees what, and that its parts are the family's."""

import functools
import json
import math

from flax import nnx
import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2 import build
from m2l2.configs import base
from m2l2.consistency import Consistency
from m2l2.errors import UserError
from m2l2.model import autoencoder, layers, parameters, patches, patchify
from m2l2.model.architecture import Tanh
from m2l2.model.denoiser import noise_features
from m2l2.model.layers import GroupNorm
from m2l2.planning.flops import count_flops
from m2l2.variants import envelope
from m2l2.variants.envelope import deviation, envelope_loss, log_magnitude
from m2l2.variants.fsq import FSQ
from m2l2.variants.slots import join_slots, split_slots

pytestmark = pytest.mark.usefixtures('strict_dtypes')

# `base:debug` in two levels, with the paper's options or every departure from them (ALL).
SHAPE = dict(stem=(4, 2), bins=64, frames=8, widths=(8, 16), head_dim=8, blocks=(1, 1),
             strides=((4, 2),), remat='none')
ALL = dict(channels=2, variants={
    **{f'{name}.on': True for name in ('magnitude_input', 'latent_norm', 'envelope', 'feature_norm')},
    'shortcut.width': 2,
    'denoiser.latents': True, 'denoiser.registers': 2})

# Compiling is what these tests cost, and this halves it.
_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def _network(*, variants=(), **fields):
  config = base.get_config('debug')
  config.model.update({**SHAPE, **fields})
  config.variants.update_from_flattened_dict(dict(variants))
  return build.network(config)


def _random(tree, *, scale=.3):
  """Seeded noise added to every leaf: breaks the zero-initialised projections.

  By numpy, like what else is done here with arrays of many shapes: each shape would be compiled.
  """
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: np.asarray(x) + (rng.normal(size=x.shape) * scale).astype(x.dtype), tree)


def _initial(network):
  """Parameters as `init` draws them, by numpy: `init` itself is compiled for one network only, that of `opening`."""
  rng = np.random.default_rng(0)

  def draw(x, name):
    if name in ('zeros', 'ones'):
      return np.full(x.shape, name == 'ones', x.dtype)
    scale = float(name[7:-1]) if name.startswith('normal') else np.prod(x.shape[:-1]) ** -.5
    return np.asarray(rng.normal(size=x.shape) * scale, x.dtype)

  return jax.tree.map(draw, network.shapes, network.init_names)


def _spec(network, *lead):
  arch = network.arch
  shape = (*lead, arch.bins, arch.frames, 2 * arch.channels)
  return np.asarray(np.random.default_rng(2).normal(size=shape), np.float32)


def _at(x, chunk, value):
  """x [B, S, ...] with one chunk replaced by that of `value`."""
  x = np.array(x)
  x[:, chunk] = value[:, chunk]
  return x


class _Model:
  """A network with parameters that are nowhere zero, its functions compiled once for all tests."""

  def __init__(self):
    self.network = _network(**ALL)
    self.params = _random(_initial(self.network))
    self.encode = _jit(self.network.encode)
    self.decode = _jit(self.network.decode)
    self.denoise = _jit(self.network.denoise)
    self.spec = _spec(self.network, 1, 2)
    self.sigma = np.float32([[.5, 3.]])
    # Numpy, of which slices and differences are no programs.
    self.pre = np.asarray(self.encode(self.params, self.spec))
    self.z = np.tanh(self.pre)
    self.features = jax.tree.map(np.asarray, self.decode(self.params, self.z))
    self.out = np.asarray(self.denoise(self.params, self.spec, self.sigma, self.features))


@pytest.fixture(scope='module')
def model():
  return _Model()


def _differ(a, b):
  """Relative size of a difference."""
  a, b = np.asarray(a), np.asarray(b)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


# --- who sees whom ---


@pytest.mark.parametrize('what', ['x', 'sigma', 'maps', 'z', 'log_magnitude'])
def test_left_never_sees_right_and_right_sees_left(model, what):
  def perturbed(chunk):
    features = dict(model.features)
    x, sigma = model.spec, model.sigma
    if what == 'x':
      x = _at(x, chunk, x * -2)
    elif what == 'sigma':
      sigma = _at(sigma, chunk, sigma * 10)
    else:
      features[what] = jax.tree.map(lambda f: _at(f, chunk, _random(f)), features[what])
    return model.denoise(model.params, x, sigma, features)

  later, earlier = perturbed(1), perturbed(0)
  np.testing.assert_array_equal(later[:, 0], model.out[:, 0])
  assert _differ(later[:, 1], model.out[:, 1]) > 1e-3
  assert _differ(earlier[:, 0], model.out[:, 0]) > 1e-3
  assert _differ(earlier[:, 1], model.out[:, 1]) > 1e-5


def test_one_chunk_call_equals_the_left_half_of_a_pair(model):
  left = jax.tree.map(lambda x: x[:, :1], (model.spec, model.sigma, model.features))
  alone = model.denoise(model.params, *left)
  assert alone.shape == (1, 1, *model.spec.shape[2:])
  alone = np.asarray(alone)
  scale = np.abs(alone).max()
  np.testing.assert_allclose(alone / scale, model.out[:, :1] / scale, atol=1e-5)


def test_positions_tell_left_from_right(model):
  twice = jax.tree.map(lambda x: np.concatenate([x[:, :1]] * 2, axis=1),
                       (model.spec, model.sigma, model.features))
  out = model.denoise(model.params, *twice)
  assert _differ(out[:, 1], out[:, 0]) > 1e-3


@pytest.mark.parametrize('chunk', [0, 1])
def test_encoder_and_decoder_see_one_chunk_only(model, chunk):
  other = 1 - chunk
  pre = model.encode(model.params, _at(model.spec, other, -model.spec))
  np.testing.assert_array_equal(pre[:, chunk], model.pre[:, chunk])
  assert _differ(pre[:, other], model.pre[:, other]) > 1e-3
  features = model.decode(model.params, _at(model.z, other, -model.z))
  for new, old in zip(jax.tree.leaves(features), jax.tree.leaves(model.features), strict=True):
    np.testing.assert_array_equal(new[:, chunk], old[:, chunk])
    assert _differ(new[:, other], old[:, other]) > 1e-3


# --- shapes ---


def test_features_line_up_with_the_denoisers_blocks(model):
  arch = model.network.arch
  assert model.pre.shape == (1, 2, arch.num_latents, arch.latent_dim)
  assert set(model.features) == {'maps', 'z', 'log_magnitude'}
  rows, columns = arch.bins // arch.stem[0], arch.frames // arch.stem[1]
  expected = []
  for level, (width, blocks) in enumerate(zip(arch.widths, arch.blocks)):
    if level:
      rows, columns = rows // arch.strides[level - 1][0], columns // arch.strides[level - 1][1]
    expected += [(1, 2, rows, columns, width)] * blocks
  assert [m.shape for m in model.features['maps']] == expected
  assert (rows, columns) == arch.grid
  assert model.features['log_magnitude'].shape == (1, 2, arch.bins, arch.frames, 2)
  np.testing.assert_allclose([np.mean(np.square(m[0, 0])) for m in model.features['maps']], 1,
                             rtol=1e-2)
  assert model.out.shape == model.spec.shape and model.out.dtype == jnp.float32


def test_bfloat16_runs_close_to_float32(model):
  network = _network(**{**ALL, 'dtype': 'bfloat16'})

  @_jit
  def run(params, spec, sigma):
    pre = network.encode(params, spec)
    features = network.decode(params, jnp.tanh(pre))
    return pre, features, network.denoise(params, spec, sigma, features)

  pre, features, out = run(model.params, model.spec, model.sigma)
  assert pre.dtype == out.dtype == features['log_magnitude'].dtype == jnp.float32
  assert {m.dtype for m in features['maps']} == {jnp.dtype('bfloat16')}
  for low, full in ((pre, model.pre), (out, model.out),
                    *zip(features['maps'], model.features['maps'])):
    assert 1e-5 < _differ(low.astype(jnp.float32), full) < .05


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jex.core.jaxprs_in_params(equation.params):
      yield from _equations(inner)


@pytest.mark.parametrize('tile', ['0', '128'])
def test_sums_of_the_denoiser_are_never_rounded_to_bfloat16(tile):
  """Late in training student and teacher differ by less than that: see launch/research/rounding.py."""
  network = _network(channels=2, widths=(16, 64), dtype='bfloat16', variants={**ALL['variants'], 'packing.tile': tile})
  params = _initial(network)
  spec = jax.ShapeDtypeStruct((1, 2, 64, 8, 4), jnp.float32)
  z = jax.ShapeDtypeStruct((1, 2, 8, 8), jnp.float32)
  sigma = jax.ShapeDtypeStruct((1, 2), jnp.float32)

  def dtypes(function, *args):
    by_dtype = {}
    for equation in _equations(jax.make_jaxpr(function)(*args).jaxpr):
      by_dtype.setdefault(equation.primitive.name, set()).update(str(out.aval.dtype) for out in equation.outvars)
    return {name: by_dtype[name] for name in ('add', 'conv_general_dilated', 'dot_general')}

  features = jax.eval_shape(network.decode, params, z)
  assert 'bfloat16' not in set().union(*dtypes(network.denoise, params, spec, sigma, features).values())
  assert 'bfloat16' in dtypes(network.decode, params, z)['conv_general_dilated']  # of which both have the same


# --- at init, and the first updates ---


class _Opening:
  """The paper's network at init and its gradients over the first updates of plain descent."""

  def __init__(self):
    self.network = network = _network()
    consistency = Consistency()
    spec = _spec(network, 2, 2)
    noise = np.roll(spec, 1, axis=2)
    self.sigma = np.float32([[.3, 80.], [2., .9]])
    self.noisy = spec + self.sigma[:, :, None, None, None] * noise

    def loss(params):
      pre = network.encode(params, spec)
      features = network.decode(params, jnp.tanh(pre))
      out = consistency.denoise(lambda x, s: network.denoise(params, x, s, features),
                                self.noisy, self.sigma)
      return jnp.mean(jnp.square(out - spec)), (pre, out)

    gradient = _jit(jax.grad(loss, has_aux=True))
    # Another generator than in training, as it compiles in no time.
    params = _jit(network.init)(jax.random.key(0, impl='unsafe_rbg'))
    params = jax.tree.map(np.asarray, params)
    self.params, self.opened = params, []
    for step in range(6):
      grads, aux = gradient(params)
      # The sign of the gradient: every parameter that may move moves by the same amount.
      params = jax.tree.map(lambda p, g: p - np.float32(.02) * np.sign(np.asarray(g)), params, grads)
      flat = jax.tree_util.tree_leaves_with_path(grads)
      self.opened.append({jax.tree_util.keystr(path, simple=True, separator='/')
                          for path, g in flat if np.any(np.asarray(g))})
      if not step:
        self.pre, self.out = aux
    self.names = {jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in flat}


@pytest.fixture(scope='module')
def opening():
  return _Opening()


def test_latents_are_exactly_zero_at_init(opening):
  np.testing.assert_array_equal(opening.pre, 0)


def test_output_is_the_skip_path_at_init_for_every_sigma(opening):
  c_skip = Consistency().scalings(opening.sigma[:, :, None, None, None])[0]
  np.testing.assert_allclose(opening.out, c_skip * opening.noisy, rtol=1e-6)


def test_shapes_alone_are_told_without_a_draw():
  """To trace a generator for each parameter was most of the time that loading a model takes."""
  draws = []
  init = parameters.Init('any', lambda key, shape: draws.append(shape) or jnp.ones(shape))

  def shapes():
    make = lambda: nnx.split(layers.Linear(3, 4, axes=('a', 'b'), init=init, rngs=nnx.Rngs(params=jax.random.key(0))))
    return jax.tree.map(jnp.shape, jax.eval_shape(make)[1])  # of a new function: what was traced is not again

  drawn = shapes()
  with parameters.shapes_only():
    assert shapes() == drawn and draws == [(3, 4)]
  assert shapes() == drawn and len(draws) == 2


def test_networks_are_made_so(monkeypatch):
  arch, shown = _network().arch, []
  monkeypatch.setattr(autoencoder, 'Autoencoder',
                      lambda arch, *, rngs: shown.append(parameters._shapes_only.get()) or nnx.Module())
  autoencoder.make_network.__wrapped__(arch)
  assert shown == [True] and not parameters._shapes_only.get()


def test_initial_values_are_what_their_names_say(opening):
  def check(name, value):
    if name == 'zeros':
      assert not np.any(value)
    elif name == 'ones':
      assert np.all(value == 1)
    elif name.startswith('normal'):
      np.testing.assert_allclose(np.std(value), float(name[7:-1]), rtol=5 / math.sqrt(value.size))
    else:
      assert name.startswith('xavier')
      limit = math.sqrt(6 / sum(json.loads(f'[{name[7:-1]}]')))
      assert .9 * limit < np.abs(value).max() <= limit

  jax.tree.map(check, opening.network.init_names, opening.params)
  # Stacked layers are drawn apart.
  kernel = opening.params['decoder']['transformer']['layers']['attention']['qkv']['kernel']
  assert np.all(kernel[0] != kernel[1])


def _in(names, *parts):
  return {name for name in names if all(part in name for part in parts)}


def test_first_update_opens_the_output_conv_alone(opening):
  assert opening.opened[0] == {'denoiser/output/conv_out/kernel', 'denoiser/output/conv_out/bias'}


def test_second_update_opens_the_zero_projections_that_the_output_reaches(opening):
  opened = opening.opened[1]
  names = opening.names
  for part in ('denoiser', 'decoder'):
    zeros = (_in(names, part, 'conv2/kernel') | _in(names, part, 'attention/out')
             | _in(names, part, 'mlp/out/kernel') | _in(names, part, 'depatchifier', '_up/kernel'))
    assert len(zeros) >= 5 and zeros <= opened
    # What lies behind a projection that is still zero waits.
    assert not _in(opened, part, 'conv1') and not _in(opened, part, 'qkv')
    assert not _in(opened, part, 'mlp/inner')
  assert _in(opened, 'denoiser/gains/head') and not _in(opened, 'encoder')
  assert not _in(opened, 'denoiser/embedding') and not _in(opened, 'denoiser/gains/linear')


def test_third_update_opens_the_way_to_the_latents(opening):
  opened = opening.opened[2]
  assert {'decoder/latents_in/kernel', 'encoder/head/kernel'} & opened == {'encoder/head/kernel'}
  assert _in(opened, 'encoder') == {'encoder/head/kernel', 'encoder/head/bias'}
  assert _in(opened, 'decoder', 'qkv') and _in(opened, 'denoiser', 'conv1')


def test_soon_every_parameter_learns(opening):
  assert len(_in(opening.opened[3], 'encoder/')) > 2
  assert opening.opened[5] == opening.names


# --- parts ---


def test_noise_embedding_vectors():
  got = np.asarray(noise_features(jnp.asarray([[.002, .5, 80.]]), width=512))[0]
  assert got.shape == (3, 512) and got.dtype == np.float32
  angles = [-1.553652, -.173287, 1.095507]
  np.testing.assert_allclose(got[:, 0], [-.999853, -.172421, .889160], atol=1e-5)
  np.testing.assert_allclose(got[:, 255], np.multiply(angles, 1e-4), rtol=1e-3)
  np.testing.assert_allclose(got[:, 256], np.cos(angles), atol=1e-5)
  np.testing.assert_allclose(got[:, 511], 1, atol=1e-6)


def test_tanh_bottleneck():
  np.testing.assert_allclose(Tanh()(jnp.asarray([0., 1., -20.])), [0, .761594, -1], atol=1e-6)


def test_fsq_vectors():
  fsq = FSQ(levels=11)
  pre = jnp.asarray([[0., .54, .56, 3., -3.]])
  continuous = fsq(pre)
  np.testing.assert_allclose(continuous, .999 * np.tanh(pre), rtol=1e-6)
  np.testing.assert_allclose(continuous[0, 3], .99406, atol=1e-5)
  np.testing.assert_allclose(fsq.quantise(continuous), [[0, .4, .6, 1, -1]], atol=1e-6)


def test_fsq_tokens_round_trip_over_the_whole_codebook():
  fsq = FSQ(levels=11)
  tokens = jnp.arange(14641).reshape(121, 121)
  codes = fsq.codes(tokens, width=4)
  assert codes.shape == (121, 121, 4) and codes.min() == -1 and codes.max() == 1
  np.testing.assert_array_equal(fsq.tokens(codes), tokens)
  np.testing.assert_array_equal(fsq.quantise(codes), codes)
  digits = np.round(np.asarray(codes[-1, -2]) * 5 + 5)  # token 14639
  np.testing.assert_array_equal(digits, [9, 10, 10, 10])
  assert 14639 == digits @ [1, 11, 121, 1331]


def test_fsq_dropout_leaves_items_unrounded_at_random_and_passes_gradients():
  fsq = FSQ(levels=11, dropout=.75)
  pre = jnp.asarray(np.random.normal(size=(400, 2, 3)), jnp.float32)
  keys = jax.random.split(jax.random.key(0), 400)
  z = fsq(pre, keys=keys)
  loose = np.all(np.isclose(z, fsq.continuous(pre), atol=1e-6), axis=(1, 2))
  tight = np.all(np.isclose(z, fsq.quantise(fsq.continuous(pre)), atol=1e-6), axis=(1, 2))
  assert np.all(loose ^ tight)  # an item is one or the other, whole
  np.testing.assert_allclose(loose.mean(), .75, atol=.06)
  grad = jax.grad(lambda x: jnp.sum(fsq(x, keys=keys)))(pre)
  np.testing.assert_allclose(grad, .999 * (1 - np.tanh(pre)**2), rtol=1e-4, atol=1e-6)


def test_group_norm_groups_and_condition():
  x = jnp.asarray(np.random.normal(size=(2, 4, 3, 16)) * 3 + 1, jnp.float32)
  rngs = nnx.Rngs(0)
  y = np.asarray(GroupNorm(16, rngs=rngs)(x)).reshape(2, 12, 4, 4)
  np.testing.assert_allclose(y.mean(axis=(1, 3)), 0, atol=1e-5)
  np.testing.assert_allclose(y.std(axis=(1, 3)), 1, atol=1e-4)
  assert [GroupNorm(dim, rngs=rngs).groups for dim in (2, 8, 64, 128, 512)] == [1, 2, 16, 32, 32]
  conditioned = GroupNorm(16, cond_dim=4, rngs=rngs)
  np.testing.assert_allclose(conditioned(x, jnp.ones((2, 4))), y.reshape(x.shape), atol=1e-6)
  conditioned.scale.cond.kernel[...] = jnp.ones((4, 16))
  doubled = conditioned(x, jnp.asarray([[.25] * 4, [0.] * 4]))
  np.testing.assert_allclose(doubled, y.reshape(x.shape) * np.array([2, 1]).reshape(2, 1, 1, 1),
                             atol=1e-5)


def test_downsample_is_a_patch_mean_plus_a_strided_conv():
  down = patchify.Downsample(4, 8, stride=(4, 2), rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.normal(size=(2, 8, 6, 4)), jnp.float32)
  mean = np.asarray(x).reshape(2, 2, 4, 3, 2, 4).mean((2, 4))
  np.testing.assert_allclose(down(x), np.repeat(mean, 2, axis=-1), atol=1e-6)
  kernel = jnp.asarray(np.random.normal(size=(4, 2, 4, 8)), jnp.float32)
  down.kernel[...] = kernel
  conv = jax.lax.conv_general_dilated(down.norm(x), kernel, (4, 2), 'VALID',
                                      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  np.testing.assert_allclose(down(x) - np.repeat(mean, 2, axis=-1), conv, atol=1e-4)


def test_upsample_is_replication_plus_a_transposed_conv():
  up = patchify.Upsample(8, 4, stride=(4, 2), rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.normal(size=(2, 3, 2, 8)), jnp.float32)
  fixed = np.asarray(x).reshape(2, 3, 2, 4, 2).mean(-1).repeat(4, 1).repeat(2, 2)
  np.testing.assert_allclose(up(x), fixed, atol=1e-6)
  kernel = jnp.asarray(np.random.normal(size=(4, 2, 8, 4)), jnp.float32)
  up.kernel[...] = kernel
  conv = jax.lax.conv_transpose(up.norm(x), kernel[::-1, ::-1], (4, 2), 'VALID',
                                dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  # lax.conv_transpose correlates; without overlap that is the kernel mirrored in each patch.
  np.testing.assert_allclose(up(x) - fixed, conv[:, :12, :4], atol=1e-4)


@pytest.mark.parametrize('stem', [(1, 1), (4, 2)])
def test_stem_folds_patches_and_unfolds_them(stem):
  x = jnp.arange(2 * 8 * 4 * 3, dtype=jnp.float32).reshape(2, 8, 4, 3)
  folded = patches.space_to_depth(x, stem)
  assert folded.shape == (2, 8 // stem[0], 4 // stem[1], 3 * math.prod(stem))
  np.testing.assert_array_equal(patches.depth_to_space(folded, stem), x)
  patch = x[0, :stem[0], :stem[1]].reshape(-1)
  np.testing.assert_array_equal(folded[0, 0, 0], patch)


def test_token_grids():
  grid = lambda **fields: build.network({'model': {**base.get_config().model, **fields}}).arch.grid
  assert grid() == (64, 8)
  assert grid(frames=32, strides=((2, 2), (4, 1), (2, 2))) == (64, 8)
  with pytest.raises(UserError, match='does not divide 1000 x 64'):
    grid(bins=1000)


def test_envelope_of_two_channels_and_of_silence():
  spec = np.float32([3., 4., 0., 0.]).reshape(1, 1, 1, 1, 4)
  levels = np.asarray(_jit(log_magnitude)(spec))
  assert levels.shape == (1, 1, 1, 1, 2) and levels[..., 0] > levels[..., 1]
  errors = np.asarray(_jit(envelope_loss)(np.concatenate([levels, levels - np.float32(.5)], axis=1),
                                          np.concatenate([spec, spec], axis=1)))
  assert errors.shape == (1, 2) and errors[0, 0] == 0 and errors[0, 1] > .1  # per chunk
  got = np.asarray(_jit(deviation)(levels))[0, 0, 0, 0]
  assert got[0] == got[1] > 1 and np.all(got[2:] == np.float32(.004))


@pytest.mark.parametrize('bins, bands', [
  (512, 192), (512, 512), (64, 5), (7, 1), (1024, 128), (1024, 1), (1024, 2), (512, 3)])
def test_bands_widen_from_one_bin(bins, bands):
  edges = envelope.band_edges(bins, bands)
  widths = np.diff(edges)
  assert (edges[0], edges[-1], len(edges)) == (0, bins, bands + 1) and widths.min() >= 1
  if bins == 512 and bands == 192:
    assert widths[:9].max() == 1 and np.all(np.diff(widths.reshape(6, 32).sum(axis=1)) > 0) and widths[-1] > 5


def test_band_means_and_their_spreading():
  x = np.random.default_rng(0).normal(size=(2, 64, 12, 3)).astype(np.float32)
  cells = envelope.band_means(x, (10, 4, 3))
  edges = envelope.band_edges(64, 10)
  np.testing.assert_allclose(cells[1, 7, 2, 0], x[1, edges[7]:edges[8], 6:9, 0].mean(), rtol=1e-5)
  again = envelope.spread_bands(cells, 64, 12)
  assert again.shape == x.shape
  np.testing.assert_array_equal(again[1, edges[7]:edges[8], 6:9, 0], np.broadcast_to(cells[1, 7, 2, 0], again[
      1, edges[7]:edges[8], 6:9, 0].shape))
  np.testing.assert_allclose(envelope.band_means(again, (10, 4, 3)), cells, rtol=1e-5, atol=1e-6)


def test_a_linear_sketch_undoes_the_tanh():
  sketch = envelope.EnvelopeSketch((2, 3), (5, 2, 1), bins=16, frames=4, rngs=nnx.Rngs(params=0))
  pre = np.float32(np.random.default_rng(0).normal(size=(4, 2, 3)))
  graph, state = nnx.split(sketch)
  run = _jit(lambda z: nnx.merge(graph, state)(z))
  sketch = lambda z: np.asarray(run(z))
  got = sketch(np.tanh(pre)) - sketch(np.zeros_like(pre))
  np.testing.assert_allclose(got, 2 * (sketch(np.tanh(pre / 2)) - sketch(np.zeros_like(pre))), rtol=1e-4, atol=1e-5)
  assert np.isfinite(sketch(np.ones_like(pre))).all()


def test_bands_count_alike_in_the_envelope_loss():
  spec = np.ones((1, 1, 64, 4, 2), np.float32)
  edges = envelope.band_edges(64, 10)
  wrong = [np.array(_jit(log_magnitude)(spec)) for _ in range(2)]
  for x, i in zip(wrong, (0, 9), strict=True):
    assert x.shape == (1, 1, 64, 4, 1)
    x[:, :, edges[i]:edges[i + 1]] += 1
  loss = _jit(envelope_loss, static_argnames='bands')
  low, high = (float(np.asarray(loss(x, spec, bands=10))[0, 0]) for x in wrong)
  assert low == pytest.approx(high, rel=1e-5) and low > 0
  low, high = (float(np.asarray(loss(x, spec))[0, 0]) for x in wrong)
  assert low < high / 5


def test_envelope_loss_finds_the_deviation_of_gaussian_data():
  spec = jnp.asarray(np.random.normal(size=(1, 1, 100, 100, 2)) * 1.5, jnp.float32)
  scales = np.linspace(.5, 5, 200)
  levels = np.asarray(log_magnitude(jnp.asarray(np.stack([scales, 0 * scales], axis=-1), jnp.float32)))
  loss = _jit(lambda level: envelope_loss(jnp.broadcast_to(level, (1, 1, 100, 100, 1)), spec))
  best = levels[np.argmin([loss(level) for level in levels])]
  np.testing.assert_allclose(deviation(best), 1.5, rtol=.04)


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_codicodec_has_the_parameter_counts_of_the_original():
  config = base.get_config('stereo')
  config.model.update(hop=1024, frames=32, transform='component', edges='none', num_latents=128, latent_dim=4,
                      strides=((2, 2), (4, 1), (2, 2)))
  config.variants.update(fsq={'on': True}, denoiser={'latents': True, 'registers': 8})
  network = build.network(config)
  params = network.shapes
  encoder, decoder, denoiser = (params[name] for name in ('encoder', 'decoder', 'denoiser'))
  # Theirs, less what they store and never use (the transformers' linear_input and so on).
  expected = {
    'emb_proj': (787_968, denoiser['embedding']), 'latents': (65_536, encoder['queries']),
    'mask_embedding': (32_768, decoder['mask']), 'gain_encoder': (1_024, encoder['gain']),
    'gain_decoder': (1_575_936, denoiser['gains']),
    'frontend_encoder_down': (10_056_256, encoder['patchifier']),
    'more_latents': (3 * 4_096, [part['registers'] for part in (encoder, decoder, denoiser)]),
    'encoder': (32_070_148 - 262_656, [encoder['transformer'], encoder['head']]),
    'encoder without linears': (31_805_440, encoder['transformer']),
    'lat2patch_pre_decoder': (2_560, decoder['latents_in']),
    'pre_decoder': (32_330_752 - 2 * 262_656 - 512, decoder['transformer']),
    'frontend_pre_decoder_up': (10_056_708 - 64 - 2_308, decoder['depatchifier']),
    'lat2patch': (2_560, denoiser['latents_in']),
    'frontend_decoder_down': (11_006_528, denoiser['patchifier']),
    'decoder': (39_478_272 - 2 * 262_656, denoiser['transformer']),
    'frontend_decoder_up': (11_039_748, [denoiser['depatchifier'], denoiser['output']])}
  assert {name: _count(tree) for name, (_, tree) in expected.items()} == {
    name: count for name, (count, _) in expected.items()}
  assert decoder['transformer']['positions'].shape == (1, 648, 512)
  assert denoiser['transformer']['positions'].shape == (2, 648, 512)
  assert _count(params) == 148_519_052 - 5 * 262_656 - 512 - 64 - 2_308


@pytest.mark.parametrize('remat, kinds', [('none', set()), ('products', {1}), ('blocks', {1}), ('full', {1, 2})])
def test_remat_wraps_what_it_says(remat, kinds):
  network = _network(remat=remat)
  params = network.shapes
  jaxpr = jax.make_jaxpr(network.encode)(params, _spec(network, 1, 1)).jaxpr
  depths = set()

  def walk(jaxpr, depth):
    for eqn in jaxpr.eqns:
      inner = depth + (eqn.primitive.name in ('remat', 'remat2', 'checkpoint'))
      if inner > depth:
        depths.add(inner)
      for value in eqn.params.values():
        value = getattr(value, 'jaxpr', value)
        if hasattr(value, 'eqns'):
          walk(value, inner)

  walk(jaxpr, 0)
  assert depths == kinds


def test_products_are_kept_and_blocks_computed_again():
  """FLOPs of an update of the encoder: with 'products' only attention's own logits are multiplied twice."""
  flops = {}
  for remat in ('none', 'products', 'blocks'):
    network = _network(remat=remat)
    params = network.shapes
    loss = lambda params, spec, network=network: jnp.sum(network.encode(params, spec))
    flops[remat] = count_flops(jax.make_jaxpr(jax.grad(loss))(params, _spec(network, 1, 1)).jaxpr)
  none, products, blocks = (flops[remat] for remat in flops)
  assert products.convolutions == none.convolutions and products.products == none.products
  assert none.attention < products.attention <= blocks.attention
  assert blocks.convolutions > 1.1 * none.convolutions and blocks.products > 1.1 * none.products


# --- ablations ---


def test_local_embeddings_belong_to_their_slot_of_frames():
  network = _network(variants={'local_embeddings.on': True, 'denoiser.latents': True})
  assert network.arch.slots == 2 and network.arch.grid == (4, 2)  # 8 embeddings: 4 for each half of the frames
  params = _initial(network)
  for part in ('encoder', 'decoder'):  # convolutions stay as they begin, which reach one frame of the stem
    params[part]['transformer'] = _random(params[part]['transformer'])
  params['encoder']['head'] = _random(params['encoder']['head'])
  spec = _spec(network, 1, 2)
  encode, decode = _jit(network.encode), _jit(network.decode)
  louder = np.array(spec)
  louder[:, 0, :, -1] *= -3
  pre, late = (np.asarray(encode(params, given)) for given in (spec, louder))
  np.testing.assert_array_equal(late[0, 0, :4], pre[0, 0, :4])
  assert _differ(late[0, 0, 4:], pre[0, 0, 4:]) > 1e-3
  assert _differ(pre[0, 0, 4:], pre[0, 0, :4]) > 1e-3
  z = np.tanh(pre)
  turned = z.copy()
  turned[0, 0, 5] *= -1
  maps, changed = (np.asarray(decode(params, given)['maps'][-1]) for given in (z, turned))
  np.testing.assert_array_equal(changed[0, 0, :, 0], maps[0, 0, :, 0])
  assert _differ(changed[0, 0, :, 1], maps[0, 0, :, 1]) > 1e-4


def test_slots_are_split_and_joined():
  x = jnp.arange(2 * 12 * 3.).reshape(2, 12, 3)
  slots = split_slots(x, (2, 6), 3)
  assert slots.shape == (6, 4, 3)
  np.testing.assert_array_equal(slots[1], x[0, jnp.asarray([2, 3, 8, 9])])  # frames 2 and 3 of both rows
  np.testing.assert_array_equal(join_slots(slots, (2, 6), 3), x)


def test_without_cross_connections_only_the_latents_tell_the_denoiser():
  variants = {'no_cross_connections.on': True, 'denoiser.latents': True}
  network = _network(variants=variants)
  params = _random(_initial(network))
  assert set(params) == {'encoder', 'denoiser'}
  spec, sigma = _spec(network, 1, 2), np.float32([[.5, 3.]])
  z = np.full((1, 2, 8, network.arch.latent_dim), .5, np.float32)
  assert set(network.decode(params, z)) == {'z'}
  denoise = _jit(network.denoise)
  out = denoise(params, spec, sigma, {'z': z})
  assert _differ(denoise(params, spec, sigma, {'z': 0 * z}), out) > 1e-4
  with_envelope = _network(variants={**variants, 'envelope.on': True})
  shapes = jax.eval_shape(with_envelope.decode, with_envelope.shapes,
                          jax.ShapeDtypeStruct((1, 2, 8, with_envelope.arch.latent_dim), jnp.float32))
  assert set(shapes) == {'z', 'log_magnitude'}


@pytest.mark.parametrize('fields, message', [
    (dict(variants={'local_embeddings.on': True}, num_latents=3), 'to have a common factor'),
    (dict(variants={'no_cross_connections.on': True}), 'needs variants.denoiser.latents')])
def test_ablations_that_cannot_work(fields, message):
  with pytest.raises(build.UserError, match=message):
    _network(**fields)


def test_a_variant_that_a_config_does_not_name_is_off():
  config = base.get_config('debug')
  assert build.network({'model': config.model}).arch == build.network(config).arch


def test_by_shortcuts_any_place_moves_any_latent_from_the_start():
  """The transformers' outputs are 0 then, so what moves goes by the shortcuts alone."""
  network = _network(variants={'shortcut.width': 4})
  params, spec = _initial(network), _spec(network, 1, 1)
  encode, decode = _jit(network.encode), _jit(network.decode)
  first = np.asarray(encode(params, spec))
  for place in ((0, 0), (-1, -1)):
    other = spec.copy()
    other[0, 0, place[0], place[1]] += 3
    assert np.all(np.abs(np.asarray(encode(params, other)) - first) > 1e-7)
  coarsest = lambda z: np.asarray(decode(params, z)['maps'][-1])
  other = first.copy()
  other[0, 0, -1, -1] += 1
  change = coarsest(other) - coarsest(first)
  assert np.all(np.max(np.abs(change), axis=-1) > 1e-7)
