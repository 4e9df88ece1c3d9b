"""How the recipe follows the batch: numbers written for one batch, made into those of another.

The rules are powers of k, the batch over the one that the numbers were written for; config.scaling holds them, and
configs/base.py names the source of each. To follow twice is to follow once: after that the numbers are this batch's.
"""

from collections.abc import Iterable
import math

import ml_collections

from m2l2.errors import UserError

_POWERS = ('rate_power', 'steps_power', 'warmup_power', 'step_power')


def follow_batch(config, given: Iterable[str] = ()) -> dict:
  """{'train.steps': 100_000, ...}: the fields that become others at config.train.batch_size.

  Args:
    config: as `configs/base.py` makes it.
    given: fields of `train` and `consistency` that stay as they are, because a user gave them for this very run.

  Raises:
    UserError: rules that are none.
  """
  rules, train, consistency = config.scaling, config.train, config.consistency
  _check(rules, train, consistency)
  values: dict = {}
  if rules.batch:
    k = train.batch_size / rules.batch
    steps = max(1, round(train.steps / k**rules.steps_power))
    warmup = round(train.warmup_steps / k**rules.warmup_power)
    values = {
        'train.learning_rate': train.learning_rate * k**rules.rate_power,
        'train.final_learning_rate': train.final_learning_rate * k**rules.rate_power,
        'train.steps': steps,
        'train.warmup_steps': max(warmup, min(rules.least_warmup, train.warmup_steps))}
    if rules.step_power:  # step_start ** exponent, the last index step, becomes k ** step_power times smaller
      values['consistency.step_exponent'] = consistency.step_exponent + rules.step_power * math.log(k) / -math.log(
          consistency.step_start)
  if rules.ema_half_life:
    values['train.ema_decay'] = 0.5 ** (train.batch_size / rules.ema_half_life)
  values = {name: value for name, value in values.items() if name not in set(given)}
  if rules.batch:
    values['scaling.batch'] = train.batch_size
  if rules.ema_half_life and 'train.ema_decay' not in values:
    values['scaling.ema_half_life'] = 0
  return values


def scaled(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config with the numbers of its batch; itself where none differs. Raises UserError as `follow_batch` does."""
  values = follow_batch(config)
  if all(config[group][field] == value for group, field, value in _split(values)):
    return config
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(values)
  return config


def _split(values: dict) -> list:
  return [(*name.split('.'), value) for name, value in values.items()]


def _check(rules, train, consistency):
  for name in ('batch', 'least_warmup', 'ema_half_life'):
    if not 0 <= rules[name] < math.inf:
      raise UserError(f'scaling.{name}={rules[name]}: it must be 0 (off) or more')
  for name in _POWERS:
    if not 0 <= rules[name] <= 2:
      raise UserError(f'scaling.{name}={rules[name]}: it is a power of the batch, 0 (does not follow) to 2')
  if train.batch_size < 1:
    raise UserError(f'train.batch_size={train.batch_size}: it must be 1 or more')
  if rules.step_power and not 0 < consistency.step_start < 1:
    raise UserError(f'scaling.step_power needs consistency.step_start in (0, 1), not {consistency.step_start}')
