"""The ladder's first rungs: whoever breaks learning hears of it here."""

import json
import math
import sys
import types

import jax
import numpy as np
import pytest

from launch.research import composers, ladder, piano
from m2l2 import build
from m2l2.errors import UserError
from m2l2.evaluation.metrics.phases import coherence
from m2l2.evaluation.studies import baselines, judging
from m2l2.representation import Representation


@pytest.mark.parametrize('rung', ['G', 'T1'])
def test_the_rung_holds(rung, tmp_path, monkeypatch):
  monkeypatch.setattr(ladder.timing, 'model_flops', lambda config: lambda steps: 1e12 * steps)  # seconds of tracing
  line = ladder.run([rung, '--quick', f'--output={tmp_path}'])
  assert not line['failures'], line
  assert json.loads((tmp_path / 'ladder.jsonl').read_text()) == line


def test_what_does_not_learn_fails(tmp_path, capsys, monkeypatch):
  figures = {'own': -1., 'wrong': -1., 'left_1': -1., 'left_2': -1.5,
             'sigma_cond': {'1': {'left': -1.5}, '5': {'left': -1.}}}
  monkeypatch.setattr(ladder, 'fit', lambda *_, **__: (None, 1.))
  monkeypatch.setattr(ladder, 'judge', lambda *_: figures)
  monkeypatch.setattr(ladder.timing, 'model_flops', lambda config: lambda steps: 1e12 * steps)  # seconds of tracing
  assert ladder.main(['T1', '--quick', f'--output={tmp_path}']) == 1
  assert 'FAIL: one step reaches 5 dB\n' in capsys.readouterr().out
  assert ladder.main(['T1', f'--output={tmp_path}']) == 1
  assert 'FAIL: one step reaches 14 dB; the second denoising gains 1 dB\n' in capsys.readouterr().out
  figures.update(own=9.)
  assert ladder.main(['T1', '--quick', f'--output={tmp_path}']) == 0
  assert capsys.readouterr().out.endswith('PASS\n')


def test_fields_are_changed_and_unknown_ones_refused():
  config = ladder.override(ladder.clip_config(False), [
      'variants.head_start.share=0.5', 'variants.head_start.task=magnitudes'])
  assert config.variants.head_start.to_dict() == {'share': 0.5, 'task': 'magnitudes'}
  for change in ('train.stepz=3', 'steps=3', 'train.steps=many', 'train.head_start=.5'):
    with pytest.raises(UserError, match=change):
      ladder.override(ladder.clip_config(False), [change])


def test_every_rung_is_a_network_and_a_recipe():
  for make_config, _ in ladder.RUNGS.values():
    for quick in (False, True):
      config = make_config(quick)
      assert build.step_functions(config).phases[-2:][0][1] == (
          int(config.variants.head_start.share * config.train.steps) or config.train.steps)
  assert not build.network(ladder.corpus_config(False)).arch.cramped


def test_the_known_answers_of_the_gaussian_rung():
  # What the rung holds against is the flow map's SNR; here it is measured, on numbers drawn.
  x, noise = np.random.default_rng(0).standard_normal((2, 200_000))
  for ratio, known in ((0.3, 10.7), (1, 2.3), (3, -1.4)):
    estimate = (x + ratio * noise) / math.sqrt(1 + ratio ** 2)
    assert np.std(estimate) == pytest.approx(1, abs=0.01)  # a sample of the data again
    assert -10 * math.log10(np.mean((estimate - x) ** 2)) == pytest.approx(known, abs=0.05)


def test_noise_phases_keep_magnitudes_alone():
  small = Representation(window=512, hop=128, bins=256, frames=64)
  time = np.arange(30_000) / 11025
  sound = (0.1 * np.sin(2 * np.pi * np.outer([220, 330, 550], time)).sum(axis=0))[None].astype(np.float32)
  noise = baselines.noise_phases(sound, small)
  assert noise.shape == sound.shape
  of = jax.jit(lambda audio: coherence(small.analyse(audio[:, :small.crop_samples(2)])).mean())
  assert of(sound) > 0.95 and of(noise) < 0.5
  # Without edges the frames may fill their chunk, and a part of a frame is over.
  whole = Representation(window=256, hop=64, bins=128, frames=8, edges='none')
  assert baselines.noise_phases(sound[:, :1791], whole).shape == (1, 1728)


def test_notes_of_a_score_with_its_highest_voice_loudest(monkeypatch):
  pitch = lambda midi: types.SimpleNamespace(midi=midi)
  note = lambda start, length, *pitches: types.SimpleNamespace(offset=start, quarterLength=length,
                                                               pitches=[pitch(p) for p in pitches])
  notes = [note(0, 2, 48), note(0, 1, 60, 64), note(1, 1, 62), note(1, 0, 70)]  # the last is a grace note
  score = types.SimpleNamespace(stripTies=lambda: score, flatten=lambda: types.SimpleNamespace(notes=notes))
  music21 = types.SimpleNamespace(corpus=types.SimpleNamespace(parse={'bach/bwv846': score}.__getitem__))
  monkeypatch.setitem(sys.modules, 'music21', music21)
  assert composers.notes_of('bach/bwv846') == [
      (0, 1.94, 48, composers.QUIET), (0, .97, 60, composers.QUIET), (0, .97, 64, composers.LOUD),
      (1, 1.97, 62, composers.LOUD)]
  listed = {name for _, name in judging.read_list(ladder.Path(composers.__file__).parent / 'excerpts/composers.txt')}
  assert listed == {f'{name}.flac' for name in composers.names().values()}


def test_scores_differ_by_seed_and_last_as_long_as_asked():
  pieces = [piano.score(seed, 20) for seed in (0, 0, 1)]
  heard = [[str(message) for message in piece.tracks[0]] for piece in pieces]
  assert heard[0] == heard[1] != heard[2]
  for piece in pieces:
    assert 20 <= piece.length < 32
    notes = [message for message in piece.tracks[0] if message.type == 'note_on']
    assert len(notes) > 20 and all(21 <= note.note <= 108 and 20 <= note.velocity <= 120 for note in notes)
