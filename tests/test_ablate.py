"""launch/research/ablate.py: what each ablation changes, and the whole command on a small model, in this process."""

import dataclasses
import json
from pathlib import Path
import types

import jax
import numpy as np
import pytest
import soak_resume
from test_codec import ONE_LEVEL, latents_for, make_config, make_params, music
from test_learning import untrained

from launch.research import ablate
from m2l2 import cli
from m2l2.codec.codec import Codec
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.training import main as training

CONFIG = 'configs/nano.py:debug'
ONE_LEVEL_FLAGS = [f'--config.model.{name}={value}' for name, value in ONE_LEVEL.items()]
SMALL = [*ONE_LEVEL_FLAGS, '--config.variants.shortcut.width=2', '--config.train.probe_every=0']


@pytest.mark.soak
def test_each_ablation_can_be_built_and_costs_what_its_network_does():
  about = {name: ablate.describe(CONFIG, ONE_LEVEL_FLAGS + ablate.fields_of(name, CONFIG, ONE_LEVEL_FLAGS))
           for name in ('as_is', 'one_chunk', 'local')}
  whole = about['as_is']
  assert whole['parameters'] == sum(x.size for x in jax.tree.leaves(make_params(make_config())))
  assert about['local']['parameters'] < about['one_chunk']['parameters'] < whole['parameters']
  assert about['one_chunk']['gflop_a_step'] < whole['gflop_a_step']  # less attention, the same number of chunks
  assert about['local']['gflop_a_step'] < whole['gflop_a_step']
  assert ablate.fields_of('one_chunk', 'configs/nano.py', ['--config.train.batch_size=3']) == [
      '--config.model.chunks=1', '--config.train.batch_size=6']
  assert ablate.fields_of('other_seed', 'configs/nano.py', ['--config.seed=4']) == ['--config.seed=5']


def test_a_model_of_one_chunk_decodes_each_by_itself():
  config = make_config(chunks=1)
  codec = Codec(config=config, params=make_params(config), fingerprint='alone')
  latents = latents_for(codec, chunks=4)
  moved = latents.z.copy()
  moved[:, 0] *= -1
  size, reach = codec.representation.chunk_samples, codec.representation.overlap
  here, there = (codec.decode(z) for z in (latents, dataclasses.replace(latents, z=moved)))
  np.testing.assert_allclose(there[:, size + reach:], here[:, size + reach:], atol=1e-6)
  assert np.abs(there[:, :size] - here[:, :size]).max() > 1e-4
  with pytest.raises(UserError, match='each chunk alone'):
    codec.decode(latents, mode='parallel')


def in_this_process(what, *arguments):
  """As ablate.run; a run that trains leaves random weights."""
  if what == 'train':
    parsed = training.parse(['ablate', *arguments], required=('config',))
    untrained(parsed.config, Path(parsed.workdir))
  else:
    assert cli.main([what, *map(str, arguments)]) == 0


@pytest.mark.parametrize('trained', [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_command_trains_measures_and_goes_on(tmp_path, monkeypatch, capsys, trained):
  if not trained:
    monkeypatch.setattr(ablate, 'run', in_this_process)
    # Counted in test_timing.py: seconds of tracing.
    monkeypatch.setattr(ablate.timing, 'step_flops', lambda *_: types.SimpleNamespace(total=1e9))
  for name, value in soak_resume.environment(tmp_path / 'compiled').items() if trained else ():
    monkeypatch.setenv(name, value)
  soak_resume.write_music(tmp_path / 'train')
  (tmp_path / 'heldout').mkdir()
  for name in range(2):
    audio_io.write(tmp_path / 'heldout' / f'{name}.wav', music(9000, seed=name), 44100)
  command = [f'--config={CONFIG}', f'--reference={tmp_path}/heldout', f'--output={tmp_path}/out', '--clips=1',
             '--seconds=0.1', '--metrics=si_sdr,mel_l1_db', f'--config.data.root={tmp_path}/train', *SMALL,
             '--config.train.steps=1', '--only=one_chunk']
  assert ablate.main(command) == 0
  monkeypatch.setattr(ablate, 'run', lambda *arguments: pytest.fail(f'{arguments} is done already'))
  assert ablate.main(command) == 0
  out = tmp_path / 'out'
  runs = json.loads((out / 'ablations.json').read_text())['runs']
  assert list(runs) == ['one_chunk']
  config = json.loads((out / 'one_chunk/config.json').read_text())
  assert config['model']['chunks'] == 1 and config['train']['batch_size'] == 16  # of chunks, as before
  report = json.loads((out / 'reports/one_chunk.json').read_text())
  assert runs['one_chunk']['values']['si_sdr']['mean'] == report['metrics']['si_sdr']['mean'] and report['pairs'] == 1
  text = (out / 'ablations.md').read_text()
  assert text.splitlines()[0] == '| run | parameters | GFLOP a step | si_sdr | mel_l1_db |'
  assert text.splitlines()[2].startswith('| one_chunk: each chunk denoised alone') and text in capsys.readouterr().out
  assert (out / 'ablations.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('arguments, message', [
    (['--only=global'], "no ablation 'global': pick from as_is"),
    (['--only=local', '--config.model.num_latents=3'], 'to have a common factor'),
    (['--config.model.lares=1'], "no field 'lares'")])
def test_a_mistake_is_told_before_training(arguments, message, tmp_path):
  with pytest.raises(UserError, match=message):
    ablate.main([f'--config={CONFIG}', f'--reference={tmp_path}', f'--output={tmp_path}/out', *arguments])
  assert not (tmp_path / 'out').exists()
