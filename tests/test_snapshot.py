"""Snapshots: exact round trips, one line for each kind of damage, atomic replacement."""

import json
import os
import shutil
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from m2l2.codec import snapshot
from m2l2.errors import UserError

CONFIG = {'model': {'width': 4, 'strides': [[2, 2], [4, 1]]}, 'seed': 0}


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  return {
      'encoder': {'stem': {'kernel': rng.normal(size=(3, 3, 2, 4)).astype(np.float32)},
                  'blocks': {0: {'scale': np.ones(4, np.float32)},
                             10: {'scale': np.zeros(4, np.float32)}}},
      'gain': np.float32(rng.normal()),
  }


def assert_same(params, expected):
  assert params.keys() == expected.keys()
  for key, value in expected.items():
    if isinstance(value, dict):
      assert_same(params[key], value)
    else:
      assert params[key].dtype == np.asarray(value).dtype
      np.testing.assert_array_equal(params[key], value, strict=True)


def save(path, seed=0):
  return snapshot.save_snapshot(path, params=make_params(seed), config=CONFIG, step=seed)


def test_round_trip(tmp_path):
  mark = snapshot.save_snapshot(tmp_path / 'a' / 'snapshot', params=make_params(), config=CONFIG,
                                step=7, extra={'latents': {'sd': .5}})
  for path in (tmp_path / 'a' / 'snapshot', tmp_path / 'a', str(tmp_path / 'a')):
    loaded = snapshot.load_snapshot(path)
    assert_same(loaded.params, make_params())
    assert (loaded.config, loaded.step, loaded.extra) == (CONFIG, 7, {'latents': {'sd': .5}})
    assert loaded.fingerprint == mark == snapshot.fingerprint(loaded.params)
  assert sorted(os.listdir(tmp_path / 'a')) == ['snapshot']
  assert sorted(os.listdir(tmp_path / 'a' / 'snapshot')) == ['config.json', 'model.safetensors']


def test_any_array_is_written_in_c_order(tmp_path):
  table = np.arange(6, dtype=np.float32).reshape(2, 3)
  snapshot.save_snapshot(tmp_path / 's', params={'t': table.T, 'j': jnp.asarray(table)},
                         config={}, step=0)
  params = snapshot.load_snapshot(tmp_path / 's').params
  np.testing.assert_array_equal(params['t'], table.T)
  np.testing.assert_array_equal(params['j'], table)


def test_fingerprint_vector_and_what_it_sees():
  params = {'a': {'w': np.arange(6, dtype=np.float32).reshape(2, 3)}, 'b': np.float32(1)}
  # sha256 of b'a/w (2, 3) float32\n' + 24 bytes + b'b () float32\n' + 4 bytes
  assert snapshot.fingerprint(params) == 'bcdd274271081aed'
  flat = params['a']['w']
  others = [
      {'b': params['b'], 'a': {'w': flat.reshape(3, 2)}},
      {'b': params['b'], 'a': {'w': flat.view(np.int32)}},
      {'b': params['b'], 'a': {'v': flat}},
      {'b': params['b'], 'a': {'w': np.nextafter(flat, np.float32(9))}},
  ]
  assert len({snapshot.fingerprint(tree) for tree in (params, *others)}) == 5
  assert snapshot.fingerprint(dict(reversed(params.items()))) == snapshot.fingerprint(params)


@pytest.mark.parametrize('name', ['a/b', '', '12'])
def test_names_that_would_not_come_back_are_refused(tmp_path, name):
  with pytest.raises(ValueError, match='cannot be named'):
    snapshot.save_snapshot(tmp_path / 's', params={name: np.ones(1)}, config={}, step=0)
  assert not os.listdir(tmp_path)


# ---- a user's mistakes --------------------------------------------------------------------------


def cut(path, keep):
  path.write_bytes(path.read_bytes()[:keep])


def edit(path, **changes):
  record = json.loads(path.read_text())
  record.update(changes)
  path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


def flip(path):
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


