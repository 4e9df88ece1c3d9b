"""The train command on good and bad command lines: one clear line and exit code 1."""

import functools
import logging
import operator
import os
import sys

import pytest

import m2l2
from m2l2.errors import UserError
from m2l2.training import config_file, main

NANO = '--config=configs/nano.py:debug'


def test_presets_are_found_from_any_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  place = config_file.find('configs/nano.py:debug')
  assert os.path.isabs(place) and place.endswith('nano.py:debug')
  values = main.parse(['m2l2', NANO, '--config.train.steps=3', '--workdir=w'])
  assert values.config.train.steps == 3 and values.workdir == 'w'


@pytest.mark.parametrize('value', ['nano', 'nano.py', 'configs/nano', 'configs/nano.py'])
def test_a_presets_name_is_enough(value, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_file.find(value).endswith('configs/nano.py')


@pytest.mark.parametrize('value', [
  '/no/such/dir/base.py', 'no/base.py', './base.py', '../configs/base.py', 'my/configs/base.py', '/configs/base.py', '',
  'configs', '~/base.py', 'configs/base.py/'])
def test_a_wrong_path_never_becomes_the_preset_of_that_name(value, tmp_path, monkeypatch):
  (tmp_path / 'here/configs').mkdir(parents=True)
  monkeypatch.chdir(tmp_path / 'here')
  monkeypatch.setenv('HOME', str(tmp_path))
  with pytest.raises(UserError, match='there is no such file; the presets are base.py'):
    config_file.find(value)


@pytest.mark.parametrize('folder', ['~', 'TMP'])
def test_which_file_it_is_is_logged(folder, tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(main.logging, 'info', lambda text, *args: said.append(text % args))
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'mine.py').write_text('from m2l2.configs import nano\ndef get_config():\n  return nano.get_config()\n')
  given = f'{folder}/mine.py'.replace('TMP', str(tmp_path))
  assert main.parse(['m2l2', f'--config={given}', '--workdir=w']).config.train.steps == 2000
  assert said == [f'config: {tmp_path}/mine.py']


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'nano.py').write_text(
    'import ml_collections\n'
    'def get_config(arg=None):\n'
    '  return ml_collections.ConfigDict({"mine": arg})\n')
  values = main.parse(['m2l2', '--config=nano.py:word', '--workdir=w'])
  assert values.config.mine == 'word'


def test_parsing_twice_in_one_process_keeps_the_runs_apart():
  first = main.parse(['m2l2', NANO, '--config.seed=1', '--workdir=a'])
  second = main.parse(['m2l2', NANO, '--workdir=b'])
  assert (first.config.seed, second.config.seed) == (1, 0)


def test_help_shows_an_example(capsys):
  assert main.main(['m2l2', '--help']) == 0
  assert 'm2l2 train --config=configs/nano.py' in capsys.readouterr().out


