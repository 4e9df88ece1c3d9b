"""sweep-sigma-cond: a stand-in for a codec whose best setting is known, then the command on a small model."""

import json
import re
import types

import numpy as np
import pytest
from test_codec import load_once, make_snapshot, music

from m2l2 import cli
from m2l2.codec import codec as codec_lib
from m2l2.codec.snapshot import load_snapshot
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation import excerpts
from m2l2.evaluation.embedders.embeddings import remembering
from m2l2.evaluation.metrics.pairs import si_sdr
from m2l2.evaluation.reports import pictures
from m2l2.evaluation.studies import sweep
from m2l2.representation import Representation

RATE = 44100


class StandIn:
  """Decodes to the source and noise, least of it at sigma_cond 0.4, and half as much in two steps."""
  representation, native_rates = Representation(), (RATE,)

  def check_decoding(self, seed, *, sigma_cond):
    if sigma_cond < 0.002:
      raise UserError('sigma_cond too small')

  def encode(self, audio, sample_rate):
    return audio

  def decode(self, latents, seed, *, sigma_cond, refine):
    amount = (.01 + .1 * abs(np.log(sigma_cond / .4))) * (.5 if refine else 1)
    noise = np.random.default_rng(seed).standard_normal(latents.shape)
    return (latents + amount * noise).astype(np.float32)