DAMAGE = {
    'missing path': (shutil.rmtree, 'no such snapshot or workdir'),
    'not a directory': (lambda s: (shutil.rmtree(s), s.write_text('x')), 'is a file; name the dir'),
    'empty': (lambda s: [f.unlink() for f in s.iterdir()], 'no snapshot in'),
    'no weights': (lambda s: (s / 'model.safetensors').unlink(), 'lacks model.safetensors'),
    'no config': (lambda s: (s / 'config.json').unlink(), 'lacks config.json'),
    'config empty': (lambda s: cut(s / 'config.json', 0), 'config.json is not JSON'),
    'config cut': (lambda s: cut(s / 'config.json', 30), 'config.json is not JSON'),
    'config binary': (lambda s: (s / 'config.json').write_bytes(b'\xff\xfe\x00'), 'is not JSON'),
    'config a list': (lambda s: (s / 'config.json').write_text('[1]'), 'has no "format"'),
    'config of a run': (lambda s: (s / 'config.json').write_text('{"seed": 1}'), 'no "format"'),
    'from the future': (lambda s: edit(s / 'config.json', format=2), 'of format 2, .* reads form'),
    'no step': (lambda s: edit(s / 'config.json', step=None), '"step" is missing or not of type'),
    'config no dict': (lambda s: edit(s / 'config.json', config=3), '"config" is missing or not'),
    'weights empty': (lambda s: cut(s / 'model.safetensors', 0), 'safetensors is damaged or cut'),
    'weights cut': (lambda s: cut(s / 'model.safetensors', -1), 'safetensors is damaged or cut'),
    'header cut': (lambda s: cut(s / 'model.safetensors', 20), 'safetensors is damaged or cut'),
    'weights noise': (lambda s: (s / 'model.safetensors').write_bytes(bytes(range(256))),
                      'safetensors is damaged or cut'),
    'a flipped bit': (lambda s: flip(s / 'model.safetensors'), 'not of one save'),
    'mixed saves': (lambda s: edit(s / 'config.json', fingerprint='0' * 16), 'not of one save'),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damage_is_told_in_one_line(tmp_path, name):
  place = tmp_path / 'snapshot'
  save(place)
  damage, message = DAMAGE[name]
  damage(place)
  with pytest.raises(UserError, match=message) as caught:
    snapshot.load_snapshot(place)
  assert '\n' not in str(caught.value)
  assert str(place) in str(caught.value)


def test_a_workdir_without_a_snapshot_says_so(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='no snapshot in .*training writes one'):
    snapshot.load_snapshot(tmp_path)


def test_saving_refuses_what_it_would_destroy(tmp_path):
  (tmp_path / 'music').mkdir()
  (tmp_path / 'music' / 'song.wav').write_text('x')
  (tmp_path / 'file').write_text('x')
  for name, message in {'music': 'holds other things', 'file': 'a file of that name',
                        'file/deeper': 'cannot write the snapshot'}.items():
    with pytest.raises(UserError, match=message):
      save(tmp_path / name)
  assert sorted(os.listdir(tmp_path)) == ['file', 'music']
  assert os.listdir(tmp_path / 'music') == ['song.wav']


def test_an_empty_directory_and_a_link_may_be_replaced(tmp_path):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'real')
  for seed in (0, 1):
    save(tmp_path / 'link', seed)
    assert (tmp_path / 'link').is_symlink()
    assert_same(snapshot.load_snapshot(tmp_path / 'real').params, make_params(seed))
  assert sorted(os.listdir(tmp_path)) == ['link', 'real']


def test_files_of_others_are_carried_over(tmp_path):
  save(tmp_path / 's')
  (tmp_path / 's' / 'README.md').write_text('mine')
  (tmp_path / 's' / 'pictures').mkdir()
  (tmp_path / 's' / 'pictures' / 'a').write_text('b')
  save(tmp_path / 's', 1)
  assert snapshot.load_snapshot(tmp_path / 's').step == 1
  assert (tmp_path / 's' / 'README.md').read_text() == 'mine'
  assert (tmp_path / 's' / 'pictures' / 'a').read_text() == 'b'


# ---- crashes ------------------------------------------------------------------------------------


class Crash(BaseException):
  """Not an Exception, as a kill is none: nothing may catch it and tidy up."""


CALLS = ('mkdir', 'open', 'fsync', 'rename', 'unlink', 'rmdir')


def crash_at(monkeypatch, point):
  """From the `point`-th call on that changes the disk, every such call fails; returns the count."""
  count = [0]

  def wrap(function):
    def call(*args, **kwargs):
      count[0] += 1
      if count[0] > point:
        raise Crash
      return function(*args, **kwargs)
    return call

  for name in CALLS:
    monkeypatch.setattr(os, name, wrap(getattr(os, name)))
  monkeypatch.setattr(snapshot.safetensors.numpy, 'save_file',
                      wrap(snapshot.safetensors.numpy.save_file))
  return count


@pytest.mark.parametrize('leftovers', [False, True], ids=['clean', 'after a crash'])
def test_a_crash_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch, leftovers):
  seen = []
  for point in range(100):
    workdir = tmp_path / str(point)
    place = workdir / 'snapshot'
    save(place, 1)
    (place / 'MODEL.md').write_text('card')
    if leftovers:
      shutil.copytree(place, workdir / '.snapshot.new')
      shutil.copytree(place, workdir / '.snapshot.old')
    with monkeypatch.context() as patch:
      count = crash_at(patch, point)
      try:
        save(place, 2)
        crashed = False
      except Crash:
        crashed = True
    calls = count[0]
    for path in (place, workdir):
      loaded = snapshot.load_snapshot(path)
      assert_same(loaded.params, make_params(loaded.step))
    seen.append(loaded.step)
    save(place, 3)  # the next save mends whatever was left
    assert snapshot.load_snapshot(place).step == 3
    assert os.listdir(workdir) == ['snapshot'] and (place / 'MODEL.md').read_text() == 'card'
    if not crashed:
      break
  assert calls == point >= 10  # every call was a crash point once
  assert seen == sorted(seen) and set(seen) == {1, 2}


