"""One update: its rules on a toy network that compiles at once, then the real one.

The toy is linear in a handful of numbers; everything around it is the real step.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from m2l2 import build
from m2l2.configs import nano
from m2l2.consistency import Consistency
from m2l2.model.architecture import Tanh
from m2l2.model.autoencoder import Network
from m2l2.representation import Representation
from m2l2.training import probe, train_step
from m2l2.variants import envelope, objective
from m2l2.variants.consistency import VariantConsistency

# Compiling is what these tests cost, and this halves it.
_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

REPRESENTATION = Representation(window=64, hop=16, bins=32, frames=4)
SHAPE = (32, 4, 2)


def _toy_init(key):
  keys = jax.random.split(key, 4)
  draw = lambda k, *shape: .3 * jax.random.normal(k, shape)
  return {'encoder': {'w': draw(keys[0], 2, 3)}, 'decoder': {'w': draw(keys[1], 3, 2)},
          'denoiser': {'w': draw(keys[2], 2, 2), 'cond': draw(keys[3], 2)}}


def _toy_encode(params, spec):
  return jnp.einsum('bsftc,cz->bsz', jnp.abs(spec), params['encoder']['w'])[:, :, None] / 32


def _toy_decode(params, z):
  maps = jnp.einsum('bslz,zc->bsc', z, params['decoder']['w'])[:, :, None, None]
  level = jnp.broadcast_to(maps[..., :1], (*z.shape[:2], *SHAPE[:2], 1))
  return {'maps': (maps,), 'log_magnitude': level}


def _toy_denoise(params, x, sigma, features):
  cond = jnp.log(sigma)[:, :, None, None, None] * params['denoiser']['cond'].reshape(1, 1, 1, 1, 2)
  return x @ params['denoiser']['w'] + cond + features['maps'][0]


TOY = Network(arch=types.SimpleNamespace(chunks=2, make_bottleneck=Tanh), init=_toy_init,
              encode=_toy_encode, decode=_toy_decode, denoise=_toy_denoise, logical_axes={},
              init_names={}, shapes={})


def _functions(*, network=TOY, **fields):
  run = {'optimizer': optax.sgd(1.), 'schedule': lambda n: jnp.float32(1), 'ema_max': .9999, 'seed': 0,
         'accumulate': 1, 'native_rates': (44100,)}
  run |= {name: fields.pop(name) for name in list(fields) if name in (*run, 'ravel', 'reduction')}
  return train_step.make_step_functions(objective.VariantObjective(**{
    'network': network, 'representation': REPRESENTATION, 'consistency': Consistency(), 'steps': 10,
    'envelope_weight': 1., 'head_start_task': 'envelope', **fields}), **run)


def _batch(size=16, functions=None, seed=0):
  samples = functions.crop_samples if functions else REPRESENTATION.crop_samples(2)
  rng = np.random.default_rng(seed)
  # Loud and quiet items, so that it shows which item met which noise.
  audio = rng.normal(size=(size, 1, samples)) * np.geomspace(.01, .5, size)[:, None, None]
  return {'audio': jnp.asarray(audio, jnp.float32)}


@pytest.fixture(scope='module')
def toy():
  functions = _functions()
  step = _jit(functions.train_step)
  state = _jit(functions.init)(jax.random.key(0))
  return types.SimpleNamespace(step=step, spread=_spread(_functions(accumulate=2)), loss=_loss(functions), state=state,
                               batch=_batch(), after=step(state, _batch()))


def _spread(functions):
  """The update on eight devices."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  step = _jit(functions.train_step, in_shardings=(whole, rows), out_shardings=whole)
  return lambda state, batch: step(jax.device_put(state, whole), jax.device_put(batch, rows))


_analyse = _jit(REPRESENTATION.analyse)


@_jit
def _drawn(item):
  """What an item's first step draws: (noise of a pair, levels)."""
  step_key = jax.random.fold_in(jax.random.key(0), 0)
  level_key, noise_key, _ = jax.random.split(jax.random.fold_in(step_key, item), 3)
  noise = jax.random.normal(noise_key, (2, *REPRESENTATION.chunk_shape))
  return noise, Consistency().sample_levels(level_key, chunks=2, progress=0.)


