"""Where compiled programs are kept; and that a second start, in a real second process, compiles nothing."""

import io
import os
from pathlib import Path
import subprocess
import sys

import jax
import pytest

from m2l2 import compilation_cache

# One step of training, then decoding with what came of it: prints the misses and hits of JAX's cache in either.
PROGRAM = """
import sys
import jax
import numpy as np
counts = {'cache_misses': 0, 'cache_hits': 0}
def count(name, **more):
  kind = name.rpartition('/')[2]
  if kind in counts:
    counts[kind] += 1
jax.monitoring.register_event_listener(count)
import m2l2
from m2l2 import main
small = ('layers=1', 'registers=1', 'cond_dim=8', 'widths=(8,8)', 'strides=((4,4),)', 'blocks=(1,1)')
assert main.main(['m2l2', '--config=configs/base.py:debug', f'--config.data.root={sys.argv[1]}', '--workdir=run',
                  '--config.train.steps=1', *(f'--config.model.{field}' for field in small)]) == 0
print(*counts.values())
codec = m2l2.load('run')
codec.decode(codec.encode(np.ones((1, 2000), np.float32), 44100), 0)
print(*counts.values())
"""


def test_a_second_start_compiles_nothing(tone, tmp_path):
  environment = {name: value for name, value in os.environ.items() if not name.startswith(('JAX_COMP', 'JAX_PERS'))}
  environment |= {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  arguments = [sys.executable, '-c', PROGRAM, str(tone('music/a.wav', seconds=.5))]
  counted = []
  for start in ('first', 'second'):  # in a workdir of its own: what is kept is not kept there
    (tmp_path / start).mkdir()
    done = subprocess.run(arguments, cwd=tmp_path / start, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted.append([[int(number) for number in line.split()] for line in done.stdout.splitlines()[-2:]])
  (misses, _), (all_misses, _) = counted[0]
  assert 0 < misses < all_misses
  (none, hits), (none_at_all, all_hits) = counted[1]
  assert none == none_at_all == 0 and 0 < hits < all_hits
  [kept] = (tmp_path / 'cache' / 'm2l2').iterdir()
  assert kept.name.startswith('xla-') and sum(path.stat().st_size for path in kept.iterdir()) < 10e6


@pytest.fixture
def setting(monkeypatch):
  """`setting(value)` is what the user set; `setting()` what holds. JAX's own comes back afterwards."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}

  def get_or_set(*value):
    if value:
      jax.config.update(names[0], *value)
    return jax.config.jax_compilation_cache_dir

  yield get_or_set
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize('backend, processes, own, expected', [
  ('cpu', 1, None, None), ('gpu', 1, None, None), ('cpu', 2, None, None), ('tpu', 64, None, 'run/compiled'),
  ('tpu', 64, '/mine', '/mine'), ('cpu', 1, '', '')])
def test_the_place(backend, processes, own, expected, setting, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  setting(own)
  compilation_cache.use('run')
  expected = compilation_cache.default_folder() if expected is None else expected
  assert setting() == (expected and str(tmp_path / expected))
  compilation_cache.use()  # what was decided holds for the process
  assert setting() == (expected and str(tmp_path / expected))


def test_no_place_is_no_fault(setting, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  setting(None)
  compilation_cache.use()
  assert setting() is None


def test_each_kind_of_processor_has_its_own(monkeypatch):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setenv('HOME', '/home/me')
  found = []
  for flags in ('sse2 avx2', 'sse2 avx2 avx512f', 'sse2 avx2'):
    lines = io.StringIO(f'cpu MHz: {len(found)}\nflags\t: {flags}\n')
    monkeypatch.setattr(compilation_cache, 'open', lambda *_, **__: lines, raising=False)
    found.append(Path(compilation_cache.default_folder()))
  assert found[0] == found[2] != found[1] and {path.parent for path in found} == {Path('/home/me/.cache/m2l2')}
