"""Config files: finding and loading one, and errors in it as one line.

A preset is known by its name: `tiny`, `tiny.py` or `configs/tiny.py`. Any other path means that very file. A wrong path
must not become a preset of the same name: that would train something else.
"""

from collections.abc import Iterable
import difflib
import importlib.machinery
import importlib.util
import linecache
import os
import re
import traceback

import ml_collections

from m2l2 import configs
from m2l2.codec import renamed
from m2l2.configs import base
from m2l2.errors import UserError, in_one_line

_NAME = re.compile(r'(?:configs/)?(\w[\w-]*)(?:\.py)?')  # what may mean a preset
_CAST = re.compile(r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '([\w.]+)'> and "
                   r"cannot be casted to type <class '([\w.]+)'>", re.S)
_RENAMED = {'tiny22': 'tiny (and what was tiny is nano)', 'mono': 'base'}
_KINDS = {'int': 'a whole number', 'float': 'a number', 'bool': 'True or False', 'str': 'text', 'tuple': 'a tuple'}


def find(value: str) -> str:
  """'FILE[:WORDS]' with the path of the file that it stands for.

  An existing file comes first; only the name of a preset, alone or as configs/NAME, falls back to an installed one.

  Raises UserError: there is no such file.
  """
  path, colon, words = value.partition(':')
  path = os.path.expanduser(path)
  presets = configs.__path__[0]
  candidates, name = [path], _NAME.fullmatch(path)
  if name:
    candidates += [f'{path}.py', os.path.join(presets, f'{name[1]}.py')]
  for candidate in candidates:
    if os.path.isfile(candidate):
      return candidate + colon + words
  if name and name[1] in _RENAMED:
    raise UserError(f'--config={value}: the preset {name[1]} is now {_RENAMED[name[1]]}')
  names = sorted(name for name in os.listdir(presets) if name.endswith('.py') and name != '__init__.py')
  raise UserError(f'--config={value}: there is no such file; the presets are {", ".join(names)}')


def load(place: str) -> ml_collections.ConfigDict:
  """The locked config of 'FILE[:WORDS]': get_config(), or get_config('WORDS').

  Raises UserError: the file raises an error, or sets an unknown field or a value of another type; with its line.
  """
  path, colon, words = place.partition(':')
  try:
    loader = importlib.machinery.SourceFileLoader('m2l2_config', path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise UserError(f'{path}: has no function get_config() (configs/nano.py shows one)')
    config = module.get_config(words) if colon else module.get_config()
  except UserError:
    raise
  except (Exception, SystemExit) as error:  # the user's code may raise anything
    raise UserError(_told(error, path)) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f'{path}: get_config() returned {type(config).__name__}, not a ConfigDict; is a return missing?')
  return config.lock()


def _told(error, path) -> str:
  """The place in the file, and the error."""
  if isinstance(error, SyntaxError):
    return f'{error.filename or path}, line {error.lineno}: {error.msg}'
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
  place = f'{path}, line {lines[-1]}' if lines else path
  text = in_one_line(error)
  if isinstance(error, (AttributeError, KeyError)) and re.search('Did you mean|config is locked', text):
    words = re.findall(r'Key "(\w+)"', text) + re.findall(r'\w+', text)  # or: "'stepz' Did you mean ..."
    near = linecache.getline(path, lines[-1] or 0) if lines else ''
    return f'{place}: {missing(words[0], near=near)}'
  if cast := _CAST.search(text):
    name, value, kind, wanted = cast.groups()
    return f'{place}: {name} is {_KINDS.get(wanted, wanted)}, not {value} ({kind})'
  return f'{place}: {text}'


def missing(name: str, *, near: str = '') -> str:
  """The message that there is no such field, with the nearest of base's. near: text with its group, such as
  'train.stepz'."""
  if moved := renamed.hint(name, near=near):
    return f'{moved} (configs/base.py lists all fields)'
  known = field_names()
  close = difflib.get_close_matches(name, {path.rpartition('.')[2] for path in known}, n=1, cutoff=0.6)
  paths = [path for path in known if close and path.rpartition('.')[2] == close[0]]
  beside = [path for path in paths if f'{path.rpartition(".")[0]}.{name}' in near]
  nearest = f'; the nearest is {(beside or paths)[0]}' if paths else ''
  return f'the config has no field {name!r}{nearest} (configs/base.py lists them)'


def field_names() -> list[str]:
  """All fields and groups of configs/base.py: 'seed', 'model', 'model.channels', ..."""
  return [name for name, _ in _flat(base.get_config())]


def check(config: ml_collections.ConfigDict, overrides: Iterable[str]):
  """Raises UserError: an override of the command line, such as 'train.steps', of a field that the config lacks."""
  for path in overrides:
    place, parts = config, path.split('.')
    for depth, part in enumerate(parts):
      if not isinstance(place, ml_collections.ConfigDict) or part not in place:
        raise UserError(f'--config.{path}: {missing(part, near=".".join(parts[:depth + 1]))}')
      place = place[part]


def check_given(config: ml_collections.ConfigDict):
  """Raises UserError: a field is None that has a value in configs/base.py."""
  needed = {name for name, value in _flat(base.get_config()) if value is not None}
  for name, value in _flat(config):
    if value is None and name in needed:
      raise UserError(f'{name}=None: it needs a value (configs/base.py has one)')


def _flat(config, prefix='') -> Iterable[tuple[str, object]]:
  for name, value in config.items():
    yield f'{prefix}{name}', value
    if isinstance(value, ml_collections.ConfigDict):
      yield from _flat(value, f'{prefix}{name}.')
