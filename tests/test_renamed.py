"""Configs saved under the names of before are read as those of today."""

import copy
import importlib
import json
import pkgutil

import pytest

from m2l2 import build
from m2l2.codec import renamed
import m2l2.configs
from m2l2.errors import UserError
from m2l2.training import config_file

CONFIGS = sorted(module.name for module in pkgutil.iter_modules(m2l2.configs.__path__))
# What a field of several values had where its one departure was off.
PAPER = {'consistency.skip': 'edm', 'consistency.noise': 'bins',
         'consistency.renoise': 'add', 'model.bottleneck': 'tanh', 'model.embeddings': 'summary',
         'model.cross_connections': True}


def plain(name):
  return json.loads(json.dumps(importlib.import_module(f'm2l2.configs.{name}').get_config().to_dict()))


def before(config):
  """The config with the old names."""
  old = copy.deepcopy(config)
  variants = old.pop('variants')
  for name, (place, *true) in renamed._MOVED.items():
    (group, field), (variant, setting) = name.split('.'), place.split('.')
    value = variants[variant].pop(setting)
    old[group][field] = (true[0] if value else PAPER[name]) if true else value
  assert not any(variants.values())  # there is no field of a variant that had no other name
  return old


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_of_before_is_that_of_today(name):
  config = plain(name)
  old = before(config)
  untouched = copy.deepcopy(old)
  assert renamed.current(old) == config and old == untouched
  assert renamed.current(config) == config


def test_what_is_no_more_is_left_out():
  config = plain('tiny')
  old = copy.deepcopy(config)
  old['consistency'] |= {'easy': .3, 'sampling': 'index'}
  old['variants'] |= {'easy': {'share': .3}, 'lognormal': {'on': False}}
  old['variants']['shortcut']['on'] = True
  old['variants']['local_scale']['floor'] = .004
  untouched = copy.deepcopy(old)
  assert renamed.current(old) == config and old == untouched
  older = before(config)
  older['model']['shortcut'], older['consistency']['local_floor'] = True, .004
  assert renamed.current(older) == config
  older['model']['shortcut'] = False
  assert renamed.current(older)['variants']['shortcut'] == {'width': 0}
  assert renamed.hint('easy', near='config.variants.easy.share').startswith('variants.easy is no more')
  assert renamed.hint('easy', near='consistency.easy').startswith('consistency.easy is no more')
  assert renamed.hint('local_floor') == 'consistency.local_floor is no more: it is 0.004'
  assert renamed.hint('on', near='nested.on') == renamed.hint('floor') == ''


@pytest.mark.parametrize('change, field', [
    ({'model': {'shortcut': True}, 'variants': {'shortcut': {'width': 0}}}, 'shortcut.on'),
    ({'variants': {'shortcut': {'on': True, 'width': 0}}}, 'shortcut.on'),
    ({'variants': {'local_scale': {'on': True, 'floor': .02}}}, 'local_scale.floor')])
def test_a_network_of_what_is_no_more_is_refused(change, field):
  config = plain('tiny')
  for group, fields in change.items():
    for name, value in fields.items():
      config[group][name] = {**config[group][name], **value} if isinstance(value, dict) else value
  with pytest.raises(UserError, match=f'^variants.{field} is no more'):
    build.variants(renamed.current(config))


def test_what_is_no_config_of_a_model_stays_as_it_is():
  for config in ({}, {'recipe': {'layers': 2}, 'model': None}, {'model': 'abcdef', 'variants': {}}):
    assert renamed.current(config) == config


def test_old_names_are_no_names_of_today():
  fields = set(config_file.field_names())
  assert not fields & set(renamed._MOVED)
  assert {f'variants.{place}' for place, *_ in renamed._MOVED.values()} <= fields


def test_hints():
  assert renamed.hint('envelope', near='model.envelope') == 'model.envelope is now variants.envelope.on'
  assert renamed.hint('bottleneck') == 'model.bottleneck is now variants.fsq.on (True for fsq)'
  assert renamed.hint('stepz', near='train.stepz') == ''