@pytest.fixture(scope='module')
def clips():
  return [excerpts.Excerpt(f'{seed}.wav', music(RATE // 2, seed=seed), RATE) for seed in range(2)]


@pytest.fixture(scope='module')
def swept(clips):
  levels = {'level': lambda audio, sample_rate: audio.reshape(-1, 50)[:, :4]}
  done = []
  report = sweep.sweep(StandIn(), clips, values=(1.6, .1, .4), metrics=('si_sdr', 'mel_l1_db'), embedders=levels,
                       progress=done.append)
  assert sum(done) == sweep.steps_of(clips, (1.6, .1, .4)) == 12
  return report


def test_the_best_setting_is_found(swept, clips):
  assert [(s['sigma_cond'], s['steps']) for s in swept['settings']] == [
      (value, steps) for value in (.1, .4, 1.6) for steps in ('one_step', 'two_step')]
  for by in ('level', 'si_sdr', 'mel_l1_db'):
    best = sweep._best(swept['settings'], by)
    assert (best['sigma_cond'], best['steps']) == (.4, 'two_step')
    assert best['value'] == swept['settings'][3]['values'][by]['mean']
  assert swept['best']['by'] == 'level' and swept['clips'] == 2
  assert swept['settings'][3]['values']['si_sdr']['error'] > 0
  with pytest.raises(UserError, match='is to be told by .* name one of level, si_sdr'):
    sweep.sweep(StandIn(), clips, metrics=('si_sdr',), embedders={'level': len}, by='visqol')
  with pytest.raises(UserError, match='coherence tells no best'):
    sweep.sweep(StandIn(), clips, metrics=('coherence',), embedders={})
  with pytest.raises(UserError, match='too small'):
    sweep.sweep(StandIn(), clips, values=(.001,))


@pytest.mark.parametrize('name, new, old, better', [
    ('si_sdr', 2, 1, True), ('mel_l1_db', 2, 1, False), ('seam_db', -.1, .5, True), ('seam_db', -.6, .5, False),
    ('musicnn_mtt', 1, 2, True)])
def test_which_way_is_better(name, new, old, better):
  assert sweep.is_better(name, new, old) == better


def test_references_are_embedded_once(clips):
  calls = []

  def embed(audio, sample_rate):
    calls.append(sample_rate)
    return audio[:, :3].T
  once = remembering(embed)
  for clip in (*clips, *clips):
    np.testing.assert_array_equal(once(clip.audio.copy(), RATE), clip.audio[:, :3].T)
  once(clips[0].audio, 48000)
  assert calls == [RATE, RATE, 48000]


def test_curves(swept, tmp_path):
  figure = pictures.sweep_curves(swept)
  assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == ['si_sdr', 'mel_l1_db', 'level']
  assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ['one step', 'two step']
  pictures.save(figure, tmp_path / 'sweep.png')
  assert (tmp_path / 'sweep.png').read_bytes().startswith(b'\x89PNG')


def test_excerpts_are_the_middles_of_files_evenly_spaced(tmp_path):
  for name in range(6):
    audio_io.write(tmp_path / f'{name}.wav', np.full((1, 3000 + name), name / 10, np.float32), 1000)
  (tmp_path / '7.wav').write_bytes(b'RIFF')
  taken, warnings = excerpts.take_excerpts(tmp_path, seconds=1., most=3)
  assert [clip.name for clip in taken] == ['1.wav', '3.wav', '5.wav'] and warnings == []
  assert [clip.audio.shape for clip in taken] == [(1, 1000)] * 3
  whole, warnings = excerpts.take_excerpts(tmp_path, seconds=9.)
  assert [clip.audio.shape[1] for clip in whole] == list(range(3000, 3006)) and warnings[0].startswith('7.wav: ')
  audio_io.write(tmp_path / '0.wav', np.arange(3001, dtype=np.float32)[None] / 4000, 1000)
  (clip,), _ = excerpts.take_excerpts(tmp_path / '0.wav', seconds=1.)
  np.testing.assert_allclose(clip.audio[0] * 4000, np.arange(1000, 2000), atol=.01)
  with pytest.raises(UserError, match='no excerpt can be had; the first: 7.wav'):
    excerpts.take_excerpts(tmp_path / '7.wav', seconds=1.)


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
  monkeypatch.setattr(codec_lib, 'load', load_once)
  make_snapshot(tmp_path / 'run' / 'snapshot')
  (tmp_path / 'music').mkdir()
  audio_io.write(tmp_path / 'music' / 'a.wav', music(6000), RATE)
  return types.SimpleNamespace(
      model=tmp_path / 'run', run=lambda *args: cli.main([
          'sweep-sigma-cond', f'--reference={tmp_path}/music', f'--checkpoint={tmp_path}/run',
          f'--output={tmp_path}/sweep.json', f'--png={tmp_path}/sweep.png', '--metrics=mel_l1_db,si_sdr',
          '--values=0.2,2', *args]))


def test_the_command_writes_report_curves_and_the_best_value(place, tmp_path, capsys):
  before = load_snapshot(place.model)
  assert place.run('--write-best', '--by=si_sdr') == 0
  report = json.loads((tmp_path / 'sweep.json').read_text())
  assert report['fingerprint'] == before.fingerprint and report['clips'] == 1 and len(report['settings']) == 4
  assert (tmp_path / 'sweep.png').read_bytes().startswith(b'\x89PNG')
  best = report['best']
  assert best['value'] == max(s['values']['si_sdr']['mean'] for s in report['settings'])
  said = capsys.readouterr().out
  assert f'best by si_sdr: sigma_cond {best["sigma_cond"]:g}' in said and 'decodes so by default' in said
  after = load_snapshot(place.model)
  chosen = {'sigma_cond': best['sigma_cond'], 'refine': best['steps'] == 'two_step'}
  assert after.config == {**before.config, 'consistency': {**before.config['consistency'], **chosen}}
  assert (after.fingerprint, after.step) == (before.fingerprint, before.step)
  # What was measured is what the snapshot now does by itself.
  codec = load_once(place.model)
  (clip,), _ = excerpts.take_excerpts(tmp_path / 'music', seconds=10)

  again = si_sdr(clip.audio, codec.decode(codec.encode(clip.audio, RATE)))
  assert again == pytest.approx(best['value'], abs=1e-3)


@pytest.mark.parametrize('args, message', [
    (['--values=0.1,many'], 'give numbers with commas between'),
    (['--values=1000'], 'it must lie in 0.002..80'),
    (['--metrics=loudness'], "unknown metric 'loudness'"),
    (['--by=visqol'], "is to be told by 'visqol'"),
    (['--png=sweep.gif'], r'name it \*.png'),
    (['--clips=0'], 'both must be positive')])
def test_a_mistake_is_one_line_and_leaves_nothing(place, tmp_path, capsys, args, message):
  assert place.run(*args) == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert re.search(message, error)
  assert not list(tmp_path.glob('sweep*'))
