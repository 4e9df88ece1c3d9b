"""The train command on good and bad command lines: one clear line and exit code 1."""

import os

import pytest

from m2l2 import main
from m2l2.errors import UserError

TINY = '--config=configs/tiny.py:debug'


def test_presets_are_found_from_any_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  found = main.find_config('configs/tiny.py:debug')
  assert os.path.isabs(found) and found.endswith('tiny.py:debug')
  values = main.parse(['m2l2', TINY, '--config.train.steps=3', '--workdir=w'])
  assert values.config.train.steps == 3 and values.workdir == 'w'


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tiny.py').write_text(
    'import ml_collections\n'
    'def get_config(arg=None):\n'
    '  return ml_collections.ConfigDict({"mine": arg})\n')
  values = main.parse(['m2l2', '--config=tiny.py:word', '--workdir=w'])
  assert values.config.mine == 'word'


def test_parsing_twice_in_one_process_keeps_the_runs_apart():
  first = main.parse(['m2l2', TINY, '--config.seed=1', '--workdir=a'])
  second = main.parse(['m2l2', TINY, '--workdir=b'])
  assert (first.config.seed, second.config.seed) == (1, 0)


def test_help_shows_an_example(capsys):
  assert main.main(['m2l2', '--help']) == 0
  assert 'm2l2 train --config=configs/tiny.py' in capsys.readouterr().out


@pytest.mark.parametrize('arguments, says', [
  ([], '--config=... is missing'),
  ([TINY], '--workdir=... is missing'),
  (['--config=configs/nothing.py', '--workdir=w'], 'presets are base.py'),
  ([TINY + ',nope', '--workdir=w'], "'nope'"),
  ([TINY, '--config.train.nope=1', '--workdir=w'], "has no field 'nope'"),
  ([TINY, '--config.train.stepz=1', '--workdir=w'], "has no field 'stepz' "),
  ([TINY, '--config.nope.steps=1', '--workdir=w'], "has no field 'nope'"),
  ([TINY, '--config.train.steps=many', '--workdir=w'], 'many'),
  ([TINY, '--nope=1', '--workdir=w'], 'nope'),
  ([TINY, 'nope', '--workdir=w'], "'nope'"),
  ([TINY, '--workdir=w'], 'data.root is empty'),
  ([TINY, '--workdir=w', '--config.data.root=nowhere'], 'nowhere'),
  ([TINY, '--workdir=w', '--config.data.source=tape'], 'tape'),
  ([TINY, '--workdir=gs://bucket/run', '--config.data.root=.'], 'gs://bucket/run'),
  ([TINY, '--workdir=w', '--config.data.root=.', '--config.train.batch_size=12'], 'multiple of 8'),
  ([TINY, '--workdir=w', '--config.data.root=.', '--config.train.log_every=0'], 'log_every'),
  ([TINY, '--workdir=w', '--config.data.root=.', '--config.train.probe_every=-1'], 'probe_every'),
  ([TINY, '--workdir=w', '--config.data.root=.', '--config.train.keep_last=0'], 'keep_last'),
  ([TINY, '--workdir=w', '--config.data.root=.', '--config.mesh.fsdp=3'], 'mesh.fsdp=3'),
  ([TINY, '--workdir=w', '--config.data.root=.', '--config.mesh.preset=ddp'], 'ddp'),
  ([TINY, '--workdir=w', '--config.data.root=.', '--config.train.optimizer=sgd'], 'sgd'),
  ([TINY, '--workdir=file/run', '--config.data.root=.'], 'file/run'),
])
def test_a_mistake_is_one_clear_line(arguments, says, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  assert main.main(['m2l2', *arguments]) == 1
  lines = capsys.readouterr().err.splitlines()
  complaints = [line for line in lines if line.startswith('m2l2: ')]
  assert len(complaints) == 1 and complaints[0] == lines[-1] and says in complaints[0]
  assert 'Traceback' not in '\n'.join(lines)


def test_a_config_that_does_not_run_is_one_line(tmp_path):
  (tmp_path / 'broken.py').write_text('def get_config(:\n')
  with pytest.raises(UserError) as error:
    main.parse(['m2l2', f'--config={tmp_path}/broken.py', '--workdir=w'])
  assert '\n' not in str(error.value) and 'broken.py' in str(error.value)
