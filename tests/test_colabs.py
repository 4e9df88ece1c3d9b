"""The notebooks run from top to bottom, with a model shrunk by M2L2_COLAB_WORDS=debug, in about 40 s together.

As they are, in minutes: M2L2_COLAB_WORDS= python -m pytest tests/test_colabs.py -k runs
"""

import ast
import configparser
import os
import re
import sys
import types

import jupyter_client
import nbclient
import nbformat
import pytest
from test_layering import ROOT

NAMES = sorted(path.stem for path in (ROOT / 'colabs').glob('*.ipynb'))
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / 'setup.cfg')
REPOSITORY = SETUP['metadata']['url']


def read(name):
  return nbformat.read(ROOT / 'colabs' / f'{name}.ipynb', as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where the notebooks run, one after the other: the first trains the model, the others find it."""
  return tmp_path_factory.mktemp('colabs')


@pytest.fixture(scope='module')
def executed(folder):
  """{name: executed notebook}, made as asked for."""
  done = {}

  def execute(name):
    if name not in done:
      done[name] = read(name)
      # This Python is the kernel's, whatever kernels the user has registered.
      manager = jupyter_client.AsyncKernelManager(kernel_name='python3')
      manager.kernel_spec.argv = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
      client = nbclient.NotebookClient(done[name], km=manager, timeout=600, startup_timeout=120,
                                       resources={'metadata': {'path': str(folder)}})
      client.execute(env={**os.environ, 'IPYTHONDIR': str(folder / 'ipython'),
                          'M2L2_COLAB_WORDS': os.environ.get('M2L2_COLAB_WORDS', 'debug')})
    return done[name]
  return execute


def outputs(notebook, kind):
  return [output for cell in code_cells(notebook) for output in cell.outputs if kind in output.get('data', {})]


def printed(notebook):
  return ''.join(output['text'] for cell in code_cells(notebook) for output in cell.outputs
                 if output.output_type == 'stream' and output.name == 'stdout')


def test_there_are_three():
  assert NAMES == ['encode_decode', 'inspect_latents', 'train_on_your_music']


@pytest.mark.parametrize('name, pictures, players', [
    ('encode_decode', 2, 3), ('inspect_latents', 6, 8), ('train_on_your_music', 3, 2)])
def test_it_runs(executed, folder, name, pictures, players):
  notebook = executed(name)
  cells = code_cells(notebook)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  assert not [output for cell in cells for output in cell.outputs if output.output_type == 'error']
  assert len(outputs(notebook, 'image/png')) == pictures
  assert sum('<audio' in output.data['text/html'] for output in outputs(notebook, 'text/html')) == players
  assert (folder / 'runs').is_dir()