@pytest.mark.parametrize('arguments, says', [
  ([], '--config=... is missing'),
  ([NANO], '--workdir=... is missing'),
  (['--config', 'nano', '--workdir=w'], 'write --config=FILE'),
  ([NANO, '--config=base', '--workdir=w'], 'given 2 times'),
  ([NANO, '--flagfile=flags', '--workdir=w'], '--flagfile is not read'),
  ([NANO, '--workdir=w', '--flagfile', 'flags'], '--flagfile is not read'),
  (['--config=/no/such/dir/base.py', '--workdir=w'], 'no such file'),
  (['--config=configs/nothing.py', '--workdir=w'], 'presets are base.py'),
  (['--config=configs/tiny22.py', '--workdir=w'], 'tiny22 is now tiny (and what was tiny is nano)'),
  (['--config=mono:debug', '--workdir=w'], 'mono is now base'),
  ([NANO + ',nope', '--workdir=w'], "'nope'"),
  ([NANO, '--config.train.nope=1', '--workdir=w'], "has no field 'nope'"),
  ([NANO, '--config.train.stepz=1', '--workdir=w'], "has no field 'stepz'; the nearest is train.steps "),
  ([NANO, '--config.train.steps=None', '--workdir=w'], 'steps=None'),
  ([NANO, '--config.nope.steps=1', '--workdir=w'], "has no field 'nope'"),
  ([NANO, '--config.model.envelope=True', '--workdir=w'],
   '--config.model.envelope: model.envelope is now variants.envelope.on (configs/base.py lists all fields)'),
  ([NANO, '--config.train.steps=many', '--workdir=w'], 'many'),
  ([NANO, '--nope=1', '--workdir=w'], 'nope'),
  ([NANO, 'nope', '--workdir=w'], "'nope'"),
  ([NANO, '--workdir=w'], 'data.root is empty'),
  ([NANO, '--workdir=w', '--config.data.root=nowhere'], 'nowhere'),
  ([NANO, '--workdir=w', '--config.data.source=tape'], 'tape'),
  ([NANO, '--workdir=gs://bucket/run', '--config.data.root=.'], 'gs://bucket/run'),
  ([NANO, '--workdir=w', '--config.data.root=.', '--config.train.batch_size=12'], 'multiple of 8'),
  ([NANO, '--workdir=w', '--config.data.root=.', '--config.train.log_every=0'], 'log_every'),
  ([NANO, '--workdir=w', '--config.data.root=.', '--config.train.probe_every=-1'], 'probe_every'),
  ([NANO, '--workdir=w', '--config.data.root=.', '--config.train.keep_last=0'], 'keep_last'),
  ([NANO, '--workdir=w', '--config.data.root=.', '--config.mesh.fsdp=3'], 'mesh.fsdp=3'),
  ([NANO, '--workdir=w', '--config.data.root=.', '--config.mesh.preset=ddp'], 'ddp'),
  ([NANO, '--workdir=w', '--config.data.root=.', '--config.train.optimizer=sgd'], 'sgd'),
  ([NANO, '--workdir=file/run', '--config.data.root=.'], 'file/run'),
])
def test_a_mistake_is_one_clear_line(arguments, says, tmp_path, monkeypatch, capsys, tone):
  monkeypatch.chdir(tmp_path)
  tone('a.wav', seconds=.1)
  (tmp_path / 'file').write_text('')
  assert main.main(['m2l2', *arguments]) == 1
  lines = capsys.readouterr().err.splitlines()
  complaints = [line for line in lines if line.startswith('m2l2: ')]
  assert len(complaints) == 1 and complaints[0] == lines[-1] and says in complaints[0]
  assert 'Traceback' not in '\n'.join(lines)


def test_a_check_says_what_would_run(tmp_path, monkeypatch, capsys, tone):
  monkeypatch.chdir(tmp_path)
  tone('music/a.wav', seconds=2.)
  arguments = ['m2l2', '--config=nano:debug', '--config.data.root=music', '--workdir=run', '--check']
  assert main.main(arguments) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('config ') and lines[0].endswith('configs/nano.py:debug')
  assert [line.split()[0] for line in lines[1:]] == [
    'devices', 'model', 'data', 'batch', 'run', 'evaluation', 'workdir']
  assert os.listdir(tmp_path) == ['music']
  assert main.main([*arguments, '--multihost']) == 1
  assert 'leave --multihost out' in capsys.readouterr().err
  elsewhere = ['m2l2', '--config=nano:debug', '--config.data.root=/elsewhere', '--workdir=/no/run', '--check=config']
  assert main.main(elsewhere) == 0 and 'data        /elsewhere' in capsys.readouterr().out
  assert main.main([*arguments, '--config.train.batch_size=3']) == 1
  assert main.main([*elsewhere, '--config.train.batch_size=3']) == 1
  complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith('m2l2: ')]
  assert len(complaints) == 2 and all('multiple of 8' in line for line in complaints)


@pytest.mark.parametrize('path, level, passes', [
  ('/home/me/m2l2/.venv/lib/python3.12/site-packages/orbax/checkpoint/manager.py', 'INFO', False),
  ('/home/me/m2l2/.venv/lib/python3.12/site-packages/jax/_src/xla_bridge.py', 'INFO', False),
  ('/home/me/m2l2/.venv/lib/python3.12/site-packages/orbax/checkpoint/manager.py', 'WARNING', True),
  (os.path.join(os.path.dirname(main.__file__), 'loop.py'), 'INFO', True),
  (os.path.join(os.path.dirname(m2l2.__file__), 'data', 'pipeline.py'), 'INFO', True)])
def test_libraries_log_warnings_alone_wherever_they_are(path, level, passes, monkeypatch):
  record, shown = logging.LogRecord('absl', getattr(logging, level), path, 1, 'text', (), None), []

  def train(config, workdir):
    shown.append(bool(main.logging.get_absl_handler().filter(record)))
    return config.train.steps

  monkeypatch.setattr('m2l2.training.loop.train', train)
  assert main.main(['m2l2', NANO, '--workdir=w']) == 0 and shown == [passes]


