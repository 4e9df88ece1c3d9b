"""Where models are, and whether weights fit their config."""

from importlib import resources
import os
import pathlib

import numpy as np

from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.model.parameters import by_path


def in_the_box() -> dict[str, str]:
  """The path of each model in the box, by name."""
  box = pathlib.Path(str(resources.files('m2l2'))) / 'assets' / 'models'
  if not box.is_dir():
    return {}
  return {entry.name: os.fspath(entry) for entry in sorted(box.iterdir(), key=str) if entry.is_dir()}


def locate(path):
  """The path of a snapshot or workdir unchanged; for the name of a model in the box its path.

  Raises UserError: there is neither.
  """
  path = os.path.expanduser(path)
  if os.path.exists(path):
    return path
  models = in_the_box()
  if os.fspath(path) not in models:
    raise UserError(f'{audio_io.shown(path)}: no such snapshot or workdir, nor a model in the box '
                    f'({", ".join(models) or "it is empty"})')
  return models[os.fspath(path)]


def check_params(params, expected):
  """Raises UserError naming the first parameter that is missing, too many or of another shape."""
  shapes, wanted = ({name: tuple(np.shape(leaf)) for name, leaf in by_path(tree).items()}
                    for tree in (params, expected))
  for name in sorted(shapes.keys() | wanted.keys()):
    if shapes.get(name) != wanted.get(name):
      raise UserError(f'the weights do not fit their config: {name} is '
                      f'{shapes.get(name, "missing")}, should be {wanted.get(name, "absent")}')
