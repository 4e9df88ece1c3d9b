"""The floors of the house: who may import whom; how long functions are, and that classes share no names.

Imports are read from the source (at every level, also inside functions), never executed, so a
floor broken in a rarely run branch is found too. The last tests execute.
"""

import ast
import collections
import dataclasses
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[1]

# Beside the standard library and one's own package, these may import only what is named.
FLOORS = {
    'm2l2.kernels': ('jax', 'jaxtyping', 'numpy', 'm2l2.errors'),
    'm2l2.representation': ('jax', 'jaxtyping', 'numpy', 'm2l2.errors', 'm2l2.kernels'),
    'm2l2.consistency': ('jax', 'jaxtyping', 'numpy', 'm2l2.errors'),
    'm2l2.sharding': ('jax', 'numpy', 'm2l2.errors'),
    'm2l2.model': ('jax', 'jaxtyping', 'numpy', 'flax', 'm2l2.errors', 'm2l2.kernels', 'm2l2.representation',
                   'm2l2.consistency', 'm2l2.sharding'),
    'm2l2.compiling': ('jax', 'm2l2.no_collection'),
    'm2l2.errors': (),
    'm2l2.codec.snapshot': ('numpy', 'safetensors', 'm2l2.codec.renamed', 'm2l2.errors', 'm2l2.files'),
    'm2l2.codec.renamed': (),
}

# These may not import what is named.
BANS = {
    'm2l2.training.train_step': ('m2l2.codec',),
    'm2l2.codec': ('m2l2.training.train_step', 'm2l2.training.loop'),
    'm2l2.codec.bulk': ('m2l2.model', 'm2l2.build'),
    'm2l2.data': ('m2l2.model', 'm2l2.kernels', 'm2l2.representation', 'm2l2.consistency',
                  'm2l2.build', 'm2l2.codec', 'm2l2.training', 'm2l2.planning', 'm2l2.evaluation', 'm2l2.cli', 'flax'),
}

# These may be imported only by what is named.
KEEPERS = {
    'soundfile': ('m2l2.data.streams', 'm2l2.data.writer'),
    'av': ('m2l2.data.ffmpeg',),
    'apache_beam': ('m2l2.data.prepare.stages',),
    'torch': ('m2l2.interop.codicodec.reading', 'm2l2.interop.codicodec.verification'),
    'codicodec': ('m2l2.interop.codicodec.verification',),
    # What turns a config into networks is called by build alone.
    'm2l2.model.autoencoder': ('m2l2.build', 'm2l2.model'),
    # The paper's part of the house does not know what departs from it.
    'm2l2.variants': ('m2l2.build', 'm2l2.codec', 'm2l2.evaluation', 'm2l2.interop', 'm2l2.training.probe',
                      'm2l2.variants'),
}
# Its result, the bundle of functions, is what these two stand on: they may name the type.
INTERFACE = {'m2l2.model.autoencoder.Network': ('m2l2.codec', 'm2l2.training.train_step')}

# What encoding and decoding execute, and what that must never pull in. flax imports optax
# by itself, so optax is forbidden to our files but may be in memory.
INFERENCE = ('m2l2', 'm2l2.build', 'm2l2.cli', 'm2l2.codec.codec', 'm2l2.codec.latents', 'm2l2.codec.snapshot',
             'm2l2.consistency', 'm2l2.data.audio_io', 'm2l2.errors', 'm2l2.kernels', 'm2l2.model',
             'm2l2.model.autoencoder', 'm2l2.representation', 'm2l2.variants')
TRAINING = ('clu', 'grain', 'mir_eval', 'ml_collections', 'optax', 'orbax', 'sklearn', 'tensorboard', 'tensorflow',
            'tensorflow_datasets', 'torch')
# These also serve training or an extra, from inside functions that inference without them never calls.
LAZY = ('m2l2.build', 'm2l2.data.ffmpeg', 'm2l2.evaluation.embedders.embeddings',
        *(f'm2l2.cli.{group}' for group in (
            'coding', 'corpora', 'listing', 'measuring', 'retrieval', 'runs', 'terminal', 'weights')))

