"""The command line: what it makes, what it says, and that a mistake is one line and leaves nothing.

Commands run in this process; two tests start the real program.
"""

import ast
import asyncio
import configparser
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import jax
from matplotlib.figure import Figure
import numpy as np
import pytest
import safetensors.numpy
import soundfile
import tensorstore
from test_codec import CODICODEC_LIKE, load_once, make_snapshot, music
from test_layering import ROOT

from m2l2 import __version__, cli, files
from m2l2.cli import jobs
from m2l2.codec import codec as codec_lib
from m2l2.codec import export, loading
from m2l2.codec.latents import Latents
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation.reports import pictures, report


@pytest.fixture(scope='module', autouse=True)
def compiled_once():
  """A model is compiled for once in a session."""
  patch = pytest.MonkeyPatch()
  patch.setattr(codec_lib, 'load', load_once)
  yield
  patch.undo()


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Snapshots by name: mono, another mono, stereo (with tokens); and a workdir. Of test_codec.py's architectures."""
  root = tmp_path_factory.mktemp('models')
  make_snapshot(root / 'mono')
  make_snapshot(root / 'other', seed=1)
  make_snapshot(root / 'stereo', 'debug,stereo', **CODICODEC_LIKE)
  workdir = root / 'workdir'
  make_snapshot(workdir / 'snapshot')
  (workdir / 'config.json').write_text('{}')
  (workdir / 'metrics.jsonl').write_text(
      '{"step": 6, "loss": 3.5}\n{"step": 7, "loss": 2.5}\n{"step": 7, "probe/swap": 1}\n{"ste')
  for name in ('4', '7', 'tmp'):
    (workdir / 'checkpoints' / name).mkdir(parents=True)
  return root


@pytest.fixture
def folder(tmp_path):
  """Where commands write: must hold just what they promise."""
  path = tmp_path / 'out'
  path.mkdir()
  return path


@pytest.fixture
def m2l2(capsys):
  """Runs one command -> (status, stdout, stderr)."""
  def run(*argv):
    status = cli.main([str(arg) for arg in argv])
    return status, *capsys.readouterr()
  return run


@pytest.fixture
def song(tmp_path):
  def write(name='song.wav', *, samples=5000, channels=1, sample_rate=44100):
    audio = music(samples, channels=channels, sample_rate=sample_rate)
    soundfile.write(tmp_path / name, audio.T, sample_rate, subtype='FLOAT')
    return tmp_path / name
  return write


# ---- what is made --------------------------------------------------------------------------------


@pytest.mark.parametrize('model,channels', [('mono', 1), ('mono', 2), ('stereo', 1), ('stereo', 2)])
def test_round_trip(m2l2, models, song, folder, model, channels):
  source, mid, out = song(channels=channels), folder / 'a.safetensors', folder / 'a.wav'
  checkpoint = f'--checkpoint={models / model}'
  status, said, errors = m2l2('encode', source, mid, checkpoint)
  assert (status, errors) == (0, '') and 'a.safetensors: ' in said
  assert f'0.11 s, {channels} channel' in said and re.search(r'[0-9.]x real time\n$', said)
  assert {'mono': f'{channels * 6 * 64} numbers, ', 'stereo': '160 numbers, '}[model] in said
  assert m2l2('decode', mid, out, checkpoint, '--seed=5')[0] == 0
  assert sorted(os.listdir(folder)) == ['a.safetensors', 'a.wav']
  decoded, rate = audio_io.read(out)
  assert (decoded.shape, rate) == ((channels, 5000), 44100)
  codec = codec_lib.load(models / model)
  audio, _ = audio_io.read(source)
  latents = codec.encode(audio, 44100)
  np.testing.assert_allclose(Latents.load(mid).z, latents.z, atol=1e-6)
  np.testing.assert_allclose(decoded, codec.decode(latents, seed=5), atol=1e-5)
  again = folder / 'again.flac'
  assert m2l2('reconstruct', source, again, checkpoint, '--seed', 5)[0] == 0
  np.testing.assert_allclose(audio_io.read(again)[0], decoded, atol=1e-5)


@pytest.mark.parametrize('flags,options', [
    (['--sigma-cond=0.3'], dict(sigma_cond=0.3)), (['--no-refine'], dict(refine=False)), ([], {})])
def test_decoding_options_reach_the_codec(m2l2, models, song, folder, flags, options):
  out = folder / 'a.wav'
  source = song(channels=2)
  assert m2l2('reconstruct', source, out, f'--checkpoint={models / "mono"}', *flags)[0] == 0
  codec = codec_lib.load(models / 'mono')
  expected = codec.decode(codec.encode(audio_io.read(source)[0], 44100), **options)
  np.testing.assert_allclose(audio_io.read(out)[0], expected, atol=1e-5)


@pytest.mark.parametrize('sample_rate', [8000, 48000])
@pytest.mark.parametrize('samples', [1, 4001])
def test_other_rates_and_lengths(m2l2, models, song, folder, sample_rate, samples):
  source = song(samples=samples, sample_rate=sample_rate)
  out = folder / 'a.wav'
  assert m2l2('reconstruct', source, out, f'--checkpoint={models / "mono"}')[0] == 0
  info = audio_io.info(out)
  assert (info.frames, info.sample_rate, info.channels) == (samples, sample_rate, 1)


@pytest.mark.soak
def test_eight_channels_through_a_mono_model(m2l2, models, song, folder):
  source, out = song(channels=8, samples=900), folder / 'a.wav'
  assert m2l2('reconstruct', source, out, f'--checkpoint={models / "mono"}')[0] == 0
  assert audio_io.info(out).channels == 8


def test_a_workdir_is_a_checkpoint(m2l2, models, song, folder):
  out = folder / 'a.wav'
  assert m2l2('reconstruct', song(), out, '--checkpoint', models / 'workdir', '--quiet') == (
      0, '', '')
  assert os.listdir(folder) == ['a.wav']


def test_tokens(m2l2, models, song, folder):
  mid, checkpoint = folder / 'a.safetensors', f'--checkpoint={models / "stereo"}'
  assert m2l2('encode', song(), mid, checkpoint, '--discrete')[0] == 0
  assert Latents.load(mid).z.dtype == np.int32
  assert '40 tokens' in m2l2('decode', mid, folder / 'a.wav', checkpoint)[1]
  facts = json.loads(m2l2('info', mid, '--json')[1])
  assert facts['form'] == 'tokens' and 'numbers_per_embedding' not in facts


def test_an_old_output_is_replaced_only_by_a_whole_one(m2l2, models, song, folder):
  out = folder / 'a.wav'
  out.write_bytes(b'old')
  checkpoint = f'--checkpoint={models / "mono"}'
  status, _, errors = m2l2('reconstruct', song(), out, checkpoint)  # as with *.wav, where only two match
  assert status == 1 and 'is there already' in one_line(errors)
  assert m2l2('reconstruct', song(), out, checkpoint, '--overwrite', '--sigma-cond=100')[0] == 1
  assert out.read_bytes() == b'old' and os.listdir(folder) == ['a.wav']
  assert m2l2('reconstruct', song(), out, checkpoint, '--overwrite')[0] == 0
  assert audio_io.info(out).frames == 5000


