"""Where compiled programs are kept; and that a second start, in a real second process, compiles nothing."""

import io
import os
from pathlib import Path
import socket
import subprocess
import sys

import jax
import pytest
from test_codec import make_snapshot

from m2l2 import compiling

# Trains (a model of one matrix), or encodes and decodes; prints what JAX's cache lacked, and what it had.
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
what, tests, *places = sys.argv[1:]
if what == 'train':
  sys.path += [tests, f'{tests}/soak']
  import test_train
  test_train.build.step_functions = test_train.small_functions
  assert test_train.loop.train(test_train.small_config(places[0], **{'train.steps': 2}), 'run') == 2
else:
  import m2l2
  codec = m2l2.load(places[0])
  codec.decode(codec.encode(np.ones((1, 500), np.float32), 44100), 0, refine=False)
print(*counts.values())
"""


@pytest.mark.parametrize('what', [pytest.param('train', marks=pytest.mark.soak), 'decode'])
def test_a_second_start_compiles_nothing(what, tone, tmp_path):
  if what == 'train':
    place = tone('music/a.wav', sample_rate=8000).parent
  else:
    place = make_snapshot(tmp_path / 'model')
  environment = {name: value for name, value in os.environ.items() if not name.startswith(('JAX_COMP', 'JAX_PERS'))}
  environment |= {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  counted = []
  for start in ('first', 'second'):  # each in a folder of its own: nothing is kept there
    (tmp_path / start).mkdir()
    done = subprocess.run([sys.executable, '-c', PROGRAM, what, Path(__file__).parent, place], cwd=tmp_path / start,
                          env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted.append([int(number) for number in done.stdout.split()[-2:]])
  (misses, _), (none, hits) = counted
  assert misses > 1 and none == 0 and hits == misses
  [kept] = (tmp_path / 'cache' / 'm2l2').iterdir()
  assert kept.name.startswith('xla-') and len(list(kept.glob('*-cache'))) == misses


# One of two processes, which runs a program of both and one of its own, or trains; prints what it asked JAX's cache for
# and what it found there.
OF_TWO = """
import sys
import jax
import numpy as np
from m2l2.training import hosts
asked = {'compile_requests_use_cache': 0, 'cache_hits': 0}
def count(name, **more):
  kind = name.rpartition('/')[2]
  if kind in asked:
    asked[kind] += 1
jax.monitoring.register_event_listener(count)
what, tests, place, process, port = sys.argv[1:]
jax.config.update('jax_num_cpu_devices', 1)
several = hosts.join(coordinator=f'localhost:{port}', num_processes=2, process_id=int(process), start_timeout=60)
if what == 'train':
  sys.path += [tests, f'{tests}/soak']
  import test_train
  test_train.build.step_functions = test_train.small_functions
  config = test_train.small_config(place, **{'train.steps': 2, 'train.probe_every': 1})
  assert test_train.loop.train(config, 'run') == 2
else:
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  x = jax.make_array_from_callback((2,), rows, lambda index: np.ones(1, np.float32))
  own = jax.jit(lambda x: 3 * x)(np.full(2, process, np.float32))
  assert jax.jit(lambda x: x.sum())(x) == 2 and own[0] == 3 * int(process)
several.leave()
print(*asked.values())
"""


@pytest.mark.parametrize('what', [pytest.param('train', marks=pytest.mark.soak), 'run'])
def test_a_second_start_of_two_processes_compiles_nothing_on_either(what, tone, tmp_path):
  place = tone('music/a.wav', sample_rate=8000).parent
  environment = {name: value for name, value in os.environ.items() if not name.startswith(('JAX_COMP', 'JAX_PERS'))}
  environment |= {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
                  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  asked = {}
  for start in ('first', 'second'):
    (tmp_path / start).mkdir()
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    both = [subprocess.Popen(
        [sys.executable, '-c', OF_TWO, what, Path(__file__).parent, place, str(popen), str(port)], env=environment,
        cwd=tmp_path / start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for popen in range(2)]
    try:
      said = [popen.communicate(timeout=300) for popen in both]
    finally:
      for popen in both:
        popen.kill()
    assert [popen.returncode for popen in both] == [0, 0], said
    asked[start] = [[int(number) for number in out.split()[-2:]] for out, _ in said]
  assert all(requests >= 2 and hits == 0 for requests, hits in asked['first']), asked
  assert all(requests >= 2 and hits == requests for requests, hits in asked['second']), asked


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
  compiling.use_cache('run')
  expected = compiling.cache_folder() if expected is None else expected
  assert setting() == (expected and str(tmp_path / expected))
  compiling.use_cache()  # what was decided holds for the process
  assert setting() == (expected and str(tmp_path / expected))


def test_no_place_is_no_fault(setting, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  setting(None)
  compiling.use_cache()
  assert setting() is None


def test_each_kind_of_processor_has_its_own(monkeypatch):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setenv('HOME', '/home/me')
  caches = []
  for flags in ('sse2 avx2', 'sse2 avx2 avx512f', 'sse2 avx2'):
    lines = io.StringIO(f'cpu MHz: {len(caches)}\nflags\t: {flags}\n')
    monkeypatch.setattr(compiling, 'open', lambda *_, **__: lines, raising=False)
    caches.append(Path(compiling.cache_folder()))
  assert caches[0] == caches[2] != caches[1] and {path.parent for path in caches} == {Path('/home/me/.cache/m2l2')}
