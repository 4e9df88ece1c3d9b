"""Checkpoints: one unit, kept and dropped as asked, read back onto any mesh, damage survived."""

import os
import shutil
import signal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from m2l2 import sharding
from m2l2.errors import UserError
from m2l2.training import checkpoint

CONFIG = {'seed': 0, 'model': {'width': 4, 'strides': (2, 2)}}


def _state(step, width=4):
  return {'step': jnp.int32(step), 'params': {'enc': {'w': jnp.full((8, width), float(step))}},
          'opt': ((), [jnp.full((8, width), -float(step))])}


def _abstract(state, sharding_=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_ or x.sharding), state)


def _open(path, **kwargs):
  return checkpoint.Checkpoints(path / 'checkpoints', **{'keep_last': 2, **kwargs})


def _write(path, steps, **kwargs):
  manager = _open(path, **kwargs)
  for step in steps:
    manager.save(step, _state(step), position={'next_index': 10 * step}, config=CONFIG)
  manager.close()


def test_empty_directory_restores_nothing(tmp_path):
  manager = _open(tmp_path)
  assert manager.restore(_abstract(_state(0)), config=CONFIG) is None
  manager.close()


def test_a_run_of_before_the_fields_were_renamed_is_gone_on_with(tmp_path):
  manager = _open(tmp_path)
  manager.save(1, _state(1), position={}, config={'model': {'width': 4, 'envelope': True}, 'train': {'nested': .5}})
  now = {'model': {'width': 4}, 'train': {}, 'variants': {'envelope': {'on': True}, 'nested': {'chance': .5}}}
  got = manager.restore(_abstract(_state(0)), config=now)
  manager.close()
  assert got.config == now and checkpoint.config_differences(got.config, now) == []


def test_state_position_and_config_come_back_together(tmp_path):
  _write(tmp_path, [3, 7])
  manager = _open(tmp_path)
  got = manager.restore(_abstract(_state(0)), config=CONFIG)
  manager.close()
  assert got.step == 7 and got.position == {'next_index': 70}
  assert got.config == {'seed': 0, 'model': {'width': 4, 'strides': [2, 2]}}
  assert jax.tree.structure(got.state) == jax.tree.structure(_state(0))
  for a, b in zip(jax.tree.leaves(got.state), jax.tree.leaves(_state(7))):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype


def test_last_and_milestones_are_kept(tmp_path):
  _write(tmp_path, range(1, 10), keep_last=2, keep_every=4)
  manager = _open(tmp_path)
  assert manager.steps() == [4, 8, 9]
  manager.close()


def test_saving_a_step_twice_is_quiet(tmp_path):
  _write(tmp_path, [5, 5])
  _write(tmp_path, [5])
  manager = _open(tmp_path)
  assert manager.steps() == [5]
  manager.close()


def test_saved_state_may_be_donated_at_once(tmp_path):
  manager = _open(tmp_path)
  bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {'w': jnp.zeros(500_000), 'step': jnp.int32(0)}
  manager.save(1, state, position={}, config=CONFIG)
  for _ in range(3):
    state = bump(state)
  jax.block_until_ready(state)
  manager.close()
  manager = _open(tmp_path)
  got = manager.restore(_abstract(state), config=CONFIG)
  manager.close()
  np.testing.assert_array_equal(got.state['w'], np.zeros(500_000))


def test_restores_onto_another_mesh(tmp_path):
  mesh = sharding.make_mesh(data=1, fsdp=-1)
  manager = _open(tmp_path)
  split = jax.device_put({'w': jnp.arange(16.0)}, NamedSharding(mesh, P('fsdp')))
  manager.save(1, split, position={}, config=CONFIG)
  manager.close()
  other = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
  manager = _open(tmp_path)
  got = manager.restore(_abstract(split, NamedSharding(other, P('fsdp'))), config=CONFIG)
  manager.close()
  np.testing.assert_array_equal(got.state['w'], np.arange(16.0))
  assert len(got.state['w'].addressable_shards) == 2