def _loss(functions):
  """The loss alone of an update: gradients that nobody reads are not compiled."""
  return _jit(lambda state, batch: functions.train_step(state, batch)[1]['loss/consistency'])


def _close(got, want, *, tolerance=1e-5):
  """Trees that agree, each leaf relative to its own size."""
  def check(a, b):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1e-6), rtol=tolerance)
  jax.tree.map(check, got, want)


def _same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


def _gradients(before, after):
  """What plain descent at rate 1 has subtracted."""
  return jax.tree.map(np.subtract, before.params, after.params)


def test_the_loss_is_the_papers(toy):
  # Written out item by item, in numpy: one noise for both levels, a level for each chunk, features once.
  params = jax.tree.map(np.asarray, toy.state.params)
  losses = []
  for item, x in enumerate(np.asarray(_analyse(toy.batch['audio']))):
    noise, levels = jax.tree.map(np.asarray, _drawn(item))
    z = np.tanh(np.einsum('sftc,cz->sz', np.abs(x), params['encoder']['w']) / 32)
    feature = z @ params['decoder']['w']
    for s in range(2):
      sides = []
      for sigma in (levels[0][s], levels[1][s]):
        c_skip = .25 / ((sigma - .002)**2 + .25)
        c_out, c_in = .5 * (sigma - .002) / np.sqrt(sigma**2 + .25), 1 / np.sqrt(sigma**2 + .25)
        noisy = x[s] + sigma * noise[s]
        network = (c_in * noisy) @ params['denoiser']['w'] + feature[s][None, None] + (
          np.log(sigma) * params['denoiser']['cond'])[None, None]
        sides.append(c_skip * noisy + c_out * network)
      c = .00054 * 256**.5
      distance = np.sqrt(np.sum(np.square(sides[0] - sides[1])) + c**2) - c
      losses.append(distance / (levels[0][s] - levels[1][s]))
  _close(toy.after[1]['loss/consistency'], np.mean(losses), tolerance=1e-4)


# --- randomness, devices, microbatches ---


def test_same_state_and_batch_give_the_same_bits(toy):
  _same(toy.step(toy.state, toy.batch), toy.after)


def test_the_step_and_the_seed_change_the_noise(toy):
  later = dataclasses.replace(toy.state, step=jnp.int32(1))
  other = _loss(_functions(seed=1))
  losses = [float(loss(state, toy.batch)) for loss, state in (
    (toy.loss, toy.state), (toy.loss, later), (other, toy.state))]
  assert len(set(losses)) == 3 and np.ptp(losses) > 1e-3
  _close(losses[0], toy.after[1]['loss/consistency'])


