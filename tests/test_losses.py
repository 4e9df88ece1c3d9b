"""launch/bench/losses.py: the recipe of a snapshot, and a checkout against itself."""

import pytest

from launch.bench import losses
from m2l2.configs import nano


def test_a_saved_recipe_is_taken_but_for_fields_that_went(capsys):
  config = nano.get_config('debug')
  losses.take(config, {'train': {'steps': 7}, 'model': {'strides': [[4, 2]], 'flavour': 1}, 'gone': {'on': True}})
  assert (config.train.steps, config.model.strides) == (7, ((4, 2),))
  assert capsys.readouterr().err.splitlines() == ['no field here: flavour=1', "no field here: gone={'on': True}"]


@pytest.mark.parametrize('here, status', [([2.0, 1.00001], 0), ([2.0, 1.0002], 1), ([2.0, float('nan')], 1)])
def test_what_differs_is_told(monkeypatch, capsys, here, status):
  sides = iter([[2.0, 1.0], here])
  monkeypatch.setattr(losses, 'in_a_process_of_its_own', lambda *_: next(sides))
  assert losses.main(['--against=.', '--tolerance=1e-4']) == status
  assert 'nano: losses 2 ... 1 there' in capsys.readouterr().out


@pytest.mark.soak
def test_a_checkout_against_itself(capsys):
  assert losses.main([f'--against={losses.ROOT}', '--config=base:debug', '--steps=2', '--tolerance=0']) == 0
