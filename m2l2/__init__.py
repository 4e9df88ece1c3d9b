"""Music2Latent2 in JAX: music to a few summary embeddings, and back.

The public names are listed in __all__. They are loaded on first use, so `import m2l2` takes no time and imports no
other library.
"""

import contextlib
import gc
import importlib
import importlib.abc
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from m2l2.codec.codec import Codec, load
  from m2l2.codec.latents import Latents
  from m2l2.training.loop import train

__version__ = '0.1.0'  # the one place; setup.cfg reads it from here

__all__ = ['Codec', 'Latents', '__version__', 'load', 'train']


@contextlib.contextmanager
def no_collection():
  """Turns Python's garbage collector off during the block.

  Importing and tracing make millions of objects that stay alive; scanning them again and again took a sixth of the time
  of a start. Blocks of several threads may overlap: the thread that turned the collector off turns it on again.
  """
  was = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was:
      gc.enable()


def lazy(package: str, homes: dict[str, str]) -> tuple[Any, Any]:
  """(__getattr__, __dir__) of a package whose public names are imported on first use.

  Args:
    package: the package's own name.
    homes: the module of each public name.
  """
  def get(name: str) -> Any:
    if name not in homes:
      raise AttributeError(f'module {package!r} has no attribute {name!r}')
    with no_collection():
      value = getattr(importlib.import_module(homes[name]), name)
    setattr(sys.modules[package], name, value)  # so that the next access does not call this function
    return value

  return get, lambda: sorted(sys.modules[package].__all__)


__getattr__, __dir__ = lazy(__name__, {
    'Codec': 'm2l2.codec.codec', 'Latents': 'm2l2.codec.latents', 'load': 'm2l2.codec.codec',
    'train': 'm2l2.training.loop'})


# Where modules moved to that were at the top level: importing the old name says what to write instead.
_MOVED = {
    'training': ('checkpoint', 'config_file', 'guard', 'hosts', 'listening', 'main', 'metrics', 'optim', 'preflight',
                 'ravel', 'timing', 'train_step', 'watchdog'),
    'codec': ('bulk', 'encoding', 'export', 'latents', 'output', 'snapshot'),
    'planning': ('chips', 'flops', 'hlo', 'plan'),
    'cli': ('extras', 'info', 'jobs'),
    'evaluation.metrics': ('checks', 'frechet', 'pairs', 'seams', 'stereo', 'visqol'),
    'evaluation.embedders': ('clap', 'embeddings', 'musicnn', 'vggish'),
    'evaluation.reports': ('pictures', 'report'),
    'evaluation.studies': ('baselines', 'edits', 'probes', 'sweep', 'tasks'),
}
_NOW = {
    **{f'm2l2.{"evaluation." if "." in room else ""}{name}': f'm2l2.{room}.{name}'
       for room, names in _MOVED.items() for name in names},
    'm2l2.train': 'm2l2.training.loop',
    'm2l2.data.decoder': 'm2l2.data.prepare.child',
    'm2l2.evaluation.clips': 'm2l2.evaluation.excerpts',
    'm2l2.evaluation.studies.excerpts': 'm2l2.evaluation.studies.judging',
    'm2l2.clips': 'm2l2.assets', 'm2l2.compilation_cache': 'm2l2.compiling', 'm2l2.decoding': 'm2l2.codec.sampler'}


class _Signpost(importlib.abc.MetaPathFinder):
  """The last finder on sys.meta_path: raises an error that names the new place of a module that moved."""

  def find_spec(self, name, path=None, target=None):
    if name in _NOW:
      raise ModuleNotFoundError(f'{name} is now {_NOW[name]}: write that instead')


if not any(type(finder).__name__ == '_Signpost' for finder in sys.meta_path):
  sys.meta_path.append(_Signpost())