def test_microbatches_cost_no_further_copy_of_the_parameters():
  width = 512

  def init(key):
    keys = jax.random.split(key, 2)
    return {**_toy_init(keys[0]), 'wide': {'w': jax.random.normal(keys[1], (width, width))}}

  def decode(params, z):
    wide = jnp.tanh(jnp.repeat(z, width // 2, axis=-1)[..., :width] @ params['wide']['w'])
    features = _toy_decode(params, z)
    return {**features, 'maps': (features['maps'][0] + jnp.mean(wide),)}

  def temporaries(accumulate):
    functions = _functions(network=dataclasses.replace(TOY, init=init, decode=decode), accumulate=accumulate)
    state = jax.eval_shape(functions.init, jax.random.key(0))
    batch = jax.eval_shape(functools.partial(_batch, 4 * accumulate))  # microbatches of one size
    step = _jit(functions.train_step, donate_argnums=0).lower(state, batch).compile()
    return step.memory_analysis().temp_size_in_bytes

  assert temporaries(4) < temporaries(1) + 2 * width**2  # half a copy


def test_eight_devices_and_microbatches_make_the_same_update(toy):
  state, metrics = toy.spread(toy.state, toy.batch)
  assert len(metrics['loss'].devices()) == 8
  _close(_gradients(toy.state, state), _gradients(toy.state, toy.after[0]))
  for name in ('loss', 'loss/consistency', 'loss/envelope', 'norm/gradients'):
    _close(metrics[name], toy.after[1][name])


def test_an_items_noise_does_not_depend_on_the_rest_of_the_batch(toy):
  def loss(audio):
    return toy.loss(toy.state, {'audio': audio})

  # What the first half adds to the loss is the same with and without a second half.
  half = toy.batch['audio'][:8]
  silence = jnp.zeros_like(half)
  with_rest = loss(jnp.concatenate([half, silence])) - loss(jnp.concatenate([silence, silence]))
  _close(2 * with_rest, loss(half) - loss(silence), tolerance=1e-3)


# --- the rules of an update ---


def test_counters_average_and_metrics(toy):
  state, metrics = toy.after
  assert int(state.step) == 1 and state.step.dtype == jnp.int32
  # The average's first decay is (1 + 0) / (10 + 0).
  expected = jax.tree.map(lambda e, p: .1 * e + .9 * p, toy.state.ema, state.params)
  _close(state.ema, expected)
  _close(metrics['ema_decay'], .1)
  gradients = _gradients(toy.state, state)
  _close(metrics['norm/gradients'], optax.global_norm(gradients), tolerance=1e-4)
  _close(metrics['norm/updates'], optax.global_norm(gradients), tolerance=1e-4)
  _close(metrics['norm/parameters'], optax.global_norm(state.params))
  _close(metrics['loss'], metrics['loss/consistency'] + metrics['loss/envelope'])
  assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())


def test_bands_of_the_loss_hold_all_of_it():
  per_chunk = jnp.asarray([[1., 2.], [3., 4.]])
  sigma = jnp.asarray([[.01, .05], [4.9, 80.]])
  bands = train_step._loss_bands(per_chunk, sigma)
  assert list(bands.values()) == [1, 2, 3, 4]
  assert list(bands) == ['loss/sigma_0_0.05', 'loss/sigma_0.05_0.5', 'loss/sigma_0.5_5',
                         'loss/sigma_5_inf']
  bands = train_step._loss_bands(per_chunk, jnp.full((2, 2), 1.))
  assert bands['loss/sigma_0.5_5'] == 2.5 and np.isnan(bands['loss/sigma_5_inf'])


def test_latent_metrics_tell_a_common_mode_from_spread():
  signs = np.float32(np.random.default_rng(0).choice([-1., 1.], (64, 2, 1, 8)))
  metrics = _jit(probe.latent_metrics)
  spread = metrics(signs * 3, np.tanh(signs * .5))
  common = metrics(np.repeat(signs[:1] * 3, 64, axis=0), np.broadcast_to(np.tanh(signs[:1, :1] * 3), signs.shape))
  assert spread['latent/spread'] > .4 and common['latent/spread'] < 1e-5
  assert spread['latent/common'] < .1 and common['latent/common'] > .99
  assert spread['latent/saturated'] == 0 and common['latent/saturated'] == 1
  np.testing.assert_allclose(spread['latent/pre_rms'], 3, rtol=1e-5)


def test_bad_audio_skips_the_update_and_the_next_good_one_goes_on(toy):
  for value in (np.nan, np.inf):
    bad = {'audio': toy.batch['audio'].at[3, 0, 5].set(value)}
    state, metrics = toy.step(toy.state, bad)
    _same((state.params, state.ema, state.opt_state),
          (toy.state.params, toy.state.ema, toy.state.opt_state))
    assert int(state.step) == int(state.skipped) == int(state.skipped_in_a_row) == 1
    assert not np.isfinite(metrics['norm/gradients']) and metrics['skipped_in_a_row'] == 1
  state, metrics = toy.step(state, bad)
  assert int(state.skipped) == int(state.skipped_in_a_row) == metrics['skipped'] == 2
  state, metrics = toy.step(state, toy.batch)
  assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (3, 2, 0)
  assert np.isfinite(metrics['loss']) and metrics['skipped_in_a_row'] == 0
  assert np.any(state.params['denoiser']['w'] != toy.state.params['denoiser']['w'])


def test_one_bad_microbatch_shows_in_the_loss(toy):
  bad = {'audio': np.array(toy.batch['audio'])}
  bad['audio'][3, 0, 5] = np.nan
  state, metrics = toy.spread(toy.state, bad)
  assert np.isnan(metrics['loss']) and int(state.skipped) == 1
  _same(state.params, toy.state.params)


def test_teacher_and_levels_pass_no_gradient(toy):
  # With both levels at sigma_min there is nothing to learn but the envelope.
  state = toy.state
  class Still(VariantConsistency):
    def sample_index(self, key, shape=()):
      return jnp.zeros(shape)

  after, metrics = _jit(_functions(consistency=Still()).train_step)(state, _batch())
  assert metrics['loss/consistency'] == 0 and metrics['loss/envelope'] > 0
  _same(after.params['denoiser'], state.params['denoiser'])
  assert np.all(after.params['encoder']['w'] != state.params['encoder']['w'])


def test_nested_latents_lose_a_suffix():
  z = jnp.ones((500, 2, 4, 3))
  keys = jax.random.split(jax.random.key(0), 500)
  short = np.asarray(objective.shorten(z, keys, chance=.5))
  kept = short.sum(axis=(2, 3)) / 3
  np.testing.assert_array_equal(short[..., 0], np.arange(4) < kept[..., None])  # a prefix, whole embeddings
  share = np.bincount(kept.astype(int).ravel(), minlength=5) / 1000
  np.testing.assert_allclose(share, [0, .125, .125, .125, .625], atol=.04)
  assert np.any(kept[:, 0] != kept[:, 1])  # each chunk by itself
  np.testing.assert_array_equal(objective.shorten(z, keys, chance=0.), z)


def test_head_start_trains_the_envelope_alone(toy):
  functions = _functions(head_start_share=.2)
  assert functions.phases == (('head_start', 2), ('consistency', 10))
  assert [functions.phase(step) for step in (0, 1, 2, 99)] == ['head_start'] * 2 + ['consistency'] * 2
  first = _jit(functools.partial(functions.train_step, phase='head_start'))
  state, losses = toy.state, []
  for n in range(3):
    before, (state, metrics) = state, (first if n < 2 else toy.step)(state, toy.batch)
    losses.append(metrics.get('loss/consistency'))
    moved = np.any(before.params['denoiser']['w'] != state.params['denoiser']['w'])
    assert moved == (n == 2)
    assert np.any(before.params['encoder']['w'] != state.params['encoder']['w'])
  assert losses[:2] == [None, None] and losses[2] > 0


@pytest.mark.parametrize('kind', ['data', 'magnitudes'])
def test_head_start_regresses_one_step_from_sigma_max(toy, kind):
  functions = _functions(head_start_share=.2, head_start_task=kind, envelope_weight=0.)
  state, metrics = _jit(functools.partial(functions.train_step, phase='head_start'))(toy.state, toy.batch)
  consistency, spec = Consistency(), _analyse(toy.batch['audio'])
  noise = np.stack([_drawn(item)[0] for item in range(len(spec))])

  @_jit
  def distance(params):
    features = TOY.decode(params, Tanh()(TOY.encode(params, spec)))
    estimate = consistency.denoise(lambda x, s: TOY.denoise(params, x, s, features), spec + 80 * noise,
                                   jnp.full(spec.shape[:2], 80.))
    if kind == 'data':
      return jnp.sqrt(jnp.sum(jnp.square(estimate - spec), axis=(2, 3, 4)))  # c is small beside it
    return jnp.abs(envelope.log_magnitude(estimate) - envelope.log_magnitude(spec))

  np.testing.assert_allclose(metrics['loss/head_start'], np.mean(distance(toy.state.params)), rtol=2e-3)
  assert metrics['loss'] == metrics['loss/head_start'] and 'loss/consistency' not in metrics
  for name in ('encoder', 'decoder', 'denoiser'):
    assert np.any(toy.state.params[name]['w'] != state.params[name]['w'])


def test_probe_tells_used_latents_from_ignored_ones(toy):
  key, probe_step, params = jax.random.key(3), _jit(_functions().probe_step), toy.state.params
  heard = probe_step(params, toy.batch, key)
  ignored = probe_step({**params, 'decoder': {**params['decoder'], 'w': 0 * params['decoder']['w']}}, toy.batch, key)
  assert heard['swap'] > .01 and ignored['swap'] == 0
  for sigma in (.2, 1.):
    assert ignored[f'snr_{sigma}'] == ignored[f'snr_{sigma}_swapped']
    assert heard[f'snr_{sigma}'] != heard[f'snr_{sigma}_swapped']
  single = probe_step(params, {'audio': toy.batch['audio'][:1]}, key)
  assert single['swap'] > 0  # a single item: the chunks are swapped


# --- the real network ---

METRICS = {
  'loss', 'loss/consistency', 'loss/envelope', 'norm/gradients', 'norm/parameters', 'norm/updates',
  'latent/pre_rms', 'latent/spread', 'latent/saturated', 'latent/common', 'latent/mean', 'latent/std', 'feature/rms',
  'feature/varying', 'learning_rate', 'ema_decay', 'skipped', 'skipped_in_a_row'}
BANDS = {'loss/sigma_0_0.05', 'loss/sigma_0.05_0.5', 'loss/sigma_0.5_5', 'loss/sigma_5_inf'}
PROBES = {'swap', 'energy', 'coherence', 'coherence_source', 'log_magnitude_l1', 'log_magnitude_l1_swapped', 'snr_0.2',
          'snr_0.2_swapped', 'snr_1.0', 'snr_1.0_swapped', 'latent/pre_rms', 'latent/spread',
          'latent/saturated', 'latent/common', 'latent/mean', 'latent/std', 'latent/rank'}


@pytest.fixture(scope='module')
def real():
  config = nano.get_config('debug')
  # One level: what the tests cost is compiling. test_configs.py traces every config whole.
  config.model.update(bins=16, frames=4, widths=(16,), head_dim=8, blocks=(1,), strides=())
  functions = build.step_functions(config)
  rng = np.random.default_rng(0)
  # By numpy: of jnp, each shape would be compiled.
  blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype),
                       jax.eval_shape(functions.init, jax.random.key(0)))
  params = jax.tree.map(
    lambda x, name: np.asarray(.1 * rng.normal(size=x.shape) + (name == 'ones'), x.dtype),
    blank.params, functions.network.init_names)
  return types.SimpleNamespace(
    functions=functions, batch=_batch(8, functions), step=_jit(functions.train_step),
    state=dataclasses.replace(blank, params=params, ema=params))