def test_an_error_that_a_library_logs_is_one_line(monkeypatch):
  try:
    raise OSError(28, 'No space left on device', 'there')
  except OSError:
    record = logging.LogRecord('absl', logging.ERROR, '/lib/site-packages/orbax/checkpoint.py', 1,
                               'Failed to write metadata=%s', ({'a': 1},), sys.exc_info())
  shown = []

  def train(config, workdir):
    handler = main.logging.get_absl_handler()
    shown.append(handler.filter(record) and handler.format(record))
    return config.train.steps

  monkeypatch.setattr('m2l2.training.loop.train', train)
  assert main.main(['m2l2', NANO, '--workdir=w']) == 0
  [text] = shown
  assert text.endswith("checkpoint: [Errno 28] No space left on device: 'there'") and '\n' not in text


OWN = """from m2l2.configs import nano
def get_config(arg=None):
  config = nano.get_config()
  LINE
  return config
"""


@pytest.mark.parametrize('line, says', [
  ('config.train.stepz = 3', "line 4: the config has no field 'stepz'; the nearest is train.steps "),
  ('config.train.update(stepz=3)', "line 4: the config has no field 'stepz'; the nearest is"),
  ('config.consistency.stepz = 3', 'the nearest is consistency.steps '),
  ('config.trian.steps = 3', "line 4: the config has no field 'trian'; the nearest is train "),
  ('config.train.steps = 1e3', 'line 4: steps is a whole number, not 1000.0 (float)'),
  ('config.model.native_rates = 44100', 'line 4: native_rates is a tuple, not 44100 (int)'),
  ('config.seed = None', 'seed=None: it needs a value'),
  ('import nothing_there', "line 4: No module named 'nothing_there'"),
  ('import sys; sys.exit(3)', 'line 4: 3'),
  ('1 / 0', 'line 4: division by zero'),
  ('return', 'returned NoneType'),
  ('config.model.bins = (', 'line 4: '),
  ('config.model.envelope = True', 'line 4: model.envelope is now variants.envelope.on '),
  ('config.consistency.update(skip="flow")', 'line 4: consistency.skip is now variants.flow_skip.on (True for flow) '),
])
def test_what_is_wrong_in_a_config_file_is_one_line_with_its_place(line, says, tmp_path):
  (tmp_path / 'own.py').write_text(OWN.replace('LINE', line))
  with pytest.raises(UserError) as error:
    main.parse(['m2l2', f'--config={tmp_path}/own.py', '--workdir=w'])
  assert '\n' not in str(error.value) and says in str(error.value)
  assert 'own.py' in str(error.value) or 'seed' in says


@pytest.mark.parametrize('name, value', [
  ('variants.packing.tile', 0), ('variants.packing.tile', 'auto'),
  ('train.clip_norm', None), ('train.clip_norm', 2), ('train.clip_norm', .5),
  ('train.learning_rate', 1), ('model.widths', [8, 16])])
def test_fields_take_the_types_one_expects_in_a_file_and_in_a_flag(name, value, tmp_path):
  (tmp_path / 'own.py').write_text(OWN.replace('LINE', f'config.{name} = {value!r}'))
  for arguments in ([f'--config={tmp_path}/own.py'], ['--config=nano', f'--config.{name}={value}']):
    config = main.parse(['m2l2', *arguments, '--workdir=w']).config
    got = functools.reduce(operator.getitem, name.split('.'), config)
    assert got == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize('error, status, says', [
  (OSError(28, 'No space left on device'), 1, 'No space left on device; make room'),
  (PermissionError(13, 'Permission denied', '/data/run\n1'), 1, r'/data/run\n1: Permission denied'),
  (RuntimeError('tensorstore: OS error: No space left on device [...]'), 1, 'No space left on device; make room'),
  (ModuleNotFoundError("No module named 'tensorflow_datasets'", name='tensorflow_datasets'), 1, "'m2l2[train]'"),
  (MemoryError(), 1, 'not enough memory'), (KeyboardInterrupt(), 130, 'stopped')])
def test_a_fault_of_the_machine_in_training_is_one_line(error, status, says, monkeypatch, capsys):
  def train(config, workdir):
    raise error
  monkeypatch.setattr('m2l2.training.loop.train', train)
  assert main.main(['m2l2', '--config=nano:debug', '--workdir=w']) == status
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith('m2l2: ') and says in last


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
  monkeypatch.setattr('m2l2.training.loop.train', lambda config, workdir: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    main.main(['m2l2', '--config=nano:debug', '--workdir=w'])
