"""The numbers of a recipe at another batch, worked out by hand; what a user gives stays."""

import math

import pytest

from m2l2.configs import base, pod
from m2l2.errors import UserError
from m2l2.training import main, scaling


def _config(**fields):
  config = base.get_config()
  config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return config


def test_the_papers_numbers_follow_nothing():
  for batch in (16, 1024):
    config = _config(train__batch_size=batch)
    assert scaling.follow_batch(config) == {} and scaling.scaled(config) is config


def test_numbers_of_16_at_64_times_the_batch():
  assert scaling.follow_batch(_config(train__batch_size=1024, scaling__batch=16, scaling__ema_half_life=110_898)) == {
      'train.learning_rate': pytest.approx(8e-4), 'train.final_learning_rate': pytest.approx(8e-6),
      'train.steps': 100_000, 'train.warmup_steps': 2000,  # 156 would be as many samples
      'train.ema_decay': pytest.approx(.9999**64, abs=1e-7), 'scaling.batch': 1024}


@pytest.mark.parametrize('power, rate, steps, warmup', [(0., 1e-4, 800_000, 10_000), (1., 4e-4, 200_000, 2500)])
def test_each_rule_has_its_power(power, rate, steps, warmup):
  values = scaling.follow_batch(_config(
      train__batch_size=64, scaling__batch=16, scaling__rate_power=power, scaling__steps_power=power,
      scaling__warmup_power=power, scaling__step_power=power))
  assert values['train.learning_rate'] == pytest.approx(rate)
  assert (values['train.steps'], values['train.warmup_steps']) == (steps, warmup)
  last = .1 ** values.get('consistency.step_exponent', 3.)
  assert last == pytest.approx(.001 / 4**power)


def test_a_smaller_batch_takes_more_and_smaller_steps():
  values = scaling.follow_batch(_config(train__batch_size=4, scaling__batch=16))
  assert values['train.learning_rate'] == pytest.approx(5e-5)
  assert (values['train.steps'], values['train.warmup_steps']) == (1_600_000, 40_000)


def test_following_twice_is_following_once_and_changes_no_config_of_others():
  config = pod.get_config()
  once = scaling.scaled(config)
  assert once.train.steps == 100_000 and config.train.steps == 800_000
  assert scaling.scaled(once) is once
  assert scaling.scaled(pod.get_config('debug')).train.steps == 8


def test_what_the_command_line_gives_is_taken_as_it_is():
  parse = lambda *flags: main.parse(['m2l2', '--config=pod', '--workdir=w', *flags]).config
  assert parse().train.steps == 100_000
  config = parse('--config.train.steps=500', '--config.train.ema_decay=0.9')
  assert scaling.scaled(config) is config
  assert (config.train.steps, config.train.ema_decay) == (500, .9)
  assert config.train.learning_rate == pytest.approx(8e-4)
  config = parse('--config.train.batch_size=256', '--config.scaling.batch=64')
  assert config.train.steps == 400_000 and scaling.scaled(config) is config


@pytest.mark.parametrize('field, value, says', [
  ('scaling__batch', -1, 'scaling.batch=-1'), ('scaling__rate_power', math.nan, 'scaling.rate_power=nan'),
  ('scaling__steps_power', 3., 'a power of the batch'), ('scaling__ema_half_life', -5, 'scaling.ema_half_life=-5'),
  ('train__batch_size', 0, 'train.batch_size=0'), ('consistency__step_start', 1., 'in (0, 1), not 1.0')])
def test_a_rule_that_is_none_is_one_clear_line(field, value, says):
  with pytest.raises(UserError) as error:
    scaling.follow_batch(_config(scaling__step_power=1., **{field: value}))
  assert says in str(error.value) and '\n' not in str(error.value)
