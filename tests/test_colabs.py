"""The notebooks run from top to bottom: their cells here, with a small model, short clips and no training; else soak.

Then in kernels, with the model in the box, which is trained for fewer steps. As they are, in minutes:
M2L2_COLAB_STEPS=500 python -m pytest -m soak tests/test_colabs.py
"""

import ast
import configparser
from importlib.machinery import PathFinder
import importlib.util
import io
import json
import os
from pathlib import Path
import re
import signal
import sys
import types

import IPython.display
import jax
import nbclient
import nbformat
import numpy as np
import pytest
import soak_resume
from test_codec import ONE_LEVEL, make_params, music
from test_layering import ROOT

from m2l2 import assets, sharding
from m2l2.codec.snapshot import save_snapshot
from m2l2.configs import nano, tiny
from m2l2.data import audio_io
from m2l2.examples import generate

NAMES = sorted(path.stem for path in (ROOT / 'colabs').glob('*.ipynb'))
SETUP = configparser.ConfigParser(interpolation=None)
SETUP.read(ROOT / 'setup.cfg')
REPOSITORY = SETUP['metadata']['url']
STEPS = int(os.environ.get('M2L2_COLAB_STEPS', 6))
# Compiling is most of the work then: done in a hurry, and once for the same program.
QUICK = {'XLA_FLAGS': soak_resume.QUICK,
         'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1'}


