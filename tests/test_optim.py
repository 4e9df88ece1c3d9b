"""Schedule, optimizers and moving average against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2l2.errors import UserError
from m2l2.training import optim

RECIPE = dict(learning_rate=1e-4, warmup_steps=10_000, total_steps=800_000,
              final_learning_rate=1e-6, b1=0.9, b2=0.999)


def _updates(tx, grads):
  """The updates for a list of scalar gradients, as numpy."""
  params = {'w': jnp.zeros(())}
  state = tx.init(params)
  out = []
  for g in grads:
    update, state = tx.update({'w': jnp.float32(g)}, state, params)
    out.append(float(update['w']))
  return np.array(out)


@pytest.mark.parametrize('count, expected', [
  (0, 1e-8), (4_999, 5e-5), (9_999, 1e-4), (10_000, 1e-4), (405_000, 5.05e-5),
  (800_000, 1e-6), (900_000, 1e-6)])
def test_schedule_of_the_recipe(count, expected):
  _, schedule = optim.make_optimizer(name='radam', **RECIPE)
  np.testing.assert_allclose(schedule(count), expected, rtol=1e-4)


def test_schedule_without_warmup_starts_at_the_peak():
  schedule = optim.warmup_cosine(
    learning_rate=1.0, warmup_steps=0, total_steps=4, final_learning_rate=0.0)
  values = [float(schedule(n)) for n in range(5)]
  np.testing.assert_allclose(values, [1, 0.853553, 0.5, 0.146447, 0], atol=1e-6)


def test_warmup_longer_than_the_run_keeps_rising():
  schedule = optim.warmup_cosine(
    learning_rate=1.0, warmup_steps=10, total_steps=5, final_learning_rate=0.0)
  np.testing.assert_allclose([schedule(0), schedule(4)], [0.1, 0.5], rtol=1e-6)


def test_first_radam_updates_are_dropped_not_raw_momentum():
  tx, _ = optim.make_optimizer(
    name='radam', learning_rate=1.0, warmup_steps=0, total_steps=10**9, final_learning_rate=1.0,
    b1=0.9, b2=0.999)
  got = _updates(tx, [1000.0] * 8)
  assert optim.radam_unrectified_steps(0.999) == 5
  np.testing.assert_array_equal(got[:5], 0.0)
  # The rectifier at step t = 6 by the formula of the paper (Alg. 2), in double precision.
  t, b2 = 6, 0.999
  inf = 2 / (1 - b2) - 1
  rho = inf - 2 * t * b2**t / (1 - b2**t)
  r = np.sqrt((rho - 4) * (rho - 2) * inf / ((inf - 4) * (inf - 2) * rho))
  np.testing.assert_allclose(got[5], -r, rtol=2e-2)  # float32 cancellation in optax's rho
  assert np.all(np.abs(got) < 1)


@pytest.mark.parametrize('step, expected', [(100, 0.22), (300, 0.37), (800, 0.59)])
def test_radam_rectifier_is_a_hidden_warmup(step, expected):
  tx, _ = optim.make_optimizer(
    name='radam', learning_rate=1.0, warmup_steps=0, total_steps=10**9, final_learning_rate=1.0,
    b1=0.9, b2=0.999)
  params = jnp.zeros(())

  def next_update(state, _):
    update, state = tx.update(jnp.float32(1.0), state, params)
    return state, update

  _, updates = jax.lax.scan(next_update, tx.init(params), None, length=step)
  np.testing.assert_allclose(-updates[-1], expected, atol=0.006)


def test_adam_moves_from_the_first_step():
  tx, _ = optim.make_optimizer(
    name='adam', learning_rate=1.0, warmup_steps=0, total_steps=10**9, final_learning_rate=1.0,
    b1=0.9, b2=0.99)
  np.testing.assert_allclose(_updates(tx, [1000.0, 1000.0]), [-1, -1], rtol=1e-4)


def test_clip_norm_bounds_the_gradient_before_the_moments():
  clipped, _ = optim.make_optimizer(name='adam', clip_norm=1.0, **RECIPE)
  plain, _ = optim.make_optimizer(name='adam', **RECIPE)
  np.testing.assert_allclose(
    _updates(clipped, [1e6, 1.0, -3.0]), _updates(plain, [1.0, 1.0, -1.0]), rtol=1e-5)


@pytest.mark.parametrize('fields', [
  {'name': 'sgd'}, {'name': 'radam', 'b2': 0.5}, {'name': 'adam', 'b1': 1.0},
  {'name': 'adam', 'clip_norm': 0.0}, {'name': 'adam', 'warmup_steps': -1},
  {'name': 'adam', 'total_steps': 0}])
def test_bad_values_are_one_clear_line(fields):
  with pytest.raises(UserError) as error:
    optim.make_optimizer(**{**RECIPE, **fields})
  assert '\n' not in str(error.value) and 'train.' in str(error.value)


@pytest.mark.parametrize('step, expected', [
  (0, 0.1), (1, 2 / 11), (90, 0.91), (89_990, 0.9999), (10**6, 0.9999)])
def test_ema_decay_of_the_recipe(step, expected):
  np.testing.assert_allclose(optim.ema_decay(step, decay=0.9999), expected, rtol=1e-6)


def test_ema_update_vector():
  ema, params = {'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([3.0, -2.0])}
  got = optim.ema_update(ema, params, optim.ema_decay(0, decay=0.9999))
  np.testing.assert_allclose(got['w'], [2.8, -1.6], rtol=1e-6)
  assert got['w'].dtype == jnp.float32


def test_optimizer_state_is_float32_and_shaped_like_the_parameters():
  tx, _ = optim.make_optimizer(name='radam', **RECIPE)
  params = {'w': jnp.zeros((3, 2))}
  state = jax.eval_shape(tx.init, params)
  shapes = [x.shape for x in jax.tree.leaves(state) if x.ndim]
  assert shapes == [(3, 2), (3, 2)]
  assert isinstance(tx, optax.GradientTransformation)
