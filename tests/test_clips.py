"""The music that ships with the package: short, small, structured, and attributed file by file."""

import pathlib
import re

import numpy as np
import pytest
import soundfile

import m2l2
from m2l2.evaluation.metrics import pairs

FOLDER = pathlib.Path(m2l2.__file__).parent / 'assets' / 'clips'
CLIPS = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob('*.ogg'))


def attribution_rows():
  """file -> the other columns of the table in ATTRIBUTION.md."""
  lines = (FOLDER / 'ATTRIBUTION.md').read_text(encoding='utf-8').splitlines()
  rows = [[cell.strip() for cell in line.strip('|').split('|')]
          for line in lines if line.startswith(('| train/', '| heldout/'))]
  return {row[0]: row[1:] for row in rows}


def test_there_are_six_to_nine_clips_and_one_is_held_out():
  assert 6 <= len(CLIPS) <= 9
  assert sum(clip.startswith('heldout/') for clip in CLIPS) == 1
  assert all(clip.startswith(('heldout/', 'train/')) for clip in CLIPS)


def test_the_folder_is_small_and_holds_nothing_else():
  files = [path for path in FOLDER.rglob('*') if path.is_file()]
  assert sum(path.stat().st_size for path in files) < 1.5e6
  assert {path.relative_to(FOLDER).as_posix() for path in files} == {*CLIPS, 'ATTRIBUTION.md'}


def test_every_clip_is_attributed_and_nothing_else_is():
  rows = attribution_rows()
  assert sorted(rows) == CLIPS
  for row in rows.values():
    title, composer, source, offset, licence, _ = row
    assert title and composer and 'ogg' in source and re.fullmatch(r'\d+ s', offset)
    assert licence in ('CC BY 3.0', 'CC BY-SA 3.0')


def test_the_held_out_composer_and_package_are_not_trained_on():
  def origin(row):
    return {row[1], row[2].split(',')[0]}
  rows = attribution_rows()
  trained = set().union(*(origin(row) for clip, row in rows.items() if clip.startswith('train/')))
  heldout = set().union(*(origin(row) for clip, row in rows.items() if clip.startswith('heldout/')))
  assert not trained & heldout


@pytest.mark.parametrize('clip', CLIPS)
def test_clip_is_stereo_music_with_structure(clip):
  audio, sample_rate = soundfile.read(FOLDER / clip, dtype='float32', always_2d=True)
  assert sample_rate == 44100 and audio.shape[1] == 2
  assert 5 <= len(audio) / sample_rate <= 8
  assert .1 < abs(audio).max() < 1
  structure = pairs.shaped_noise_mel_l1_db(audio.T, sample_rate=sample_rate)
  assert structure >= 7
  assert float(attribution_rows()[clip][-1]) == pytest.approx(structure, abs=.06)


@pytest.mark.parametrize('clip', CLIPS)
def test_ratio_tells_music_from_noise_and_silence(clip):
  audio, sample_rate = soundfile.read(FOLDER / clip, dtype='float32', always_2d=True)
  other_noise = pairs.shaped_noise(audio.T, sample_rate=sample_rate, seed=1)
  assert pairs.ratio(audio.T, other_noise, sample_rate=sample_rate) == pytest.approx(1, abs=.03)
  assert pairs.ratio(audio.T, np.zeros_like(audio.T), sample_rate=sample_rate) > 2.5