def test_a_first_save_that_crashes_leaves_no_snapshot(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    crash_at(patch, 3)
    with pytest.raises(Crash):
      save(tmp_path / 'snapshot')
  with pytest.raises(UserError, match='no such snapshot'):
    snapshot.load_snapshot(tmp_path / 'snapshot')


def test_bfloat16_in_shards_is_read_as_float32(tmp_path):
  params = {name: jnp.asarray(np.random.default_rng(n).normal(size=(100, 3)), jnp.bfloat16)
            for n, name in enumerate('abc')}
  mark = snapshot.save_snapshot(tmp_path / 's', params=params, config=CONFIG, step=1, shard_bytes=1300)
  assert sorted(os.listdir(tmp_path / 's')) == [
      'config.json', 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
  loaded = snapshot.load_snapshot(tmp_path / 's')
  assert_same(loaded.params, {name: np.asarray(value, np.float32) for name, value in params.items()})
  assert loaded.fingerprint == mark == snapshot.fingerprint(loaded.params)
  assert (tmp_path / 's' / 'model-00001-of-00002.safetensors').stat().st_size < 1700  # 2 bytes a number

  (tmp_path / 's' / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(UserError, match='lacks'):
    snapshot.load_snapshot(tmp_path / 's')
  snapshot.save_snapshot(tmp_path / 's2', params=params, config=CONFIG, step=1, shard_bytes=1300)
  snapshot.save_snapshot(tmp_path / 's2', params=params, config=CONFIG, step=2)  # fewer files: no old one stays
  assert sorted(os.listdir(tmp_path / 's2')) == ['config.json', 'model.safetensors']


# In the background.


class Held:
  """Saves that take until they are let go."""

  def __init__(self):
    self.begun, self.done, self._go = [], [], threading.Semaphore(0)

  def save(self, name, error=None):
    def write():
      self.begun.append(name)
      assert self._go.acquire(timeout=60)
      if error:
        raise error
      self.done.append(name)
    return write

  def let_go(self, count=1):
    for _ in range(count):
      self._go.release()

  def wait_for_begin(self, name):
    end = time.monotonic() + 60
    while name not in self.begun:
      assert time.monotonic() < end
      time.sleep(0.001)


def test_in_the_background_one_saves_at_a_time_and_of_those_that_wait_the_newest():
  held = Held()
  with snapshot.Background() as background:
    background.save(held.save(1))
    held.wait_for_begin(1)
    for name in (2, 3, 4):
      background.save(held.save(name))  # returns, though nothing is written yet
    assert held.done == []
    held.let_go(4)
    background.wait()
    assert held.done == [1, 4]
    background.save(held.save(5))  # after a rest, too
  assert held.done == [1, 4, 5]  # the end of the block waits


def test_what_fails_in_the_background_is_raised_by_the_next_call():
  held = Held()
  held.let_go(3)
  background = snapshot.Background()
  background.save(held.save(1, UserError('the disk is full')))
  with pytest.raises(UserError, match='full'):
    background.wait()
  background.save(held.save(2))
  background.wait()
  with pytest.raises(UserError, match='full'), background:
    background.save(held.save(3, UserError('the disk is full')))
  assert held.done == [2]


@pytest.mark.parametrize('error, waits', [(UserError('stopped'), True), (ZeroDivisionError('a bug'), False)])
def test_after_an_error_the_background_is_left_with_that_error(error, waits):
  held = Held()
  with pytest.raises(type(error), match=str(error)), snapshot.Background() as background:
    background.save(held.save(1, UserError('the disk is full')))
    if waits:
      held.let_go()
    raise error
  assert waits is (not background._running)
  held.let_go(2)


def test_without_time_what_is_being_written_is_left_behind_and_what_waits_left_out():
  held = Held()
  with snapshot.Background() as background:
    background.save(held.save(1))
    held.wait_for_begin(1)
    background.save(held.save(2))
    background.drop()
  assert held.done == []  # though it was not done, we are here
  with snapshot.Background() as following:  # another run of this process: it does not write beside the first
    following.save(held.save(3))
    assert held.begun == [1]
    held.let_go(2)
  assert held.done == [1, 3]
