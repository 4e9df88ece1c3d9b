"""Records of prepared data: encoded and decoded, whole or in part."""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from m2l2.data import audio_io, segments
from m2l2.errors import UserError


def make_record(channels=2, samples=50_000, seed=0):
  noise = np.random.default_rng(seed).normal(0, 3000, (channels, samples)).cumsum(axis=1) / 20
  audio = np.clip(noise, -32768, 32767).astype(np.int16)
  return audio, {
    'audio': audio_io.file_bytes(audio, 44100), 'source': 'a/b\\xff.ogg', 'offset': 2**33, 'starts': 40_000,
    'samples': samples, 'rate': 44100, 'channels': channels, 'loudness': -20.5, 'source_rate': 96000,
    'source_samples': 2**34, 'source_channels': channels}


@pytest.mark.parametrize('channels', [1, 2, 8])
def test_a_record_comes_back(channels):
  audio, record = make_record(channels)
  example = segments.encode(record)
  assert example == segments.encode(record)
  decoded = segments.decode(example)
  assert decoded == {**record, 'source': record['source'].encode()}
  np.testing.assert_array_equal(segments.read_audio(decoded) * 2**15, audio)


def test_every_process_writes_the_same_bytes():
  code = ('import hashlib; from test_segments import make_record; from m2l2.data import segments; '
          'print(hashlib.sha256(segments.encode(make_record()[1])).hexdigest())')
  got = subprocess.run([sys.executable, '-c', code], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True,
                       check=True, env={**os.environ, 'PYTHONHASHSEED': '1'}).stdout
  assert got == hashlib.sha256(segments.encode(make_record()[1])).hexdigest() + '\n'


def test_a_part_is_the_same_as_in_the_whole():
  audio, record = make_record()
  rng = np.random.default_rng(1)
  places = [(0, 1), (49_999, 1), (4095, 2), (4096, 4096), (0, 50_000), (7, 0),
            *((s, rng.integers(1, 50_001 - s)) for s in rng.integers(0, 50_000, 40))]
  for start, frames in places:
    part = segments.read_audio(record, start=int(start), frames=int(frames))
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part * 2**15, audio[:, start:start + frames])


@pytest.mark.parametrize('start,frames', [(0, 50_001), (50_001, 1), (-1, 10), (49_999, 2)])
def test_samples_that_are_not_there(start, frames):
  with pytest.raises(UserError, match=r'b\\xff.ogg at sample 8589934592: '):
    segments.read_audio(make_record()[1], start=start, frames=frames)


def test_damaged_audio_is_told():
  _, record = make_record()
  for audio in (b'', b'fLaC', record['audio'][:2000], bytes(3000)):
    with pytest.raises(UserError, match='at sample 8589934592'):
      segments.read_audio({**record, 'audio': audio})