def test_encode_overwrites_nothing_unasked(m2l2, models, song, folder):
  weights, checkpoint = folder / 'model.safetensors', f'--checkpoint={models / "mono"}'
  safetensors.numpy.save_file({'w': np.zeros(3, np.float32)}, weights)
  before = weights.read_bytes()
  for overwrite, expected in (([], 1), (['--overwrite'], 0)):
    status, _, errors = m2l2('encode', song(), weights, checkpoint, *overwrite)
    assert status == expected and (weights.read_bytes() == before) is (expected == 1)
    assert not expected or 'is there already; name another output, or add --overwrite' in one_line(errors)


def test_encode_over_many_goes_on_with_what_is_there(m2l2, models, song, folder):
  first, two = song('one.wav', samples=900), song('two.wav', samples=900)
  command = ('encode', first, two, f'{folder}/', f'--checkpoint={models / "mono"}')
  assert m2l2(*command)[0] == 0
  (folder / 'two.safetensors').unlink()
  before = os.stat(folder / 'one.safetensors').st_mtime_ns
  status, said, errors = m2l2(*command)
  assert (status, errors) == (0, '') and 'one.safetensors: is there already' in said
  assert os.stat(folder / 'one.safetensors').st_mtime_ns == before and (folder / 'two.safetensors').exists()
  status, _, errors = m2l2(*command[:-1], f'--checkpoint={models / "other"}')  # another model's are not it
  assert status == 1 and errors.count('is there already; name another output') == 2


def test_what_is_wrong_with_one_of_many_is_named(m2l2, models, song, folder):
  many = song('many.wav', samples=900, channels=70)
  status, _, errors = m2l2('encode', song(samples=900), many, f'{folder}/', f'--checkpoint={models / "stereo"}')
  assert status == 1 and f'{many}: ' in errors.splitlines()[0] and '70' in errors.splitlines()[0]
  status, _, errors = m2l2('encode', many, folder / 'a.safetensors', f'--checkpoint={models / "stereo"}')
  assert status == 1 and f'{many}: ' in one_line(errors)


# ---- info ----------------------------------------------------------------------------------------


def test_info_of_audio(m2l2, song):
  status, said, _ = m2l2('info', song(channels=2))
  assert status == 0 and '44100' in said and 'WAV' in said
  facts = json.loads(m2l2('info', song(channels=2), '--json')[1])
  assert facts['kind'] == 'audio' and facts['channels'] == 2 and facts['samples'] == 5000
  assert facts['seconds'] == pytest.approx(5000 / 44100)


def test_info_of_latents(m2l2, models, song, folder):
  mid = folder / 'latents.of.a.song'  # known by what is in it
  m2l2('encode', song(), folder / 'a.safetensors', f'--checkpoint={models / "mono"}')
  os.rename(folder / 'a.safetensors', mid)
  facts = json.loads(m2l2('info', mid, '--json')[1])
  assert facts['kind'] == 'latents' and facts['chunks'] == 6 and facts['samples'] == 5000
  assert facts['model'] == codec_lib.load(models / 'mono').fingerprint
  assert facts['samples_per_number'] == pytest.approx(5000 / (6 * 64)) and facts['numbers'] == 6 * 64
  assert facts['kbit_per_second'] == pytest.approx(os.path.getsize(mid) * 8 / 1000 / facts['seconds'], rel=.3)
  assert facts['model'] in m2l2('info', mid)[1]


def test_info_of_checkpoints(m2l2, models):
  facts = json.loads(m2l2('info', models / 'stereo', '--json')[1])
  codec = codec_lib.load(models / 'stereo')
  assert facts['kind'] == 'snapshot' and facts['fingerprint'] == codec.fingerprint
  assert facts['snapshot_step'] == 7 and facts['channels'] == 2
  assert facts['parameters'] == sum(p.size for p in jax.tree.leaves(codec.params))
  assert facts['parameters'] == sum(
      facts[f'parameters_{part}'] for part in ('encoder', 'decoder', 'denoiser'))
  assert facts['samples_per_number'] == pytest.approx(1024 * 2 / 32)
  assert facts['numbers_per_second_of_stereo'] == facts['numbers_per_second']
  facts = json.loads(m2l2('info', models / 'workdir', '--json')[1])
  assert facts['numbers_per_second_of_stereo'] == 2 * facts['numbers_per_second']  # a stream a channel
  assert (facts['kind'], facts['step'], facts['loss']) == ('workdir', 7, 2.5)
  assert facts['checkpoints'] == [4, 7] and facts['snapshot_step'] == 7
  assert '4, 7' in m2l2('info', models / 'workdir')[1]


