"""Noise levels, preconditioning, loss and samplers against the vectors of the method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2.consistency import Consistency
from m2l2.variants.consistency import VariantConsistency
from m2l2.variants.staggered import sample_staggered

pytestmark = pytest.mark.usefixtures('strict_dtypes')

PAPER = Consistency()


@pytest.mark.parametrize('index, sigma', [
  (.1, .0167), (.2, .0851), (.25, .170), (.3, .318), (1 / 3, .470), (.4, .965), (.5, 2.515),
  (.6, 5.84), (2 / 3, 9.72), (.75, 17.5), (.8, 24.4), (.9, 45.3)])
def test_sigma_of_index(index, sigma):
  np.testing.assert_allclose(PAPER.sigma(index), sigma, rtol=4e-3)


@pytest.mark.parametrize('sigma, index', [
  (.1, .211), (.2, .263), (.4, .319), (.5, .339), (1, .403), (2, .475)])
def test_index_of_sigma(sigma, index):
  np.testing.assert_allclose(PAPER.index(sigma), index, atol=6e-4)
  np.testing.assert_allclose(PAPER.sigma(PAPER.index(sigma)), sigma, rtol=1e-5)


def test_ends_of_the_range_are_exact():
  got = PAPER.sigma(jnp.asarray([0., -1e-9, 1., 1.1]))
  np.testing.assert_array_equal(got, np.float32([.002, .002, 80, 80]))
  assert np.all(np.diff(PAPER.sigma(jnp.linspace(0, 1, 1001))) > 0)


def _log_sigma(consistency, count=200_000):
  index = jax.jit(lambda key: consistency.sample_index(key, (count,)))(jax.random.key(0))
  assert index.min() >= 0 and index.max() <= 1
  return np.log(consistency.sigma(index))


def test_official_sampling_has_the_official_quantiles():
  log_sigma = _log_sigma(PAPER)
  np.testing.assert_allclose([log_sigma.mean(), log_sigma.std()], [-.55, 1.93], atol=.015)
  got = np.exp(np.quantile(log_sigma, [.05, .25, .5, .75, .95, .99]))
  np.testing.assert_allclose(got, [.023, .153, .582, 2.2, 14, 41], rtol=.04)


def _levels(consistency, *, chunks=2, progress=0., count=20_000):
  keys = jax.random.split(jax.random.key(1), count)
  return jax.jit(jax.vmap(
    lambda key: consistency.sample_levels(key, chunks=chunks, progress=progress)))(keys)


def test_levels_of_a_pair_are_independent_and_a_step_apart():
  high, low = _levels(PAPER)
  assert high.shape == low.shape == (20_000, 2)
  assert np.all(low >= np.float32(.002)) and np.all(low < high)
  assert abs(np.corrcoef(np.log(high).T)[0, 1]) < .03
  index = PAPER.index(high)
  np.testing.assert_allclose(PAPER.index(low), np.maximum(index - .1, 0), atol=1e-4)


@pytest.mark.parametrize('exponent, steps', [
  (3., [.1, .0316, .01, .00316, .001]), (2., [.1, .0562, .0316, .0178, .01])])
def test_step_schedule(exponent, steps):
  consistency = VariantConsistency(step_exponent=exponent)
  got = [consistency.step(progress) for progress in (0., .25, .5, .75, 1.)]
  np.testing.assert_allclose(got, steps, rtol=2e-3)
  np.testing.assert_allclose([consistency.step(1.5), consistency.step(-1.)], [steps[-1], .1],
                             rtol=1e-3)


@pytest.mark.parametrize('sigma, expected', [
  (.002, (1, 0, 2)), (.1, (.963, .0961, 1.961)), (.4, (.612, .311, 1.562)),
  (1, (.2006, .4463, .8944)), (80, (3.9e-5, .49998, .0125))])
def test_scalings_of_the_paper(sigma, expected):
  np.testing.assert_allclose(PAPER.scalings(jnp.float32(sigma)), expected, rtol=2e-3)


SETTINGS = [dict(flow_skip=flow, local_scale=local) for flow in (False, True) for local in (False, True)]


def _sigma_data(settings, shape):
  if settings['local_scale']:
    return jnp.asarray(np.random.uniform(.02, 3, shape), jnp.float32)
  return None


@pytest.mark.parametrize('settings', SETTINGS)
def test_at_sigma_min_the_output_is_the_input_bit_for_bit(settings):
  consistency = VariantConsistency(**settings)
  x = jnp.asarray(np.random.normal(size=(2, 2, 8, 4, 2)) * 20, jnp.float32)
  sigma = consistency.sigma(jnp.zeros((2, 2)))
  run = jax.jit(lambda x, sigma: consistency.denoise(
    lambda x, s: 1e3 * jnp.cos(x), x, sigma, sigma_data=_sigma_data(settings, x.shape)))
  np.testing.assert_array_equal(run(x, sigma), x)
  assert np.all(run(x, sigma * 2) != x)


@pytest.mark.parametrize('settings', SETTINGS)
def test_preconditioned_input_and_target_have_unit_size(settings):
  consistency = VariantConsistency(**settings)
  data = _sigma_data(settings, (1000,))
  data = jnp.full((1000,), .5) if data is None else data
  _, c_out, c_in = consistency.scalings(jnp.geomspace(.003, 80, 1000), data)
  sigma = np.geomspace(.003, 80, 1000)
  np.testing.assert_allclose(c_in * np.sqrt(sigma**2 + data**2), 1, rtol=1e-5)
  assert np.all(c_out <= data * 1.0001)


@pytest.mark.parametrize('data', [.5, .07, 2.])
def test_flow_skip_is_exact_for_gaussian_data(data):
  consistency = VariantConsistency(flow_skip=True, local_scale=True)
  sigma = jnp.geomspace(.002, 80, 7)[:, None]
  start = jnp.asarray(np.random.normal(size=16), jnp.float32)
  # The probability flow of N(0, data^2) + noise: each point moves with the spread of the whole.
  path = start[None] * jnp.sqrt(data**2 + sigma**2)
  c_skip = consistency.scalings(sigma, jnp.full(path.shape, data))[0]
  end = np.broadcast_to(path[0], path.shape)
  np.testing.assert_allclose(c_skip * path, end, rtol=2e-5)
  paper = Consistency().scalings(sigma, jnp.full(path.shape, data))[0]
  assert np.abs(paper * path - end).max() > .1 * np.abs(end).max()


@pytest.mark.parametrize('shape, constant', [((1024, 64, 2), .1955), ((1024, 64, 4), .2765)])
def test_loss_of_a_constant_difference(shape, constant):
  zeros = jnp.zeros((1, 1, *shape))
  loss = PAPER.loss(zeros + .1, zeros, high=jnp.full((1, 1), 2.), low=jnp.ones((1, 1)))
  expected = np.sqrt(np.prod(shape) * .01 + constant**2) - constant
  assert loss.shape == (1, 1)
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  if constant == .1955:
    np.testing.assert_allclose(expected, 36.0, atol=.05)


@pytest.mark.parametrize('index, step, gap, weight', [
  (.5, .1, 1.55, .645), (.5, .001, .022, 45), (.05, .001, 1.3e-4, 7.6e3), (.9, .001, .268, 3.7)])
def test_loss_weights(index, step, gap, weight):
  high, low = (PAPER.sigma(jnp.full((1, 1), i)) for i in (index, index - step))
  np.testing.assert_allclose(high - low, gap, rtol=.03)
  zeros = jnp.zeros((1, 1, 4, 4, 2))
  bare = PAPER.loss(zeros + 1, zeros, high=low + 1, low=low)
  loss = PAPER.loss(zeros + 1, zeros, high=high, low=low)
  np.testing.assert_allclose(loss / bare, weight, rtol=.03)


def test_a_zero_gap_counts_nothing_and_gives_no_nan():
  level = jnp.full((1, 2), .002)
  high = level.at[0, 1].set(1.)
  x = jnp.asarray(np.random.normal(size=(1, 2, 3)), jnp.float32)

  def total(student):
    return jnp.sum(PAPER.loss(student, x, high=high, low=level))

  value, grad = jax.value_and_grad(total)(x + jnp.asarray([[[0.], [.5]]]))
  assert np.isfinite(value) and value > 0 and np.all(np.isfinite(grad))
  assert np.all(grad[0, 0] == 0) and np.all(grad[0, 1] != 0)
  np.testing.assert_array_equal(jax.grad(total)(x), 0)  # student equals teacher: a flat bottom


def test_the_loss_is_per_chunk_and_stops_at_the_teacher():
  student, teacher = (jnp.asarray(np.random.normal(size=(2, 3, 5)), jnp.float32) for _ in range(2))
  levels = dict(high=jnp.full((2, 3), 2.), low=jnp.ones((2, 3)))
  loss = PAPER.loss(student, teacher, **levels)
  c = .00054 * 5**.5
  np.testing.assert_allclose(
    loss, np.sqrt(np.square(student - teacher).sum(-1) + c**2) - c, rtol=1e-5)
  grad = jax.grad(lambda t: jnp.sum(PAPER.loss(student, t, **levels)))(teacher)
  np.testing.assert_array_equal(grad, 0)


class _Recorder:
  """A denoiser that halves its input and remembers what it was called with."""

  def __init__(self):
    self.calls = []

  def __call__(self, x, sigma):
    self.calls.append((np.asarray(x), np.asarray(sigma)))
    return x / 2


@pytest.mark.parametrize('variance', [False, True])
def test_multi_step_sampling(variance):
  consistency, denoise = VariantConsistency(variance_renoise=variance), _Recorder()
  noises = [jnp.asarray(np.random.normal(size=(3, 2, 4)), jnp.float32) for _ in range(2)]
  out = consistency.sample(denoise, noises, (80., 2.5))
  (first, sigma0), (second, sigma1) = denoise.calls
  np.testing.assert_allclose(first, 80 * noises[0])
  spread = np.sqrt(2.5**2 - .002**2) if variance else 2.5
  np.testing.assert_allclose(second, first / 2 + spread * noises[1], rtol=1e-6)
  np.testing.assert_array_equal(sigma0, np.full((3, 2), 80))
  np.testing.assert_array_equal(sigma1, np.full((3, 2), 2.5))
  np.testing.assert_allclose(out, second / 2)
  with pytest.raises(ValueError):  # one noise per level
    consistency.sample(denoise, noises, (80.,))


def test_re_noising_rules_differ_near_sigma_min():
  x, noise = jnp.zeros(3), jnp.ones(3)
  add, variance = (VariantConsistency(variance_renoise=on).add_noise for on in (False, True))
  np.testing.assert_allclose(add(x, noise, .0025), .0025)
  np.testing.assert_allclose(variance(x, noise, .0025), .0015, rtol=1e-6)
  np.testing.assert_array_equal(variance(x, noise, .002), 0)


@pytest.mark.parametrize('variance', [False, True])
def test_a_step_of_two_step_decoding(variance):
  consistency, denoise = VariantConsistency(variance_renoise=variance), _Recorder()
  previous, left, right = (jnp.asarray(np.random.normal(size=(3, 8, 4, 2)), jnp.float32)
                           for _ in range(3))
  refined, current = consistency.sample_pair(
    denoise, previous, left_noise=left, right_noises=[right], sigma_cond=.5, sigmas=(80.,))
  (x, sigma), = denoise.calls
  spread = np.sqrt(.5**2 - .002**2) if variance else .5
  np.testing.assert_allclose(x[:, 0], previous + spread * left, rtol=1e-6)
  np.testing.assert_allclose(x[:, 1], 80 * right, rtol=1e-6)
  np.testing.assert_array_equal(sigma, np.tile(np.float32([.5, 80]), (3, 1)))
  assert refined.shape == current.shape == previous.shape
  np.testing.assert_allclose(refined, x[:, 0] / 2)
  np.testing.assert_allclose(current, x[:, 1] / 2)


def test_further_steps_keep_the_left_and_renoise_the_right():
  """CoDiCodec's autoregressive decoding: the noisy neighbour is the same in every step."""
  consistency, denoise = VariantConsistency(variance_renoise=True), _Recorder()
  previous, left, first, second = (jnp.asarray(np.random.normal(size=(2, 4)), jnp.float32)
                                   for _ in range(4))
  _, current = consistency.sample_pair(
    denoise, previous, left_noise=left, right_noises=[first, second], sigma_cond=.5,
    sigmas=(80., 2.5))
  (x0, sigma0), (x1, sigma1) = denoise.calls
  np.testing.assert_array_equal(x0[:, 0], x1[:, 0])
  np.testing.assert_array_equal(sigma0, np.tile(np.float32([.5, 80]), (2, 1)))
  np.testing.assert_array_equal(sigma1, np.tile(np.float32([.5, 2.5]), (2, 1)))
  np.testing.assert_allclose(
    x1[:, 1], x0[:, 1] / 2 + np.sqrt(2.5**2 - .002**2) * second, rtol=1e-6)
  np.testing.assert_allclose(current, x1[:, 1] / 2)


