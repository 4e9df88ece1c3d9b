"""Music2Latent2 in JAX: music to a few summary embeddings, and back.

This is the list of what users may touch. The names load on first use, so `import m2l2` is
immediate and imports no other library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from m2l2.codec import Codec, load
  from m2l2.latents import Latents

__version__ = '0.1.0'  # the one place; setup.cfg reads it from here

__all__ = ['Codec', 'Latents', '__version__', 'load']

_HOME = {'Codec': 'm2l2.codec', 'Latents': 'm2l2.latents', 'load': 'm2l2.codec'}


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(_HOME[name]), name)
  globals()[name] = value  # next time this function is not asked
  return value


def __dir__() -> list[str]:
  return __all__