VAGUE = ('common', 'helper', 'helpers', 'misc', 'util', 'utils')
LONGEST_LOOP = 300
# The paper alone: what a reader who comes for the method has to read, and what is to be found in none of it.
PAPER = (*(f'm2l2/model/{name}.py' for name in (
    'layers', 'transformer', 'patchify', 'encoder', 'decoder', 'denoiser', 'autoencoder')),
         'm2l2/representation.py', 'm2l2/consistency.py')
LONGEST_PAPER = 1050
MOST_ARGUMENTS = 12  # of a module's __init__
DEPARTURES = ('envelope', 'sketch', 'shortcut', 'latent_norm', 'magnitude_input', 'head_start', 'nested', 'pack')
MOST_AT_THE_TOP = 9
LONGEST_FILE = 450
LONGEST_FUNCTION = 80  # lines from def to end, but for the docstring
# What is longer, and why it stays so.
LONG_FUNCTIONS = {
    'm2l2.training.loop.train': 'the stages of a run, whose order is law, from top to bottom; its file has a bound',
}
# Classes that share a name, and why they still do. Here names only go.
SHARED_NAMES = {
}


@dataclasses.dataclass(frozen=True)
class Import:
  name: str  # dotted, e.g. 'jax.numpy' or 'm2l2.errors.UserError'
  at_import: bool  # executed when the module is imported, not inside a function


def read_imports(source, *, module, is_package=False):
  """Every import of a source text, but for those under `if TYPE_CHECKING:`."""
  package = module if is_package else module.rpartition('.')[0]
  imports = []

  def visit(node, at_import):
    if isinstance(node, ast.Import):
      imports.extend(Import(alias.name, at_import) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        above = package.split('.')[:len(package.split('.')) - node.level + 1]
        base = '.'.join([*above, *([base] if base else [])])
      imports.extend(Import(base if alias.name == '*' else f'{base}.{alias.name}', at_import)
                     for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
      called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(
          node.func, 'id', '')
      if called in ('import_module', '__import__'):
        imports.append(Import(node.args[0].value, at_import))
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith('TYPE_CHECKING'):
      children = node.orelse
    else:
      children = ast.iter_child_nodes(node)
    inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in children:
      visit(child, at_import and not inside)

  visit(ast.parse(source), True)
  return imports


def read_house():
  """{module: its imports} of everything under m2l2/ and configs/ (which is m2l2.configs)."""
  house = {}
  for folder, package in ((ROOT / 'm2l2', 'm2l2'), (ROOT / 'configs', 'm2l2.configs')):
    for path in sorted(folder.rglob('*.py')):
      parts = path.relative_to(folder).with_suffix('').parts
      is_package = parts[-1] == '__init__'
      module = '.'.join([package, *(parts[:-1] if is_package else parts)])
      house[module] = read_imports(path.read_text(), module=module, is_package=is_package)
  return house


def within(name, packages):
  return any(name == package or name.startswith(f'{package}.') for package in packages)


def reached(house, module, *, lazy):
  """The modules of the house that `module` pulls in, itself included.

  Imports inside functions are followed too, except in the modules `lazy`.
  """
  seen, queue = set(), [module]
  while queue:
    current = queue.pop()
    while current and current not in house:  # a name in a module: the module
      current = current.rpartition('.')[0]
    if not current or current in seen:
      continue
    seen.add(current)
    queue.append(current.rpartition('.')[0])  # importing a.b runs a/__init__.py
    queue.extend(item.name for item in house[current] if item.at_import or current not in lazy)
  return seen


def broken_floors(house):
  """One line for each import that breaks a floor."""
  lines = []
  for module, imports in house.items():
    names = {item.name for item in imports}
    for floor, allowed in FLOORS.items():
      if within(module, [floor]):
        lines += [f'{module} imports {name}: not on its floor' for name in names
                  if name.partition('.')[0] not in sys.stdlib_module_names
                  and not within(name, [floor, *allowed])]
    for floor, banned in BANS.items():
      if within(module, [floor]):
        lines += [f'{module} imports {name}: banned' for name in names if within(name, banned)]
    for kept, keepers in KEEPERS.items():
      if not within(module, keepers):
        lines += [f'{module} imports {name}: only {" and ".join(keepers)} may' for name in names
                  if within(name, [kept]) and not within(module, INTERFACE.get(name, ()))]
  for root in set(INFERENCE) & set(house):
    for module in reached(house, root, lazy=LAZY):
      lines += [f'{module} imports {item.name}: {root} must do without it'
                for item in house[module] if within(item.name, TRAINING)
                and (item.at_import or module not in LAZY)]
  return sorted(set(lines))


def vague_names(paths):
  return [str(path) for path in paths if Path(path).stem in VAGUE]


def test_no_floor_is_broken():
  assert broken_floors(read_house()) == []


def test_the_files_the_rules_speak_of_exist():
  house = read_house()
  keepers = {name for names in KEEPERS.values() for name in names}
  named = {*FLOORS, *BANS, *INFERENCE, *LAZY, *keepers}
  assert sorted(named - set(house)) == []


def circles(house):
  """Of modules that import each other when they are imported: each circle's names, sorted."""
  reach = {}
  for module in house:
    seen, queue = set(), [module]
    while queue:
      for item in house[queue.pop()]:
        name = item.name
        while name and name not in house:
          name = name.rpartition('.')[0]
        if item.at_import and name and name not in seen:
          seen.add(name)
          queue.append(name)
    reach[module] = seen
  return sorted({tuple(sorted(other for other in reach if module in reach[other] and other in reach[module]))
                 for module in reach if module in reach[module]})


def test_no_modules_import_each_other_in_a_circle():
  assert circles(read_house()) == []
  assert circles(small_house({'m2l2.a': 'import m2l2.b', 'm2l2.b': 'from m2l2.c import x', 'm2l2.c': 'import m2l2.a',
                              'm2l2.d': 'import m2l2.a'})) == [('m2l2.a', 'm2l2.b', 'm2l2.c')]


def test_no_file_is_long():
  lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding='utf-8').splitlines())
           for path in (ROOT / 'm2l2').rglob('*.py')}
  assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}