@pytest.mark.parametrize('steps, levels', [
  (1, [80]), (2, [80, 2.515]), (3, [80, 9.72, .470]), (4, [80, 17.5, 2.52, .170]),
  (5, [80, 24.4, 5.84, .965, .085])])
def test_the_schedule_of_decoding(steps, levels):
  np.testing.assert_allclose(PAPER.schedule(steps), levels, rtol=5e-3)


def _mix(x, sigma, feature):
  """A pair (left, right): left sees itself, right both; all that goes in comes out somewhere."""
  left, right = x[:, :1], x[:, 1:]
  x = jnp.concatenate([left, right + .3 * left], axis=1)
  return .5 * x + .01 * sigma[..., None] + feature


def _pairs(chunks, step):
  """The pairs of a step as lists of chunk indices, the way the paper's text draws them."""
  first = [[0]] if step % 2 else []
  rest = list(range(step % 2, chunks))
  return first + [rest[i:i + 2] for i in range(0, len(rest), 2)]


@pytest.mark.parametrize('width', [4, 6])
@pytest.mark.parametrize('chunks', [1, 2, 3, 6, 11])
@pytest.mark.parametrize('steps', [1, 2, 3, 4])
def test_parallel_sampling_is_that_of_all_chunks_at_once(steps, chunks, width):
  consistency, lag = VariantConsistency(variance_renoise=True), steps - 1
  noise, features = np.float32(np.random.normal(size=(steps, 2, chunks, 3))), np.float32(
    np.random.normal(size=(2, chunks, 3)))
  sigmas = consistency.schedule(steps)

  def around(array, start):
    """The entries start ... start + width of axis 1, garbage outside."""
    index = np.arange(start, start + width)
    inside = (index >= 0) & (index < chunks)
    return jnp.where(inside[None, :, None], array[:, np.clip(index, 0, chunks - 1)], 7.)

  def denoise_all(x, sigma, step):
    out = []
    for pair in _pairs(chunks, step):
      out.append(_mix(x[:, pair], sigma[:, pair], features[:, pair])[:, :len(pair)])
    return jnp.concatenate(out, axis=1)

  step = iter(range(steps))
  expected = consistency.sample(
    lambda x, sigma: denoise_all(x, sigma, next(step)), list(noise), sigmas)

  carried, done = tuple(jnp.full((2, 3), 7.) for _ in range(lag)), []
  for start in range(0, chunks + lag, width):
    window = jnp.concatenate(
      [around(features, start - lag)[:, :lag], around(features, start)], axis=1)
    x, carried = sample_staggered(
      consistency, lambda features: lambda x, sigma: _mix(x, sigma, features), window,
      [around(eps, start - k) for k, eps in enumerate(noise)], sigmas, carried=carried,
      first=jnp.asarray(start == 0))
    done.append(x)
  done = jnp.concatenate(done, axis=1)[:, lag:lag + chunks]
  np.testing.assert_allclose(done, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('fields', [
  dict(sigma_min=0.), dict(sigma_min=2., sigma_max=1.), dict(p_std=0.), dict(huber=0.), dict(rho=-1.),
  dict(sigma_cond=100.), dict(step_start=0.), dict(steps=0), dict(staggered_steps=0)])
def test_bad_values_are_one_line(fields):
  with pytest.raises(ValueError) as error:
    VariantConsistency(**fields)
  assert '\n' not in str(error.value) and [*fields][-1].rpartition('_')[2] in str(error.value)
