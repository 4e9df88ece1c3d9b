"""Learning-rate schedule, optax chain and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable
import math
import numbers

import jax
import jax.numpy as jnp
import optax

from m2l2.errors import UserError

OPTIMIZERS = ('radam', 'adam')
RADAM_THRESHOLD = 5.0  # rho below which the variance estimate is not trusted (RAdam, Alg. 2)


def warmup_cosine(*, learning_rate, warmup_steps, total_steps, final_learning_rate) -> Callable:
  """Linear warm-up to `learning_rate`, then a half cosine down to `final_learning_rate`.

  The returned schedule maps the number n of updates already made to the rate of the next one:
  learning_rate * (n + 1) / warmup_steps while n < warmup_steps (so that no update is wasted on a
  rate of 0), then the cosine, which ends at n = total_steps and stays there.

  Source: music2latent's training code (10k steps of warm-up, cosine to 1e-6 at 800k).
  """
  if warmup_steps < 0 or total_steps < 1:
    raise UserError(
      f'train.warmup_steps={warmup_steps} and train.steps={total_steps}: '
      'warm-up must be 0 or more and steps at least 1')

  def schedule(count):
    n = jnp.asarray(count, jnp.float32)
    rising = learning_rate * (n + 1) / max(warmup_steps, 1)
    progress = jnp.clip((n - warmup_steps) / max(total_steps - warmup_steps, 1), 0, 1)
    falling = final_learning_rate + (learning_rate - final_learning_rate) * 0.5 * (
      1 + jnp.cos(jnp.pi * progress))
    return jnp.where(n < warmup_steps, rising, falling)

  return schedule


def radam_unrectified_steps(b2: float) -> int:
  """The number of first updates for which RAdam has no rectifier (rho_t < 5): 5 for b2 = 0.999."""
  rho_inf = 2 / (1 - b2) - 1
  if rho_inf <= RADAM_THRESHOLD:
    raise UserError(f'train.b2={b2} is too small for radam: take more than 2/3, or adam')
  t = 1
  while rho_inf - 2 * t * b2**t / (1 - b2**t) < RADAM_THRESHOLD:
    t += 1
  return t - 1


def _is_positive(value) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool) and not value <= 0 and value < math.inf


def make_optimizer(*, name, learning_rate, warmup_steps, total_steps, final_learning_rate,
                   b1, b2, clip_norm=None):
  """Builds the optimizer of the recipe.

  RAdam's first updates are special. Until its rectifier exists (5 updates for b2 = 0.999) optax
  and torch emit the bare momentum, which is the raw gradient in size: harmless behind 10,000 steps
  of warm-up, an explosion in a short run (the loss carries a weight of 1/(sigma gap)). Those
  updates are dropped here, as the authors of RAdam do; the moments are gathered all the same.
  Afterwards the rectifier itself is a hidden warm-up: with b2 = 0.999 the updates are scaled by
  .22, .37, .59 at steps 100, 300, 800. `adam` has neither.

  Args:
    name: 'radam' (the paper's) or 'adam'.
    learning_rate, warmup_steps, total_steps, final_learning_rate: see `warmup_cosine`.
    b1, b2: decay rates of the two moments.
    clip_norm: largest global norm of the gradients; None for no clipping, as in the paper.

  Returns:
    (optax.GradientTransformation, schedule); the schedule maps the number of updates already made
    to the learning rate of the next.

  Raises:
    UserError: unknown name, or values that make no optimizer.
  """
  if name not in OPTIMIZERS:
    raise UserError(f'train.optimizer={name!r} is not known: choose one of {", ".join(OPTIMIZERS)}')
  if not (0 <= b1 < 1 and 0 <= b2 < 1):
    raise UserError(f'train.b1={b1}, train.b2={b2}: both must lie in [0, 1)')
  if clip_norm is not None and not _is_positive(clip_norm):
    raise UserError(f'train.clip_norm={clip_norm}: take a positive number, or None for no clipping')
  if not _is_positive(learning_rate) or not 0 <= final_learning_rate < math.inf:
    raise UserError(f'train.learning_rate={learning_rate}, train.final_learning_rate={final_learning_rate}: take a '
                    'positive number, and one that is 0 or more')
  schedule = warmup_cosine(
    learning_rate=learning_rate, warmup_steps=warmup_steps, total_steps=total_steps,
    final_learning_rate=final_learning_rate)
  parts = []
  if clip_norm is not None:
    parts.append(optax.clip_by_global_norm(clip_norm))
  if name == 'radam':
    dropped = radam_unrectified_steps(b2)
    parts.append(optax.scale_by_radam(b1=b1, b2=b2, threshold=RADAM_THRESHOLD))
    parts.append(optax.scale_by_schedule(lambda n: jnp.where(n < dropped, 0.0, 1.0)))
  else:
    parts.append(optax.scale_by_adam(b1=b1, b2=b2))
  parts.append(optax.scale_by_learning_rate(schedule))
  return optax.chain(*parts), schedule


def ema_decay(step, *, decay) -> jax.Array:
  """The decay of the moving average after `step` updates: min(decay, (1 + n) / (10 + n)), f32[].

  Without the warm-up the first average would be the initial weights for 1 / (1 - decay) steps.
  Source: music2latent's training code.
  """
  n = jnp.asarray(step, jnp.float32)
  return jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))


def ema_update(ema, params, decay):
  """One step of the moving average, decay * ema + (1 - decay) * params, over trees of float32.

  Written as a correction: at decay = 0.9999 the sum of two products loses digits that count.
  """
  return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
