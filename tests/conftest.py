"""Every test sees 8 CPU devices, no silent rank promotion, and the same seeds.

Tests of pure maths also ask for strict dtypes, with this line below their imports:
  pytestmark = pytest.mark.usefixtures('strict_dtypes')
Tests that run optax cannot: it multiplies Python floats with integer step counts.
"""

import gc
import os
from pathlib import Path
import random

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # inherited by the processes that tests start
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')  # also: nothing runs long, everything is compiled
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)  # or each of them parses all that it imports again, for seconds
# XLA's older loops on CPUs, of which small programs compile in half the time and train steps in a third. And eight
# devices may wait for each other as long as a busy machine takes: after 40 s XLA would end the process.
os.environ.setdefault('XLA_FLAGS', '--xla_cpu_use_fusion_emitters=false '
                                   '--xla_cpu_collective_call_terminate_timeout_seconds=600')

from jaxtyping import install_import_hook  # noqa: E402

# Shapes in signatures are checked at each call, so at each tracing; before any of these is imported.
install_import_hook(('m2l2.kernels', 'm2l2.representation', 'm2l2.consistency', 'm2l2.model',
                     'm2l2.training.train_step', 'm2l2.training.probe', 'm2l2.codec.sampler'), 'shapes.checked')

from absl import flags  # noqa: E402  (JAX_PLATFORMS is read when jax is imported)
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import soundfile  # noqa: E402

from m2l2 import compiling  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
compiling._PATIENCE = 600  # what is printed must not depend on how busy the machine is
flags.FLAGS.mark_as_parsed()  # grain asks; under pytest nobody else would

MAPPINGS = 20_000
LONGEST = (  # files that use test_codec.py's models come after it: they find its programs in the cache
  'test_codec.py', 'test_ladder.py', 'test_train_step.py', 'test_train.py', 'test_prepare.py', 'test_bulk.py',
  'test_model.py', 'test_probes.py', 'test_cli.py', 'test_consistency.py', 'test_configs.py', 'test_evaluate.py',
  'test_hosts.py', 'test_kernels.py', 'test_learning.py', 'test_box.py', 'test_compilation_cache.py',
)


def pytest_collection_modifyitems(items):
  """The longest files go first, so that no process of two works alone at the end."""
  items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def seeds():
  random.seed(0)
  np.random.seed(0)


@pytest.fixture(scope='module', autouse=True)
def mappings():
  """Drops compiled programs when a file of tests has left many.

  Each takes some of the 65,530 mappings that Linux lets a process have, and where none is left XLA crashes. Later files
  find the longer ones in the cache on disk.

  What earlier files left (traces, mostly) is none of the collector's business meanwhile: to go through it takes 1.5 s,
  and each loader that is closed asks for it.
  """
  gc.collect()
  gc.freeze()
  yield
  try:
    count = len(Path('/proc/self/maps').read_bytes().splitlines())
  except OSError:  # not Linux
    return
  if count > MAPPINGS:
    gc.unfreeze()
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='module')
def full_optimization():
  """For what computes longer than it compiles: networks of full size."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture
def strict_dtypes():
  with jax.numpy_dtype_promotion('strict'):
    yield


@pytest.fixture
def tone(tmp_path):
  """`tone('a.wav', seconds=, sample_rate=, channels=, frequency=, ...) -> path`: a short file.

  A sine at half amplitude, each channel a fifth above the one before, in whatever format the
  name's ending says; further keywords go to `soundfile.write`.
  """

  def make(name='tone.wav', *, seconds=1., sample_rate=44100, channels=1, frequency=440.,
           **options):
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    pitches = frequency * 1.5 ** np.arange(channels)
    audio = .5 * np.sin(2 * np.pi * np.outer(time, pitches))
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, sample_rate, **options)
    return path

  return make