def test_info_of_a_run_that_has_just_begun(m2l2, tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('')
  facts = json.loads(m2l2('info', tmp_path, '--json')[1])
  assert facts['kind'] == 'workdir' and facts['step'] is None and 'none yet' in facts['snapshot']
  assert m2l2('info', tmp_path)[0] == 0


# ---- mistakes: one line, nothing left ------------------------------------------------------------


def one_line(errors):
  assert errors.count('\n') == 1 and errors.startswith('m2l2') and 'Traceback' not in errors
  return errors


def bad_sources(folder):
  """Files that no command can read, by kind."""
  whole = folder / 'whole.wav'
  soundfile.write(whole, music(50000).T, 44100)
  data = whole.read_bytes()
  nan = music(50000)
  nan[0, 49_000] = np.nan
  sources = {kind: folder / f'{kind}.wav' for kind in (
      'missing', 'empty', 'nan', 'text', 'no_samples')}
  sources |= {'truncated': folder / 'truncated.flac', 'directory': folder}
  sources['empty'].write_bytes(b'')
  sources['text'].write_text('this is no music\n' * 99)
  sources['no_samples'].write_bytes(data[:44])
  soundfile.write(sources['no_samples'], np.zeros((0, 1)), 44100)
  soundfile.write(sources['nan'], nan.T, 44100, subtype='FLOAT')
  soundfile.write(folder / 'whole.flac', music(50000).T, 44100)
  flac = (folder / 'whole.flac').read_bytes()
  sources['truncated'].write_bytes(flac[:len(flac) // 2])
  return sources


@pytest.mark.parametrize('command,name', [
    ('encode', 'a.safetensors'), ('reconstruct', 'a.wav'), ('info', None)])
@pytest.mark.parametrize('kind,told', [
    ('missing', 'no such file'), ('empty', 'is empty'), ('text', 'is not audio'),
    ('no_samples', 'holds no samples'), ('nan', 'NaN or infinite samples, the first at sample 490'),
    ('truncated', 'truncated or damaged'), ('directory', 'give a directory')])
def test_bad_audio(m2l2, models, tmp_path, folder, command, name, kind, told):
  source = bad_sources(tmp_path)[kind]
  if command == 'info':
    argv, told = [source], {'directory': 'no snapshot in'}.get(kind, told)
  else:
    argv = [source, folder / name, f'--checkpoint={models / "mono"}']
  status, said, errors = m2l2(command, *argv)
  if command == 'info' and kind in ('nan', 'truncated'):  # the header is sound, and all it reads
    assert status == 0
    return
  assert status == 1 and said == '' and told in one_line(errors)
  assert str(source) in errors and os.listdir(folder) == []


def test_too_many_channels(m2l2, models, song, folder):
  source = song(channels=8, samples=900)
  status, _, errors = m2l2(
      'reconstruct', source, folder / 'a.wav', f'--checkpoint={models / "stereo"}')
  assert status == 1 and '8 channels, this model takes at most 2' in one_line(errors)
  assert os.listdir(folder) == []


@pytest.mark.parametrize('command,name,told', [
    ('encode', 'missing/a.safetensors', 'there is no directory'),
    ('reconstruct', 'missing/a.wav', 'there is no directory'),
    ('encode', 'locked/a.safetensors', 'is read-only'),
    ('reconstruct', 'locked/a.wav', 'is read-only'),
    ('reconstruct', 'locked.wav', 'is read-only'),
    ('encode', 'a.wav', 'name it *.safetensors'),
    ('reconstruct', 'a.mp3', 'name it *.wav or *.flac or *.ogg'),
    ('reconstruct', 'locked', 'is read-only'),
    ('encode', 'folder', 'is read-only'),
])
def test_outputs_that_cannot_be_written(m2l2, models, song, folder, command, name, told):
  (folder / 'locked').mkdir(mode=0o555)
  (folder / 'folder').mkdir()
  (folder / 'folder' / 'song.safetensors').touch(mode=0o444)
  (folder / 'locked.wav').touch(mode=0o444)
  before = sorted(os.listdir(folder))
  status, said, errors = m2l2(
      command, song(), folder / name, f'--checkpoint={models / "mono"}')
  assert status == 1 and said == '' and told in one_line(errors)
  assert sorted(os.listdir(folder)) == before and os.listdir(folder / 'locked') == []


def test_the_source_is_not_overwritten(m2l2, models, song):
  source = song()
  before = source.read_bytes()
  link = source.with_name('link.wav')
  link.symlink_to(source)
  for target in (source, link):
    status, _, errors = m2l2('reconstruct', source, target, f'--checkpoint={models / "mono"}')
    assert status == 1 and 'is the input too' in one_line(errors)
  assert source.read_bytes() == before


def test_more_channels_than_the_output_takes(m2l2, models, song, folder):
  """Told before the work of encoding, not after it."""
  source = song(channels=9, samples=900)
  status, said, errors = m2l2(
      'reconstruct', source, folder / 'a.flac', f'--checkpoint={models / "mono"}')
  assert status == 1 and 'with 9 channels' in one_line(errors) and os.listdir(folder) == []


def broken_checkpoints(folder, models):
  config = json.loads((models / 'mono' / 'config.json').read_text())
  weights = (models / 'mono' / 'model.safetensors').read_bytes()

  def make(name, config, weights=weights):
    path = folder / name
    path.mkdir()
    (path / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    (path / 'model.safetensors').write_bytes(weights)
    return path

  other = json.loads(json.dumps(config))
  other['config']['model']['num_latents'] = 3
  unknown = json.loads(json.dumps(config))
  unknown['config']['model']['colour'] = 'red'
  (folder / 'empty').mkdir()
  return {
      'missing': folder / 'nowhere', 'empty': folder / 'empty',
      'file': models / 'mono' / 'config.json', 'name': 'grand',
      'not_json': make('not_json', '{'), 'cut': make('cut', config, weights[:999]),
      'no_model': make('no_model', {**config, 'config': {}}), 'other': make('other', other),
      'unknown': make('unknown', unknown)}


@pytest.mark.parametrize('kind,told', [
    ('missing', 'no such snapshot'), ('empty', 'no snapshot in'), ('file', 'is a file'),
    ('name', 'no such snapshot or workdir, nor a model in the box'), ('not_json', 'is not JSON'),
    ('cut', 'damaged or cut short'), ('no_model', 'is not of an m2l2 model'),
    ('other', 'do not fit their config'), ('unknown', 'model.colour is not a field')])
def test_wrong_checkpoints(m2l2, models, song, tmp_path, folder, kind, told):
  checkpoint = broken_checkpoints(tmp_path, models)[kind]
  status, said, errors = m2l2(
      'encode', song(), folder / 'a.safetensors', '--checkpoint', checkpoint)
  assert status == 1 and said == '' and told in one_line(errors)
  assert os.listdir(folder) == []
  if kind in ('not_json', 'cut', 'no_model'):
    status, said, errors = m2l2('info', checkpoint)
    assert status == 1 and said == '' and one_line(errors)


def with_version(path, version):
  with safetensors.safe_open(path, framework='numpy') as file:
    metadata, z = file.metadata(), file.get_tensor('z')
  path.write_bytes(safetensors.numpy.save({'z': z}, {**metadata, 'version': version}))


def test_wrong_latents(m2l2, models, song, folder, tmp_path):
  checkpoint = f'--checkpoint={models / "mono"}'
  mid, out = tmp_path / 'a.safetensors', folder / 'a.wav'
  m2l2('encode', song(), mid, checkpoint)
  whole = mid.read_bytes()

  def refused(path=mid, checkpoint=checkpoint):
    status, said, errors = m2l2('decode', path, out, checkpoint)
    assert status == 1 and said == '' and os.listdir(folder) == []
    return one_line(errors)

  assert 'decode with the checkpoint that encoded them' in refused(
      checkpoint=f'--checkpoint={models / "other"}')
  with_version(mid, '2')
  assert 'latents of version 2' in refused()
  mid.write_bytes(whole[:-3])
  assert 'damaged' in refused()
  assert 'not of m2l2 latents' in refused(models / 'mono' / 'model.safetensors')
  assert 'damaged' in refused(song())
  assert 'no such file' in refused(tmp_path / 'missing.safetensors')
  mid.write_bytes(whole)
  for flag in ('--seed=-1', '--sigma-cond=100'):
    status, _, errors = m2l2('decode', mid, out, checkpoint, flag)
    assert status == 1 and 'must lie in' in one_line(errors) and os.listdir(folder) == []


def test_info_of_what_belongs_to_a_folder(m2l2, models):
  for name, says in (('model.safetensors', 'is part of a snapshot: ask about'), ('config.json', 'name the directory')):
    status, _, errors = m2l2('info', models / 'mono' / name)
    assert status == 1 and says in one_line(errors)


def test_info_of_nothing(m2l2, tmp_path):
  status, _, errors = m2l2('info', tmp_path / 'nothing')
  assert status == 1 and 'there is no such file, snapshot, workdir' in one_line(errors)


@pytest.mark.parametrize('argv,told', [
    (['--colour'], 'COMMAND'), (['encde'], "invalid choice: 'encde'"), (['encode', 'a', 'b'], '--checkpoint'),
    (['encode', '--checkpoint=x'], 'IN, OUT'), (['decode', 'a', 'b', '--seed=x'], '--seed'),
    (['info'], 'FILE_OR_CHECKPOINT'), (['info', 'a', '--colour'], '--colour')])
def test_command_lines_that_are_none(m2l2, argv, told):
  status, said, errors = m2l2(*argv)
  assert status == 2 and said == '' and told in one_line(errors) and '--help' in errors


def test_help_of_the_bare_command_and_the_version(m2l2):
  assert m2l2() == m2l2('--help')
  assert m2l2('--version') == (0, f'm2l2 {__version__}\n', '')


def test_examples_in_the_help_name_models_that_are_there(m2l2):
  commands = re.findall(r'^    ([a-z-]+)', m2l2('--help')[1].partition('commands:')[2], re.M)
  assert {'encode', 'info', 'probe', 'import-codicodec'} <= set(commands)
  for command in ['', *commands]:
    said = '' if command == 'train' else m2l2(*filter(None, [command]), '--help')[1]
    named = re.findall(r'(?:--checkpoint=|m2l2 (?:info|export) )([a-z/]+)(?= |$)', said, re.M)
    for name in named:
      if name != 'runs/codicodec':  # which the line before makes
        assert os.path.isdir(loading.locate(name)), (command, name)
    assert named or command in ('configs', 'plan', 'prepare', 'train')


@pytest.mark.parametrize('command', [
    'train', 'encode', 'decode', 'reconstruct', 'info', None])
def test_help_has_an_example(m2l2, command):
  status, said, errors = m2l2(*filter(None, [command]), '--help')
  assert status == 0 and errors == ''
  assert f'm2l2 {command or "encode"} ' in said.split('\n\n', 1)[1]


def test_presets_and_models_are_listed(m2l2):
  status, said, errors = m2l2('configs')
  names = [path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem != '__init__']
  assert status == 0 and not errors and sorted(line.split()[0] for line in said.splitlines()) == sorted(names)
  assert all(len(line.split()) > 5 for line in said.splitlines())
  status, said, errors = m2l2('models')
  lines = said.splitlines()
  assert status == 0 and len(lines) == 6
  for line, (name, size, distance) in zip((0, 3), (('piano', '8 MiB', 1671), ('tiny', '28 MiB', 283)), strict=True):
    first, quality, card = lines[line:line + 3]
    assert first.startswith(f'{name} ') and ' kHz' in first and size in first
    assert f'Fréchet distance {distance}' in quality and 'Licence: ' in quality and card.strip().startswith('Card: ')


def test_training_is_handed_over(m2l2, tmp_path):
  status, _, errors = m2l2('train', f'--workdir={tmp_path}')
  assert status == 1 and '--config' in one_line(errors)


def test_training_without_its_libraries_is_told(m2l2, monkeypatch):
  monkeypatch.delitem(sys.modules, 'm2l2.training.main', raising=False)
  monkeypatch.delattr('m2l2.training.main', raising=False)
  monkeypatch.setitem(sys.modules, 'ml_collections', None)
  status, _, errors = m2l2('train', '--config=configs/nano.py')
  assert status == 1 and "pip install 'm2l2[train]'" in one_line(errors)


# ---- being stopped -------------------------------------------------------------------------------


@pytest.mark.parametrize('number,status', [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_stopped_in_the_middle_leaves_nothing(
    m2l2, models, song, folder, monkeypatch, request, number, status):
  written = []
  # A shell's background jobs, a CI's among them, inherit SIGINT ignored, those under nohup SIGHUP.
  handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
  inherited = signal.signal(number, handler)
  request.addfinalizer(lambda: signal.signal(number, inherited))

  def write(self, audio):
    written.append(sorted(os.listdir(folder)))
    signal.raise_signal(number)

  monkeypatch.setattr(audio_io.AudioWriter, 'write', write)
  before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]
  result = m2l2('reconstruct', song(), folder / 'a.wav', f'--checkpoint={models / "mono"}')
  assert result[0] == status and 'Traceback' not in result[2]
  assert len(written) == 1 and len(written[0]) == 1  # there was a temporary file
  assert os.listdir(folder) == [] and before == [
      signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize('moment', ['import', 'collection'])
def test_a_signal_at_a_bad_moment_waits_for_a_better_one(m2l2, tmp_path, monkeypatch, moment, number, status):
  done = []

  class Collected:
    def __del__(self):
      if not done:
        done.append('collected')
        signal.raise_signal(number)

  def facts(path):
    if moment == 'import':
      name = f'stopped_by_{number}'
      (tmp_path / f'{name}.py').write_text(f'import signal; signal.raise_signal({int(number)}); whole = True')
      monkeypatch.syspath_prepend(tmp_path)
      done.append(importlib.import_module(name).whole)
    else:
      Collected()
    time.sleep(5)
    return {}

  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    monkeypatch.setattr('m2l2.cli.info.facts', facts)
    began = time.monotonic()
    result = m2l2('info', 'any')
  finally:
    signal.signal(signal.SIGINT, before)
  assert result[0] == status and len(done) == 1 and time.monotonic() - began < 4
  assert result[2] == ('m2l2: stopped\n' if number == signal.SIGINT else '')


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_training_that_is_stopped_before_its_first_step_takes_away_what_it_made(m2l2, folder, monkeypatch, number,
                                                                               status):
  def train(config, workdir):
    with files.locked(folder / '.lock', command='m2l2 train', place='here'):
      signal.raise_signal(number)

  monkeypatch.setattr('m2l2.training.loop.train', train)
  assert m2l2('train', '--config=nano:debug', f'--workdir={folder}')[0] == status
  assert os.listdir(folder) == []


def test_a_write_that_ends_after_its_save_has_prints_nothing(m2l2, tmp_path, monkeypatch):
  printed = []
  monkeypatch.setattr(sys, 'unraisablehook', lambda lost: printed.append(str(lost.exc_value)))

  def train(config, workdir):
    promise, written = tensorstore.Promise.new()

    async def write():
      await written

    loop = asyncio.new_event_loop()
    task = loop.create_task(write())
    loop.run_until_complete(asyncio.sleep(0))
    task._log_destroy_pending = False
    loop.close()
    thread = threading.Thread(target=promise.set_result, args=[None])
    thread.start()
    thread.join()
    time.sleep(0.1)  # TensorStore calls back on a thread of its own
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('m2l2.training.loop.train', train)
  status, _, errors = m2l2('train', '--config=nano:debug', f'--workdir={tmp_path}')
  assert status == 1 and 'No space left' in errors and not printed


@pytest.mark.parametrize('name', ['latents', 'report', 'picture', 'export'])
def test_what_a_killed_writer_left_is_taken_away_by_the_next_run(name, folder, monkeypatch):
  target = folder / 'made'
  latents = Latents(z=np.zeros((1, 1, 2, 3), np.float32), sample_rate=44100, num_samples=5, channels=1, model='m')
  monkeypatch.setattr(export, 'programs', lambda *args, **options: {})
  monkeypatch.setattr(export, 'first_state', lambda codec: {'tail': np.zeros((1, 1, 8), np.float32)})
  codec = mock.MagicMock(params={}, config={}, fingerprint='', native_rates=(44100,))
  write = {
      'latents': lambda: latents.save(target), 'report': lambda: report.write_json(target, {}),
      'picture': lambda: pictures.save(Figure(figsize=(1, 1)), target),
      'export': lambda: export.export_stablehlo(codec, target)}[name]
  with monkeypatch.context() as patch:  # as if it were killed before the last step
    patch.setattr(json, 'dumps', lambda *args, **options: '{}')
    for step in ('os.replace', 'os.rename', 'os.unlink', 'os.remove', 'shutil.rmtree'):
      patch.setattr(step, lambda *args, **options: None)
    write()
  left = os.listdir(folder)
  assert left and all(name.startswith('.') and name.endswith('.part') for name in left)
  check = (lambda: export.check_target(target)) if name == 'export' else (
      lambda: audio_io.check_writable(target, extensions=None))
  check()
  assert os.listdir(folder) == left  # its process lives
  monkeypatch.setattr(files, '_began', lambda pid: None)
  check()
  assert os.listdir(folder) == []


# ---- the real program ----------------------------------------------------------------------------


def program(*argv, **environment):
  environment = {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', **environment}
  return subprocess.run([sys.executable, '-m', 'm2l2', *map(str, argv)], cwd=ROOT, text=True,
                        capture_output=True, env=environment)


@pytest.mark.soak
def test_the_program(models, song, folder):
  """As test_pipes does for every run of the suite."""
  done = program('reconstruct', song(), folder / 'a.wav', f'--checkpoint={models / "mono"}')
  said = [line for line in done.stderr.splitlines() if not line.startswith('m2l2: compiling')]  # on a busy machine
  assert (done.returncode, said) == (0, [])  # no bar where there is no terminal
  assert audio_io.info(folder / 'a.wav').frames == 5000


def test_the_programs_mistake(folder):
  done = program('reconstruct', folder / 'none.wav', folder / 'b.wav', '--checkpoint=none')
  assert done.returncode == 1 and done.stdout == '' and 'no such file' in one_line(done.stderr)


def test_help_is_immediate():
  code = ('import sys; from m2l2 import cli; cli.main(["--help"]); '
          'print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)')
  start = time.monotonic()
  done = subprocess.run(
      [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert not {'jax', 'numpy', 'flax', 'absl', 'soundfile', 'tqdm'} & set(done.stderr.split())
  assert time.monotonic() - start < 10  # 0.1 s on a machine of one's own


def test_warnings_are_one_line_each():
  code = ('from m2l2.cli import terminal; from absl import logging; terminal.quiet_libraries(); '
          'logging.warning("so"); logging.info("no")')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stderr == 'm2l2: so\n'


def test_no_device_is_told(models, song, folder):
  done = program('encode', song(), folder / 'a.safetensors', f'--checkpoint={models / "mono"}',
                 JAX_PLATFORMS='marsrover')
  assert done.returncode == 1 and 'JAX finds no device' in one_line(done.stderr)


# ---- many files, pipes, devices ------------------------------------------------------------------


def test_a_folder_goes_there_and_back(m2l2, models, song, tmp_path, folder):
  (tmp_path / 'music/b').mkdir(parents=True)
  lengths = {'a.wav': 3000, 'b/a.flac': 5000, 'b/c.wav': 900}
  for name, samples in lengths.items():
    audio_io.write(tmp_path / 'music' / name, music(samples), 44100)
  (tmp_path / 'music/broken.wav').write_text('no audio')
  checkpoint = f'--checkpoint={models / "mono"}'
  status, said, errors = m2l2('encode', tmp_path / 'music', folder / 'z', checkpoint)
  assert status == 1 and len(said.splitlines()) == 3
  assert 'broken.wav: is not audio' in errors and errors.splitlines()[-1] == (
      'm2l2: 1 of 4 files were skipped; the others are done')
  status, _, errors = m2l2('decode', f'{folder}/z/**/*.safetensors', folder / 'out', checkpoint, '--format=flac',
                           '--batch=2')
  assert (status, errors) == (0, '')
  codec = codec_lib.load(models / 'mono')
  for name, samples in lengths.items():
    stem = os.path.splitext(name)[0]
    together = audio_io.read(folder / 'out' / f'{stem}.flac')[0]
    np.testing.assert_allclose(together, codec.decode(Latents.load(folder / 'z' / f'{stem}.safetensors')), atol=1e-5)
    assert together.shape == (1, samples)
  status, _, errors = m2l2('encode', tmp_path / 'music', '-', checkpoint)
  assert status == 1 and 'takes one file' in one_line(errors)
  status, _, errors = m2l2('reconstruct', tmp_path / 'music', tmp_path / 'music/again', checkpoint)
  assert status == 1 and 'would be an input the next time' in one_line(errors)
  assert not (tmp_path / 'music/again').exists()
  for flags in (['--checkpoint=none'], [checkpoint, '--discrete'], [checkpoint, '--embeddings=99']):
    status, _, errors = m2l2('encode', tmp_path / 'music', folder / 'none', *flags)  # once, not for each file
    assert status == 1 and 'passed over' not in one_line(errors) and not (folder / 'none').exists()
  # A loop of links changes nothing; one file there is broken.
  (tmp_path / 'music/loop').symlink_to(tmp_path / 'music')
  assert len(jobs.find_jobs([str(tmp_path / 'music')], 'out', inputs=jobs.AUDIO, output='.wav')) == len(lengths) + 1
  (tmp_path / 'music/loop').unlink()
  status, _, errors = m2l2('encode', f'{tmp_path}/*.mp3', folder / 'none', checkpoint)
  assert status == 1 and 'no files there' in one_line(errors) and not (folder / 'none').exists()


def planned(*given, target='out', inputs=('.wav', '.flac', '.mp3')):
  """{output: source}, both relative to the working directory."""
  return {job.target: job.source for job in jobs.find_jobs(given, target, inputs=inputs, output='.z')}


def test_which_files_and_what_becomes_of_them(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('d/a.wav', 'd/e/b.WAV', 'd/.hidden/c.wav', 'Live [1999]/x.wav', 'Live [1999]/cd1/y.wav', 'Live 1/z.wav'):
    os.makedirs(os.path.dirname(name), exist_ok=True)
    open(name, 'w').close()
  # Two loops of links: followed, a walk of them would not end.
  os.symlink(tmp_path / 'd', 'd/e/one')
  os.symlink(tmp_path / 'd', 'd/e/two')
  both = {'out/a.z': 'd/a.wav', 'out/e/b.z': 'd/e/b.WAV'}
  assert planned('d') == planned('d/**/*.[wW]*') == both
  # A name with brackets is a name where there is such a thing, and the tree below it stays.
  tree = {'out/x.z': 'Live [1999]/x.wav', 'out/cd1/y.z': 'Live [1999]/cd1/y.wav'}
  assert planned('Live [1999]') == planned('Live [1999]/') == planned('Live [1999]/**/*.wav') == {
      target: source for target, source in tree.items()}
  assert planned('Live [12]/*.wav') == {'out/Live 1/z.z': 'Live 1/z.wav'}
  # One song in two formats: names apart, those of the others as ever.
  for name in ('d/a.flac', 'd/e/a.flac'):
    open(name, 'w').close()
  assert planned('d') == planned('d', 'd/a.wav') == {
      'out/a.wav.z': 'd/a.wav', 'out/a.flac.z': 'd/a.flac', 'out/e/a.z': 'd/e/a.flac', 'out/e/b.z': 'd/e/b.WAV'}
  with pytest.raises(UserError, match='would both become'):
    planned('d/a.flac', 'd/e/a.flac')


def test_pipes_by_name(m2l2, models, song, folder, tmp_path, monkeypatch):
  """As a shell's <(...) and >(...), and /dev/stdin, which may be a file as well."""
  import io
  import threading
  source, pipe, checkpoint = song(samples=2000), tmp_path / 'pipe', f'--checkpoint={models / "mono"}'
  os.mkfifo(pipe)
  feeding = threading.Thread(target=lambda: pipe.write_bytes(source.read_bytes()))
  feeding.start()
  assert m2l2('encode', pipe, folder / 'a.safetensors', checkpoint)[0] == 0
  feeding.join()
  expected = Latents.load(folder / 'a.safetensors')
  assert expected.num_samples == 2000
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(source.read_bytes())))
  assert m2l2('encode', '/dev/stdin', folder / 'b.safetensors', checkpoint)[0] == 0
  np.testing.assert_array_equal(Latents.load(folder / 'b.safetensors').z, expected.z)
  received = []
  reading = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
  reading.start()
  assert m2l2('encode', source, pipe, checkpoint)[0] == 0
  reading.join()
  (folder / 'c.safetensors').write_bytes(received[0])
  np.testing.assert_array_equal(Latents.load(folder / 'c.safetensors').z, expected.z)
  feeding = threading.Thread(target=lambda: pipe.write_bytes(b'no audio'))
  feeding.start()
  status, _, errors = m2l2('encode', pipe, folder / 'd.safetensors', checkpoint)
  feeding.join()
  assert status == 1 and one_line(errors).startswith(f'm2l2: {pipe}: is not audio')


def test_info_of_what_comes_through_a_pipe(m2l2, song, tmp_path, monkeypatch):
  import io
  import threading
  source, pipe = song(samples=2000), tmp_path / 'pipe'
  os.mkfifo(pipe)
  feeding = threading.Thread(target=lambda: pipe.write_bytes(source.read_bytes()), daemon=True)
  feeding.start()
  status, out, *_ = m2l2('info', pipe, '--json')
  facts = json.loads(out)
  assert status == 0 and facts['samples'] == 2000 and facts['path'] == str(pipe)
  feeding.join()
  for name in ('-', '/dev/stdin'):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(source.read_bytes())))
    facts = json.loads(m2l2('info', name, '--json')[1])
    assert facts['samples'] == 2000 and facts['path'] == 'standard input'


# As many devices as this process has: only then what it has compiled is found in the cache.
ENVIRONMENT = {**os.environ, 'JAX_NUM_CPU_DEVICES': '8'}


def test_pipes(models, song, folder):
  source = song(samples=2000)
  checkpoint = f'--checkpoint={models / "mono"}'
  stated = bytearray(source.read_bytes())
  for what in (b'RIFF', b'data'):  # as it comes from a program that does not know the length beforehand
    place = stated.index(what) + 4
    stated[place:place + 4] = b'\xff\xff\xff\xff'
  command = [sys.executable, '-m', 'm2l2', 'encode', '-', '-', checkpoint]
  latents = subprocess.run(command, input=bytes(stated), capture_output=True, check=True, env=ENVIRONMENT)
  assert b'standard' not in latents.stdout[:8] and b' numbers, ' in latents.stderr
  (folder / 'piped').write_bytes(latents.stdout)
  expected = codec_lib.load(models / 'mono').encode(music(2000), 44100).z
  np.testing.assert_allclose(Latents.load(folder / 'piped').z, expected, atol=1e-5)
  command[3] = 'decode'
  audio = subprocess.run(command, input=latents.stdout, capture_output=True, check=True, env=ENVIRONMENT).stdout
  (folder / 'piped.wav').write_bytes(audio)
  assert audio_io.info(folder / 'piped.wav').frames == 2000


@pytest.mark.parametrize('sink', ['> /dev/full', pytest.param('| head -c 10', marks=pytest.mark.soak)])
def test_a_pipe_that_ends(m2l2, models, song, folder, sink):
  mid, checkpoint = folder / 'a.safetensors', f'--checkpoint={models / "mono"}'
  assert m2l2('encode', song(samples=2000), mid, checkpoint)[0] == 0
  line = f'{shlex.join([sys.executable, "-m", "m2l2", "decode", str(mid), "-", checkpoint, "--quiet"])} {sink}'
  done = subprocess.run(['bash', '-o', 'pipefail', '-c', line], capture_output=True, check=False, env=ENVIRONMENT)
  if done.returncode:  # a short piece may go through before head ends
    assert b'standard output: not all could be written' in done.stderr and done.stderr.count(b'\n') == 1
  assert done.returncode or 'full' not in sink


def full(tmp_path):
  return open('/dev/full', 'w', encoding='utf-8')


def without_reader(tmp_path):
  reader, writer = os.pipe()
  os.close(reader)
  return open(writer, 'w', encoding='utf-8')


@pytest.mark.parametrize('make, status, told', [
    (full, 1, 'standard output: not all could be written (No space left on device)'),
    (without_reader, 141, 'standard output: not all could be written (Broken pipe)'),
    (lambda tmp_path: None, 1, 'standard output is closed')])
@pytest.mark.parametrize('argv', [('info', 'SONG'), ('info', 'SONG', '--json'), ('--help',), ('info', '--help')])
def test_output_that_goes_nowhere_is_one_line(make, status, told, argv, song, tmp_path, monkeypatch, capsys):
  stream = make(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(sys, 'stdout', stream)
    result = cli.main([arg.replace('SONG', str(song())) for arg in argv])
    if stream:
      stream.close()  # the interpreter does: nothing is left to be said
  if stream is None and '--help' in argv[-1]:
    return  # argparse sees to it
  assert result == status and told in one_line(capsys.readouterr().err)


@pytest.mark.parametrize('gone', [('stderr',), ('stdout', 'stderr')])
def test_errors_that_nobody_reads_change_no_status(gone, song, tmp_path, monkeypatch):
  streams = {name: without_reader(tmp_path) for name in gone}
  with monkeypatch.context() as patch:
    for name, stream in streams.items():
      patch.setattr(sys, name, stream)
    patch.setattr(cli.terminal, 'quiet_libraries', lambda: print('a line of the log', file=sys.stderr, end=''))
    both = len(gone) == 2
    assert cli.main(['info', str(song()) if both else 'nothing']) == (141 if both else 1)
  for stream in streams.values():
    stream.close()  # as the interpreter does: it fails with 120 where that fails


def test_closed_streams_of_the_real_program_are_one_line(song):
  """What is opened in the place of a closed stream would get what is printed."""
  python = shlex.join([sys.executable, '-m', 'm2l2'])
  lines = [f'{python} --help > /dev/full', f'{python} info {shlex.quote(str(song()))} <&- >&-']
  for line, says in zip(lines, ('No space left on device', 'standard output is closed')):
    done = subprocess.run(['bash', '-c', line], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 1 and says in one_line(done.stderr) and not done.stdout


def test_pipes_that_are_closed_and_a_temporary_folder_that_is_not_there(m2l2, folder, monkeypatch):
  argv = 'encode', '-', folder / 'a.safetensors', '--checkpoint=none'
  with monkeypatch.context() as patch:
    patch.setattr(sys, 'stdin', None)
    status, _, errors = m2l2(*argv)
  assert status == 1 and 'standard input is closed' in one_line(errors)
  monkeypatch.setattr('tempfile.tempdir', str(folder / 'nowhere'))
  status, _, errors = m2l2(*argv)
  assert status == 1 and 'nowhere' in one_line(errors) and 'No such file or directory' in errors


def test_names_that_the_locale_has_not_are_printed(folder, monkeypatch):
  with audio_io.AudioWriter(folder / 'a.flac', 44100, 1, tags={'title': 'Größe'}) as writer:
    writer.write(music(2000))
  buffer = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(buffer, encoding='ascii'))
  assert cli.main(['info', str(folder / 'a.flac')]) == 0
  assert rb'Gr\xf6\xdfe' in buffer.getvalue()


def test_the_home_folder_is_found_in_any_argument(m2l2, song, monkeypatch):
  monkeypatch.setenv('HOME', str(song().parent))
  assert m2l2('info', '~/song.wav')[0] == 0
  status, _, errors = m2l2('encode', '~/song.wav', '~/song.safetensors', '--checkpoint=~/none')
  assert status == 1 and str(song().parent) in one_line(errors) and '~' not in errors


def test_a_folder_goes_on_after_a_file_that_may_not_be_read(m2l2, song, folder, monkeypatch):
  written = []

  class Made:
    seconds = 1.0

    def words(self):
      return '1 s'

    def save(self, path):
      written.append(os.path.basename(path))

  def encode(codec, info, **options):
    if 'a.wav' in info.path:
      raise PermissionError(13, 'Permission denied', '/else\nwhere')
    return Made()

  monkeypatch.setattr(cli.coding, '_encoder', lambda args: 'codec')
  monkeypatch.setattr(cli.coding, 'encode_file', encode)
  (folder.parent / 'in').mkdir()
  song('in/a.wav'), song('in/b.wav')
  status, _, errors = m2l2('encode', folder.parent / 'in', folder, '--checkpoint=none')
  assert status == 1 and written == ['b.safetensors']
  first, last = errors.splitlines()
  assert first.startswith('m2l2: ') and first.endswith(r'in/a.wav: /else\nwhere: Permission denied')
  assert last == 'm2l2: 1 of 2 files were skipped; the others are done'


def test_a_folder_ends_at_a_full_disk(m2l2, song, folder, monkeypatch):
  tried = []

  def encode(codec, info, **options):
    tried.append(os.path.basename(info.path))
    raise UserError('a.safetensors: could not be written (No space left on device)')

  monkeypatch.setattr(cli.coding, '_encoder', lambda args: 'codec')
  monkeypatch.setattr(cli.coding, 'encode_file', encode)
  (folder.parent / 'in').mkdir()
  song('in/a.wav'), song('in/b.wav')
  status, _, errors = m2l2('encode', folder.parent / 'in', folder, '--checkpoint=none')
  assert status == 1 and tried == ['a.wav']
  assert one_line(errors).endswith('(No space left on device); make room and run the same command again\n')


NEEDED = [
    (('train', '--config=nano', '--workdir=w'), 'clu', 'train'),
    (('train', '--config=nano', '--workdir=w'), 'orbax.checkpoint', 'train'),
    (('prepare', '--input=a', '--output=b'), 'apache_beam', 'beam'),
    (('encode-dataset', '--source=a', '--checkpoint=b', '--output=c'), 'tensorflow_datasets', 'train'),
    (('evaluate', '--reference=a', '--estimate=b', '--output=c.json', '--html=c.html'), 'matplotlib', 'eval'),
    (('evaluate', '--reference=a', '--estimate=b', '--output=c.json'), 'scipy', 'eval'),
    (('sweep-sigma-cond', '--reference=a', '--checkpoint=b', '--output=c.json'), 'matplotlib', 'eval'),
    (('probe', '--checkpoint=b', '--music=a', '--output=c.json'), 'optax', 'eval'),
    (('probe', '--checkpoint=b', '--music=a', '--output=c.json'), 'sklearn', 'eval'),
    (('export', 'a', '--output=b'), 'flatbuffers', 'export'),
    (('plan', '--topology=v5e:16x16', '--config=nano'), 'optax', 'train,tpu')]


@pytest.mark.parametrize('argv, module, extra', NEEDED)
def test_a_missing_extra_is_told_before_any_work(m2l2, monkeypatch, argv, module, extra):
  monkeypatch.setitem(sys.modules, module, None)
  status, _, errors = m2l2(*argv)
  assert status == 1 and f"needs {module}, which is not installed: pip install 'm2l2[{extra}]'" in one_line(errors)


def test_extras_bring_what_commands_ask_for():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  files = (ROOT / 'm2l2' / 'cli').glob('*.py')
  calls = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding='utf-8')))
           if isinstance(node, ast.Call) and ast.unparse(node.func) == 'extras.require']
  assert len(calls) >= 7
  for call in calls:
    names = [node.value for arg in call.args[1:] for node in ast.walk(arg) if isinstance(node, ast.Constant)]
    extra, *modules = [name for name in names if isinstance(name, str)]
    brought = setup['options']['install_requires'] + ''.join(
        setup['options.extras_require'].get(name, '') for name in extra.split(','))
    for module in modules:
      package = {'absl': 'absl-py', 'orbax.checkpoint': 'orbax-checkpoint', 'sklearn': 'scikit-learn'}.get(
          module, module)
      assert re.search(rf'^{re.sub("[-_]", "[-_]", package)}\b', brought, re.M), (extra, module)


@pytest.mark.soak
def test_an_empty_pipe_is_told(models):
  command = [sys.executable, '-m', 'm2l2', 'encode', '-', '-', f'--checkpoint={models / "mono"}']
  done = subprocess.run(command, input=b'', capture_output=True, check=False)
  assert done.returncode == 1 and done.stderr.startswith(b'm2l2: standard input: is empty')


def test_tags_are_kept(m2l2, models, folder):
  tags = {'title': 'Größe', 'artist': 'Somebody', 'tracknumber': '3'}
  with audio_io.AudioWriter(folder / 'a.flac', 44100, 1, tags=tags) as writer:
    writer.write(music(2000))
  checkpoint = f'--checkpoint={models / "mono"}'
  assert m2l2('encode', folder / 'a.flac', folder / 'a.safetensors', checkpoint)[0] == 0
  assert m2l2('decode', folder / 'a.safetensors', folder / 'b.ogg', checkpoint)[0] == 0
  assert m2l2('reconstruct', folder / 'a.flac', folder / 'c.wav', checkpoint)[0] == 0
  assert audio_io.info(folder / 'b.ogg').tags == tags
  assert audio_io.info(folder / 'c.wav').tags.items() <= tags.items()
  assert 'Somebody' in m2l2('info', folder / 'a.safetensors')[1]


def test_too_loud_is_clipped_and_told_or_scaled(folder, caplog):
  loud = np.float32([[0.5, -2.0, 1.0, 0.25]])
  for normalize, expected in ((False, [0.5, -1, 1, 0.25]), (True, [0.25, -1, 0.5, 0.125])):
    caplog.clear()
    with audio_io.AudioWriter(folder / 'a.wav', 44100, 1, normalize=normalize) as writer:
      writer.write(loud[:, :1])
      writer.write(loud[:, 1:])
    np.testing.assert_allclose(audio_io.read(folder / 'a.wav')[0][0], expected, atol=1e-6)
    assert ('1 samples beyond' in caplog.text) is not normalize
  assert os.listdir(folder) == ['a.wav']


def test_m4a_is_read(m2l2, models, folder):
  import av
  audio = music(30000)
  with av.open(str(folder / 'a.m4a'), 'w') as container:
    stream = container.add_stream('aac', rate=44100, layout='mono', bit_rate=256000)
    container.metadata['title'] = 'A title'
    for start in range(0, 30000, 1024):
      block = np.ascontiguousarray(audio[:, start:start + 1024])
      frame = av.AudioFrame.from_ndarray(block, format='fltp', layout='mono')
      frame.sample_rate, frame.pts = 44100, start
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  read, rate = audio_io.read(folder / 'a.m4a')
  assert rate == 44100 and read.shape[0] == 1 and abs(read.shape[1] - 30000) < 2048
  assert np.abs(read[0, 3000:25000] - audio[0, 3000:25000]).max() < 0.1 * np.abs(audio).max()
  assert m2l2('reconstruct', folder / 'a.m4a', folder / 'b.flac', f'--checkpoint={models / "mono"}')[0] == 0
  info = audio_io.info(folder / 'b.flac')
  assert info.frames == read.shape[1] and info.tags == {'title': 'A title'}
  (folder / 'broken.m4a').write_bytes((folder / 'a.m4a').read_bytes()[:300])
  status, _, errors = m2l2('info', folder / 'broken.m4a')
  assert status == 1 and 'is not audio that can be read here' in one_line(errors)


def test_m4a_without_av_is_told(m2l2, folder, monkeypatch):
  (folder / 'a.m4a').write_bytes(bytes(100))
  monkeypatch.setitem(sys.modules, 'av', None)
  assert "pip install 'm2l2[av]'" in one_line(m2l2('info', folder / 'a.m4a')[2])


@pytest.mark.parametrize('device,told', [('warp', 'no warp'), ('cpu:99', 'counted from 0'), ('cpu:x', 'KIND:N')])
def test_devices_that_are_not_there(m2l2, models, song, folder, device, told):
  status, _, errors = m2l2('encode', song(), folder / 'a.safetensors', f'--checkpoint={models / "mono"}',
                           f'--device={device}')
  assert status == 1 and told in one_line(errors) and os.listdir(folder) == []


def test_a_device_is_chosen(m2l2, models, song, folder):
  before = jax.config.jax_default_device
  try:
    assert m2l2('encode', song(), folder / 'a.safetensors', f'--checkpoint={models / "mono"}', '--device=cpu:3')[0] == 0
    assert jax.config.jax_default_device == jax.devices()[3]
  finally:
    jax.config.update('jax_default_device', before)


@pytest.mark.soak
def test_60_lengths_take_five_compilations(models, tmp_path):
  """Of a program that starts with nothing compiled; in test_codec.py, what is compiled serves other lengths."""
  program = """
import sys
import jax, numpy as np, soundfile
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **more: compiled.append(name) if name.endswith('backend_compile_duration') else None)
from m2l2 import cli
rng = np.random.default_rng(0)
for i, samples in enumerate(np.exp(np.linspace(0, np.log(30000), 60)).astype(int)):
  soundfile.write(f'{sys.argv[2]}/{i:02d}.wav', 0.1 * rng.standard_normal(samples), 44100)
assert cli.main(['reconstruct', sys.argv[2], sys.argv[2] + '-out', f'--checkpoint={sys.argv[1]}', '--quiet']) == 0
print(len(compiled))
"""
  (tmp_path / 'music').mkdir()
  done = subprocess.run(
      [sys.executable, '-c', program, str(models / 'mono'), str(tmp_path / 'music')], capture_output=True, text=True,
      check=False, env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': ''})
  assert done.returncode == 0, done.stderr
  assert len(os.listdir(tmp_path / 'music-out')) == 60 and int(done.stdout) <= 6, done.stdout


# ---- features and what is alike ------------------------------------------------------------------


def test_features_are_a_file_that_numpy_reads(m2l2, models, song, folder):
  checkpoint, out = f'--checkpoint={models / "mono"}', folder / 'a.npz'
  assert m2l2('encode', song(samples=30000), out, checkpoint, '--features')[0] == 0
  codec = codec_lib.load(models / 'mono')
  latents = codec.encode(song(samples=30000))
  with np.load(out, allow_pickle=False) as stored:
    assert sorted(stored) == ['features', 'model', 'times'] and stored['model'] == codec.fingerprint
    np.testing.assert_allclose(stored['features'], codec.features(latents), atol=1e-6)
    chunk = codec.representation.chunk_samples / 44100
    times = stored['times']
    assert times.dtype == np.float64 and times[0] == 0 and len(times) == latents.z.shape[1]
    assert times[-1] < 30000 / 44100
    np.testing.assert_allclose(np.diff(times)[1:], chunk)
    assert 0 < times[1] <= chunk
  first = out.read_bytes()
  assert m2l2('encode', song(samples=30000), out, checkpoint, '--features', '--overwrite')[0] == 0
  assert out.read_bytes() == first
  status, _, errors = m2l2('encode', song(), out, checkpoint, '--features', '--discrete')
  assert status == 1 and 'leave --discrete' in one_line(errors)
  assert m2l2('encode', song(), folder / 'a.safetensors', checkpoint, '--features')[0] == 1
  assert sorted(os.listdir(folder)) == ['a.npz']


def test_similar_ranks_a_piece_of_the_same_sound_first(m2l2, models, folder):
  """Noise of three colours: low, high and loud; two takes of each."""
  rng, checkpoint = np.random.default_rng(0), f'--checkpoint={models / "mono"}'
  music_of = {'low': lambda x: np.cumsum(x) / 200, 'high': lambda x: np.diff(x, append=0), 'loud': lambda x: 5 * x}
  (folder / 'music').mkdir()
  for name, shape in music_of.items():
    for take in (1, 2):
      audio = shape(0.1 * rng.standard_normal(20000)).clip(-1, 1)
      soundfile.write(folder / 'music' / f'{name}{take}.wav', audio, 44100, subtype='FLOAT')
  (folder / 'music' / 'broken.wav').write_bytes(b'RIFF')
  for kind in ('audio', 'features'):
    where = folder / 'music'
    if kind == 'features':
      where = folder / 'features'
      where.mkdir()
      (folder / 'music' / 'broken.wav').unlink()
      assert m2l2('encode', folder / 'music', where, checkpoint, '--features', '--quiet')[0] == 0
      assert 'low2.npz: is there already' in m2l2('encode', folder / 'music', where, checkpoint, '--features')[1]
    for name in music_of:
      status, said, errors = m2l2('similar', folder / 'music' / f'{name}1.wav', where, checkpoint, '--most=2', '--json')
      assert status == 0 and ('broken.wav' in errors) == (kind == 'audio')
      ranked = [row['piece'] for row in json.loads(said)]
      own = f'{name}1.npz' if kind == 'features' else f'{name}2.wav'  # the piece itself is left out
      assert ranked[0] == own and len(ranked) == 2
  said = m2l2('similar', folder / 'music' / 'low1.wav', folder / 'features', checkpoint)[1].splitlines()
  assert len(said) == 6 and said[0].split()[1] == 'low1.npz' and float(said[0].split()[0]) > 0.9
  own = where / 'low1.npz'
  for argv, says in [((folder / 'no.wav', where), 'there is no such file'), ((own, 'nowhere'), 'there is no such file'),
                     ((own, where, '--most=0'), '--most=0')]:
    status, _, errors = m2l2('similar', *argv, checkpoint)
    assert status == 1 and says in one_line(errors)
  status, _, errors = m2l2('similar', own, where, f'--checkpoint={models / "other"}', '--quiet')
  assert status == 1 and 'are of model' in one_line(errors)


def test_the_classifier_of_the_page_runs(models, tmp_path, monkeypatch, capsys):
  """The ten lines of m2l2/codec/README.md, on two classes that differ in loudness."""
  page = (ROOT / 'm2l2' / 'codec' / 'README.md').read_text(encoding='utf-8')
  (block,) = (text for text in re.findall(r'```python\n(.*?)```', page, flags=re.S) if 'sklearn' in text)
  for label, gain in (('quiet', 0.01), ('loud', 1)):
    (tmp_path / 'music' / label).mkdir(parents=True)
    for take in range(5):
      soundfile.write(tmp_path / 'music' / label / f'{take}.wav', gain * music(4000, seed=take)[0], 44100)
  monkeypatch.chdir(tmp_path)
  stand_in = mock.Mock(load=lambda name: codec_lib.load(models / 'mono'))
  exec(block, {'m2l2': stand_in})
  assert float(capsys.readouterr().out) > 0.8 and len(block.strip().splitlines()) <= 12