@pytest.mark.soak
def test_a_few_steps_of_the_real_network(real):
  state, batch = real.state, real.batch
  first, metrics = real.step(state, batch)
  _same(real.step(state, batch), (first, metrics))  # bit for bit
  for _ in range(4):
    state, metrics = real.step(state, batch)
    assert METRICS | BANDS <= set(metrics)
    unlucky = {name for name, value in metrics.items() if not np.isfinite(value)}
    assert unlucky <= BANDS and len(unlucky) < len(BANDS)
  assert int(state.step) == 4 and int(state.skipped) == 0
  moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), real.state.params, state.params)
  for part in ('encoder', 'decoder', 'denoiser'):
    assert any(jax.tree.leaves(moved[part])), part

  bad = {'audio': batch['audio'].at[0, 0, 0].set(np.nan)}
  skipped, metrics = real.step(state, bad)
  _same((skipped.params, skipped.ema, skipped.opt_state),
        (state.params, state.ema, state.opt_state))
  assert int(skipped.skipped_in_a_row) == 1
  again, metrics = real.step(skipped, batch)
  assert int(again.skipped_in_a_row) == 0 and np.isfinite(metrics['loss'])
  # The optimizer has not counted what was skipped.
  assert metrics['learning_rate'] == real.step(state, batch)[1]['learning_rate']


@pytest.mark.parametrize('devices', [1, pytest.param(8, marks=pytest.mark.soak)])
def test_probe_of_the_real_network_on_one_and_on_eight_devices(real, devices):
  key = jax.random.key(0)
  metrics = _jit(real.functions.probe_step)(real.state.params, real.batch, key)
  assert set(metrics) == PROBES
  assert all(np.isfinite(value) and value.dtype == jnp.float32 for value in metrics.values())

  if devices == 1:
    return
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  step = _jit(real.functions.probe_step, in_shardings=(whole, rows, whole), out_shardings=whole)
  got = step(*(jax.device_put(x, s) for x, s in (
    (real.state.params, whole), (real.batch, rows), (key, whole))))
  _close(got, metrics)