def test_the_top_of_the_package_is_short():
  assert len(list((ROOT / 'm2l2').glob('*.py'))) <= MOST_AT_THE_TOP


def test_the_paper_is_read_in_one_sitting():
  texts = {path: (ROOT / path).read_text(encoding='utf-8') for path in PAPER}
  assert sum(len(text.splitlines()) for text in texts.values()) <= LONGEST_PAPER
  texts |= {path: (ROOT / path).read_text(encoding='utf-8')
            for path in ('m2l2/training/loop.py', 'm2l2/training/train_step.py')}
  assert [(path, word) for path, text in texts.items() for word in DEPARTURES if word in text] == []


def test_a_network_is_made_of_few_arguments():
  many = {module: len(node.args.args) + len(node.args.kwonlyargs) for module, node in read_definitions()
          if module.startswith('m2l2.model.') and not isinstance(node, ast.ClassDef) and node.name == '__init__'}
  assert many and max(many.values()) <= MOST_ARGUMENTS, many


def test_names_say_something():
  paths = [path.relative_to(ROOT) for folder in ('m2l2', 'configs', 'tests', 'launch')
           for path in (ROOT / folder).rglob('*') if '__pycache__' not in path.parts]
  assert vague_names(paths) == []


def test_the_loop_is_one_short_file():
  assert len((ROOT / 'm2l2' / 'training' / 'loop.py').read_text().splitlines()) <= LONGEST_LOOP


def read_definitions():
  """(module, definition) of each class and function under m2l2/, nested ones and methods too."""
  for path in sorted((ROOT / 'm2l2').rglob('*.py')):
    module = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield module, node