def read(name):
  return nbformat.read(ROOT / 'colabs' / f'{name}.ipynb', as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def cell_with(notebook, text):
  (cell,) = (cell for cell in code_cells(notebook) if text in cell.source)
  return cell.source


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where the notebooks run, one after the other.

  The kernel is this Python, from a specification that lies here, whatever kernels the user has registered.
  """
  folder = tmp_path_factory.mktemp('colabs')
  kernel = folder / 'kernels' / 'm2l2-tests'
  kernel.mkdir(parents=True)
  argv = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
  (kernel / 'kernel.json').write_text(json.dumps({'argv': argv, 'display_name': 'tests', 'language': 'python'}))
  environment = {'JUPYTER_PATH': folder, 'IPYTHONDIR': folder / 'ipython', 'JUPYTER_RUNTIME_DIR': folder / 'jupyter'}
  if STEPS < 100:
    cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or folder / 'compiled'
    environment |= {**QUICK, 'JAX_COMPILATION_CACHE_DIR': cache}
  else:
    environment |= {'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, str(value))
    yield folder


@pytest.fixture(scope='module')
def executed(folder):
  """name -> the executed notebook."""
  done = {}

  def execute(name):
    if name not in done:
      done[name] = with_steps(read(name))
      nbclient.NotebookClient(done[name], kernel_name='m2l2-tests', timeout=900, startup_timeout=120,
                              resources={'metadata': {'path': str(folder)}}).execute()
    return done[name]
  return execute


def with_steps(notebook):
  """The notebook; one that trains, for STEPS."""
  training = [cell for cell in code_cells(notebook) if re.search(r'^STEPS = ', cell.source, re.M)]
  for cell in training:
    cell.source = re.sub(r'^STEPS = \d+$', f'STEPS = {STEPS}', cell.source, flags=re.M)
  assert len(training) == any('train(' in cell.source for cell in code_cells(notebook))
  return notebook


def outputs(notebook, kind):
  return [output for cell in code_cells(notebook) for output in cell.outputs if kind in output.get('data', {})]


def printed(notebook):
  return ''.join(output['text'] for cell in code_cells(notebook) for output in cell.outputs
                 if output.output_type == 'stream' and output.name == 'stdout')


def test_there_are_five():
  assert NAMES == ['edit_latents', 'encode_decode', 'generate', 'inspect_latents', 'train_on_your_music']


@pytest.mark.soak
@pytest.mark.parametrize('name, pictures, players', [
    ('edit_latents', 3, 11), ('encode_decode', 3, 5), ('generate', 2, 5), ('inspect_latents', 4, 1),
    ('train_on_your_music', 3, 6)])
def test_it_runs(executed, name, pictures, players):
  notebook = executed(name)
  cells = code_cells(notebook)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  assert not [output for cell in cells for output in cell.outputs if output.output_type == 'error']
  assert len(outputs(notebook, 'image/png')) == pictures
  assert sum('<audio' in output.data['text/html'] for output in outputs(notebook, 'text/html')) == players


def ratios(notebook):
  return [float(value) for value in re.findall(r"'ratio': ([0-9.]+)", printed(notebook))]


@pytest.mark.soak
def test_what_encode_decode_prints(executed, folder):
  notebook = executed('encode_decode')
  text = printed(notebook)
  assert float(text.partition('difference from decode: ')[2].split()[0]) < 1e-5
  assert 'equal: True' in text
  assert (folder / 'song.safetensors').is_file()
  one_step, two_steps, first, whole = ratios(notebook)
  assert max(one_step, two_steps, whole) < first < 0.85  # music, with 2 of 8 embeddings too


@pytest.mark.soak
def test_the_first_embedding_carries_most(executed):
  """As the text says of the model in the box."""
  assert 'without embedding 0,' in printed(executed('inspect_latents'))


@pytest.mark.soak
def test_training_is_stopped_and_goes_on(executed, folder):
  notebook = executed('train_on_your_music')
  workdir = folder / 'runs' / 'mine'
  steps = [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert steps == sorted(set(steps)) and steps[-1] == STEPS
  saved = [int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdecimal()]
  stopped = int(printed(notebook).partition('stopped after ')[2].split()[0])
  assert STEPS // 2 <= stopped < STEPS and stopped % 200  # between planned saves
  assert {stopped, STEPS} <= set(saved)


@pytest.mark.soak
def test_training_begins_with_the_model_in_the_box(executed):
  """After so few steps nothing else would hear anything; and they do change the sound."""
  before, after = (ratios(executed('train_on_your_music'))[half] for half in (slice(0, 2), slice(2, 4)))
  assert max(before + after) < 0.85
  assert before != after


# ---- the cells in this process -------------------------------------------------------------------


def small_config():
  """What test_codec.py compiles, too."""
  config = nano.get_config('debug')
  config.model.update(ONE_LEVEL)
  config.variants.shortcut.width = 2
  config.variants.nested.chance = .5
  return config


def stand_in(config, workdir, writers=()):
  """In place of m2l2.training.loop.train: its lines, its end at Ctrl-C, and other weights than there were."""
  folder, stopped = Path(workdir), []
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'metrics.jsonl').open('a+') as lines:
    lines.seek(0)
    before, step = signal.signal(signal.SIGINT, lambda *_: stopped.append(True)), len(lines.readlines())
    while step < config.train.steps and not stopped:
      step += 1
      lines.write(json.dumps({'step': step, 'loss': 3 / step}) + '\n')
      lines.flush()
      for write in writers:
        write(step, {'loss': 3 / step})
  signal.signal(signal.SIGINT, before)
  plain = json.loads(json.dumps(config.to_dict()))
  save_snapshot(folder / 'snapshot', params=make_params(plain, seed=1), config=plain, step=step)
  return step


@pytest.fixture
def place(tmp_path):
  """A folder with two clips of half a second, and a folder of the two."""
  (tmp_path / 'clips' / 'train').mkdir(parents=True)
  for seed, name in enumerate(('training', 'held_out')):
    audio_io.write(tmp_path / f'{name}.wav', music(22050, channels=2, seed=seed), 44100)
    os.link(tmp_path / f'{name}.wav', tmp_path / 'clips' / 'train' / f'{name}.wav')
  return tmp_path


@pytest.fixture
def run_cells(place, monkeypatch):
  """`run_cells(name)` runs a notebook's cells with those clips: the variables at the end.

  In their folder lies a model of random weights that is called as the one in the box.
  """
  monkeypatch.chdir(place)
  monkeypatch.setattr(assets, 'TRAINING', place / 'training.wav')
  monkeypatch.setattr(assets, 'HELD_OUT', place / 'held_out.wav')
  monkeypatch.setattr(assets, 'CLIPS', place / 'clips')
  monkeypatch.setattr(IPython.display, 'display', lambda *objects, **options: types.SimpleNamespace(
      update=lambda figure: figure.savefig(io.BytesIO())))
  monkeypatch.delitem(sys.modules, 'google.colab', raising=False)

  def run_cells(name):
    config, variables = small_config(), {}
    plain = json.loads(json.dumps(config.to_dict()))
    save_snapshot(place / 'tiny', params=make_params(plain), config=plain, step=7)
    monkeypatch.setattr(tiny, 'get_config', lambda: config)
    monkeypatch.setattr('m2l2.training.loop.train', stand_in)
    for cell in code_cells(with_steps(read(name))):
      lines = [line for line in cell.source.splitlines() if not line.lstrip().startswith(('%', '!'))]
      if 'find_spec' not in cell.source:  # the cell that installs, which test_it_opens_in_colab reads
        exec('\n'.join(lines), variables)
    return variables
  return run_cells


def test_cells_that_encode_and_decode(run_cells, place):
  got = run_cells('encode_decode')
  np.testing.assert_allclose(got['streamed'], got['whole'], atol=1e-5)
  assert len(got['sounds']) == 2 and np.array_equal(got['again'].z, got['latents'].z)
  assert (place / 'song.safetensors').is_file()


def test_cells_that_inspect(run_cells):
  got = run_cells('inspect_latents')
  assert got['change'].shape[0] == got['first'].z.shape[2] > got['most']
  assert np.any(got['dropped'] != got['sound'](got['first']))


def test_cells_that_edit(run_cells):
  got = run_cells('edit_latents')
  assert len(got['between']) == 5 and np.any(got['mixed_first'] != got['mixed_second'])
  assert got['change'] > 0 and len(got['gaps']) == 2
  assert np.any(got['gaps']['its neighbours'] != got['gaps']['nothing told'])


def test_cells_that_generate(run_cells, place, monkeypatch):
  make_mesh, recipe = sharding.make_mesh, generate.Recipe  # eight devices in one process would take turns
  monkeypatch.setattr(sharding, 'make_mesh', lambda **given: make_mesh(**{**given, 'devices': jax.devices()[:1]}))
  monkeypatch.setattr(generate, 'Recipe', lambda **given: recipe(**{**given, 'dim': 16, 'layers': 1, 'cond_dim': 16}))
  got = run_cells('generate')
  assert got['report']['encoded'] == 2 and (place / 'runs/generator/snapshot').is_dir()
  assert len(got['new']) == 2 and got['on'].shape[0] == got['WINDOW']
  assert got['filled'].shape[1] > got['continued'].shape[1] > got['streamed'].shape[1] / 2 > 0


def test_cells_that_train_stop_and_go_on(run_cells, place):
  got = run_cells('train_on_your_music')
  assert STEPS // 2 <= got['stopped'] < STEPS == got['steps']
  lines = [json.loads(line) for line in (place / 'runs/mine/metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
  assert got['codec'].config['train']['init_from'] == 'tiny'
  assert len(got['rows']) == 6 and np.any(got['after'] != got['before']['held out'])


# ---- what is written in them ---------------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_it_is_tidy(name):
  text = (ROOT / 'colabs' / f'{name}.ipynb').read_text(encoding='utf-8')
  notebook = read(name)
  nbformat.validate(notebook)
  assert nbformat.writes(notebook) + '\n' == text
  for cell in code_cells(notebook):
    assert cell.outputs == [] and cell.execution_count is None
    assert not any(line.startswith(('def ', 'class ')) for line in cell.source.splitlines()), 'logic is the package\'s'


@pytest.mark.parametrize('name', NAMES)
def test_no_cell_takes_away_what_another_imports(name):
  """Or that one could not run again."""
  imported, deleted = set(), set()
  for cell in code_cells(read(name)):
    source = re.sub(r'^( *)[%!].*', r'\1pass', cell.source, flags=re.M)
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.Import | ast.ImportFrom):
        imported |= {(alias.asname or alias.name).partition('.')[0] for alias in node.names}
      elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        deleted.add(node.id)
  assert imported and deleted and not imported & deleted


@pytest.mark.parametrize('name', NAMES)
def test_it_opens_in_colab(name):
  owner_and_name = REPOSITORY.removeprefix('https://github.com/')
  link = f'https://colab.research.google.com/github/{owner_and_name}/blob/main/colabs/{name}.ipynb'
  assert read(name).cells[0].source.partition('\n')[0].endswith(f']({link})')
  install = cell_with(read(name), 'pip install')
  assert f"'m2l2[train] @ git+{REPOSITORY}'" in install
  assert install.splitlines()[2].startswith('if ')
  assert all(line.startswith('  ') for line in install.splitlines()[3:])
  assert '-c jax.txt' in install and 'upgrade' not in install  # the jax that is there stays


@pytest.mark.parametrize('name', NAMES)
def test_what_it_takes_for_an_install(name, tmp_path, monkeypatch):
  """Not the folder of a clone, which the folder that holds it has under that name."""
  condition = cell_with(read(name), 'pip install').splitlines()[2].partition('if ')[2].partition(':  #')[0]
  monkeypatch.delitem(sys.modules, 'm2l2')
  (tmp_path / 'clone' / 'm2l2').mkdir(parents=True)
  (tmp_path / 'installed' / 'm2l2').mkdir(parents=True)
  (tmp_path / 'installed' / 'm2l2' / '__init__.py').touch()
  monkeypatch.setattr(sys, 'meta_path', [PathFinder])
  for places, to_install in (([], True), (['clone'], True), (['clone', 'installed'], False), (['installed'], False)):
    monkeypatch.setattr(sys, 'path', [str(tmp_path / place) for place in places])
    assert eval(condition, {'importlib': importlib}) is to_install


@pytest.mark.parametrize('name', NAMES)
def test_on_colab_it_works_on_drive(name, monkeypatch):
  """The cell alone, with a stand-in for Colab's module."""
  done = []
  drive = types.SimpleNamespace(mount=lambda place: done.append(('mount', place)))
  monkeypatch.setitem(sys.modules, 'google.colab', types.SimpleNamespace(drive=drive))
  monkeypatch.setattr(os, 'makedirs', lambda place, exist_ok: done.append(('make', place)))
  monkeypatch.setattr(os, 'chdir', lambda place: done.append(('enter', place)))
  exec(cell_with(read(name), 'drive.mount'), {})
  folder = '/content/drive/MyDrive/m2l2'
  assert done == [('mount', '/content/drive'), ('make', folder), ('enter', folder)]