def _truncate_everything_in(directory):
  for folder, _, names in os.walk(directory):
    for name in names:
      os.truncate(os.path.join(folder, name), os.path.getsize(os.path.join(folder, name)) // 2)


def _delete_arrays_in(directory):
  shutil.rmtree(directory / 'state')


def _truncate_arrays_in(directory):
  _truncate_everything_in(directory / 'state')


def _empty(directory):
  shutil.rmtree(directory)
  directory.mkdir()


@pytest.mark.parametrize(
  'damage', [_truncate_everything_in, _truncate_arrays_in, _delete_arrays_in, _empty])
def test_a_broken_newest_falls_back_and_can_be_written_again(tmp_path, damage):
  _write(tmp_path, [3, 7])
  damage(tmp_path / 'checkpoints' / '7')
  manager = _open(tmp_path)
  got = manager.restore(_abstract(_state(0)), config=CONFIG)
  assert got.step == 3 and got.position == {'next_index': 30}
  assert (tmp_path / 'checkpoints' / 'broken-7').is_dir()
  manager.save(7, _state(7), position={'next_index': 70}, config=CONFIG)
  manager.close()
  manager = _open(tmp_path)
  assert manager.restore(_abstract(_state(0)), config=CONFIG).step == 7
  manager.close()


def test_what_a_killed_run_left_half_written_is_passed_over(tmp_path):
  _write(tmp_path, [3, 7])
  directory = tmp_path / 'checkpoints'
  os.rename(directory / '7', directory / '7.orbax-checkpoint-tmp')
  manager = _open(tmp_path)
  assert manager.restore(_abstract(_state(0)), config=CONFIG).step == 3
  manager.close()


def test_all_broken_is_an_error_and_never_a_silent_fresh_start(tmp_path):
  _write(tmp_path, [3])
  _truncate_everything_in(tmp_path / 'checkpoints' / '3')
  manager = _open(tmp_path)
  with pytest.raises(UserError, match='none of the checkpoints') as error:
    manager.restore(_abstract(_state(0)), config=CONFIG)
  manager.close()
  assert '\n' not in str(error.value) and (tmp_path / 'checkpoints' / '3').is_dir()


def test_another_model_is_one_clear_line(tmp_path):
  _write(tmp_path, [3])
  manager = _open(tmp_path)
  new = {'seed': 0, 'model': {'width': 6, 'strides': (2, 2)}}
  with pytest.raises(UserError, match='model.width: 4 -> 6') as error:
    manager.restore(_abstract(_state(0, width=6)), config=new)
  manager.close()
  assert '\n' not in str(error.value) and 'params/enc/w' in str(error.value)


@pytest.mark.parametrize('fields', [{'keep_last': 0}, {'keep_last': 1, 'keep_every': -1}])
def test_keeping_nothing_is_refused(tmp_path, fields):
  with pytest.raises(UserError, match='train.keep_last'):
    _open(tmp_path, **fields)


def test_config_differences_name_the_fields():
  old = {'a': 1, 'b': {'c': (1, 2), 'd': None}, 'gone': 0}
  new = {'a': 1, 'b': {'c': [1, 2], 'd': 0.5}, 'added': 'x'}
  assert checkpoint.config_differences(old, new) == [
    'added: (absent) -> "x"', 'b.d: null -> 0.5', 'gone: 0 -> (absent)']


def test_a_closed_terminal_is_remembered_however_often_it_is_told(tmp_path):
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  manager = _open(tmp_path)
  try:
    for handler in (signal.SIG_DFL, signal.SIG_IGN):  # the latter is nohup's
      signal.signal(signal.SIGHUP, handler)
      with checkpoint.StopSignal(manager) as stop:
        signal.raise_signal(signal.SIGHUP)  # of the terminal
        signal.raise_signal(signal.SIGHUP)  # of the shell
        assert stop.reached(1) is (handler == signal.SIG_DFL)
      assert signal.getsignal(signal.SIGHUP) == handler
  finally:
    signal.signal(signal.SIGHUP, before)
    manager.close()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_is_remembered_and_handlers_are_given_back(tmp_path, number):
  before = signal.getsignal(number)
  manager = _open(tmp_path)
  with checkpoint.StopSignal(manager) as stop:
    assert not stop.reached(0)
    signal.raise_signal(number)
    assert stop.reached(1)
    assert signal.getsignal(number) == before   # a second signal acts as usual
  assert signal.getsignal(number) == before
  manager.close()