def count_lines(function):
  """Of a definition, from `def` to its end, but for the docstring."""
  lines = function.end_lineno - function.lineno + 1
  if ast.get_docstring(function) is not None:
    lines -= function.body[0].end_lineno - function.body[0].lineno + 1
  return lines


def test_no_function_is_long():
  long = {f'{module}.{node.name}' for module, node in read_definitions()
          if not isinstance(node, ast.ClassDef) and count_lines(node) > LONGEST_FUNCTION}
  assert long == set(LONG_FUNCTIONS)


def test_no_two_classes_share_a_name():
  counts = collections.Counter(node.name for _, node in read_definitions() if isinstance(node, ast.ClassDef))
  assert {name for name, count in counts.items() if count > 1} == set(SHARED_NAMES)


# ---- the checker itself -------------------------------------------------------------------------


@pytest.mark.parametrize('source,expected', [
    ('import jax.numpy as jnp, os', ['jax.numpy', 'os']),
    ('from m2l2 import errors', ['m2l2.errors']),
    ('from m2l2.errors import UserError as E', ['m2l2.errors.UserError']),
    ('from .layers import Linear', ['m2l2.model.layers.Linear']),
    ('from . import layers', ['m2l2.model.layers']),
    ('from ..errors import UserError', ['m2l2.errors.UserError']),
    ('from grain import *', ['grain']),
    ('def f():\n  if 1:\n    import grain', ['grain']),
    ('class A:\n  def f(self):\n    from clu import metrics', ['clu.metrics']),
    ('try:\n  import torch\nexcept ImportError:\n  import numpy', ['torch', 'numpy']),
    ('import importlib\nimportlib.import_module("grain")', ['importlib', 'grain']),
    ('f = lambda: __import__("torch")', ['torch']),
    ('if TYPE_CHECKING:\n  import grain\nelse:\n  import numpy', ['numpy']),
])
def test_imports_are_found(source, expected):
  imports = read_imports(source, module='m2l2.model.encoder')
  assert [item.name for item in imports] == expected
  deep = 'def ' in source or 'lambda' in source
  assert all(item.at_import != deep for item in imports)


def test_relative_imports_of_a_package_start_at_itself():
  imports = read_imports('from .encoder import Encoder', module='m2l2.model', is_package=True)
  assert [item.name for item in imports] == ['m2l2.model.encoder.Encoder']


def small_house(files):
  return {'m2l2': [], **{name: read_imports(text, module=name) for name, text in files.items()}}


@pytest.mark.parametrize('files,line', [
    ({'m2l2.kernels.flash': 'import flax'}, 'm2l2.kernels.flash imports flax: not on its floor'),
    ({'m2l2.representation': 'import scipy.fft'}, 'imports scipy.fft: not on its floor'),
    ({'m2l2.consistency': 'def f():\n  from m2l2.model import layers'}, 'not on its floor'),
    ({'m2l2.consistency': 'from m2l2 import representation'}, 'not on its floor'),
    ({'m2l2.sharding': 'import jaxtyping'}, 'm2l2.sharding imports jaxtyping: not on its floor'),
    ({'m2l2.model.encoder': 'import optax'}, 'm2l2.model.encoder imports optax: not on its floor'),
    ({'m2l2.model.encoder': 'from m2l2.build import make'}, 'not on its floor'),
    ({'m2l2.training.train_step': 'import m2l2.codec'}, 'm2l2.training.train_step imports m2l2.codec: banned'),
    ({'m2l2.codec': 'def f():\n  from m2l2.training import train_step'}, 'm2l2.training.train_step: banned'),
    ({'m2l2.data.sources': 'from m2l2.model.layers import Linear'}, 'Linear: banned'),
    ({'m2l2.codec': 'import soundfile'}, 'soundfile: only m2l2.data.streams and m2l2.data.writer may'),
    ({'m2l2.configs.base': 'from soundfile import read'}, 'only m2l2.data.streams and'),
    ({'m2l2.codec': 'from m2l2.model.autoencoder import make_network'}, 'only m2l2.build and'),
    ({'m2l2.training.loop': 'from m2l2.model.autoencoder import Network'}, 'only m2l2.build and'),
    ({'m2l2.codec': 'from m2l2.model import autoencoder'}, 'only m2l2.build and m2l2.model may'),
    ({'m2l2.codec.codec': 'def f():\n  import clu'}, 'imports clu: m2l2.codec.codec must do without it'),
    ({'m2l2.codec.codec': 'import m2l2.training.optim', 'm2l2.training.optim': 'import optax'},
     'm2l2.training.optim imports optax: m2l2.codec.codec must do without it'),
    ({'m2l2.codec.codec': 'from m2l2.build import make', 'm2l2.build': 'from m2l2.training import optim',
      'm2l2.training.optim': 'import optax'}, 'm2l2.training.optim imports optax: m2l2.codec.codec must do without it'),
    ({'m2l2.build': 'import ml_collections'}, 'm2l2.build must do without it'),
    ({'m2l2.data.audio_io': '', 'm2l2.data': 'from grain import MapDataset'},
     'm2l2.data imports grain.MapDataset: m2l2.data.audio_io must do without it'),
])
def test_a_broken_floor_is_told(files, line):
  house = small_house(files)
  assert any(line in told for told in broken_floors(house)), broken_floors(house)


@pytest.mark.parametrize('files', [
    {'m2l2.kernels.flash': 'import functools, jax\nfrom jax.experimental import pallas\n'
                           'from m2l2.kernels.plain import f\nfrom m2l2.errors import UserError'},
    {'m2l2.model.decoder': 'from flax import nnx\nfrom m2l2.kernels.flash import f'},
    {'m2l2.training.loop': 'if typing.TYPE_CHECKING:\n  from m2l2.model.autoencoder import Network'},
    {'m2l2.codec': 'from m2l2.model.autoencoder import Network'},
    {'m2l2.build': 'from m2l2.model.autoencoder import make_network\n'
                   'def f():\n  from m2l2.training import optim, train_step',
     'm2l2.codec.codec': 'from m2l2 import build', 'm2l2.training.optim': 'import optax',
     'm2l2.training.train_step': ''},
    {'m2l2.data.streams': 'import soundfile', 'm2l2.data.pipeline': 'import grain'},
])
def test_a_sound_house_passes(files):
  house = small_house(files)
  assert broken_floors(house) == []


@pytest.mark.parametrize('source,lines', [
    ('def f():\n  return 1', 2),
    ('@cache\ndef f(a,\n      b):\n  """One\n  two."""\n  return 1', 3),
    ('def f():\n  """One."""', 1),
    ('def f():\n  def g():\n    """One."""\n    return 1\n\n  return g', 6),
])
def test_lines_of_functions(source, lines):
  assert count_lines(ast.parse(source).body[0]) == lines


def test_vague_names_are_told():
  assert vague_names(['m2l2/data/utils.py', 'm2l2/misc', 'launch/common.sh']) == [
      'm2l2/data/utils.py', 'm2l2/misc', 'launch/common.sh']
  assert vague_names(['m2l2/training/optim.py', 'm2l2/data/audio_io.py']) == []


# ---- executed -----------------------------------------------------------------------------------


def run(code):
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_importing_m2l2_imports_nothing_else():
  loaded = run('import sys; before = set(sys.modules); import m2l2; '
               'print(*{name.partition(".")[0] for name in set(sys.modules) - before})')
  assert set(loaded) - sys.stdlib_module_names == {'m2l2'}


def test_inference_runs_without_the_training_libraries():
  loaded = run(f'import sys; import {", ".join(INFERENCE)}; '
               'print(*{name.partition(".")[0] for name in sys.modules})')
  assert 'jax' in loaded
  assert not set(loaded) & set(TRAINING) - {'optax'}
