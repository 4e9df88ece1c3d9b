"""The models in the box do what their cards say: they load, and clips come through them."""

from importlib import resources
import json
from pathlib import Path

import numpy as np
import pytest

import m2l2
from m2l2 import assets
from m2l2.codec.latents import Latents
from m2l2.configs import piano, tiny
from m2l2.data import audio_io
from m2l2.evaluation.metrics import pairs

MODELS = Path(str(resources.files('m2l2'))) / 'assets' / 'models'
MIB = 2 ** 20


@pytest.fixture(scope='module')
def codec():
  return m2l2.load('tiny')


@pytest.fixture(scope='module')
def clip(codec):
  """(3 s of the clip that no model was trained on, its latents), at the model's rate."""
  audio, rate = audio_io.read(assets.HELD_OUT, frames=3 * 44100)
  audio = audio_io.resample(audio, from_rate=rate, to_rate=codec.native_rates[0])
  return audio, codec.encode(audio, codec.native_rates[0])


def distance(codec, clip, latents):
  decoded = codec.decode(latents, seed=0)
  return pairs.ratio(clip[0], decoded, sample_rate=codec.native_rates[0])


def test_it_fits_the_box():
  files = [path for path in MODELS.rglob('*') if path.is_file()]
  assert max(path.stat().st_size for path in files) < 16 * MIB
  assert sum(path.stat().st_size for path in files) < 40 * MIB
  for name in ('tiny', 'piano'):
    assert (MODELS / name / 'MODEL.md').read_text(encoding='utf-8').startswith(f'# {name}')


def test_its_recipe_is_the_shipped_config(codec):
  expected = tiny.get_config().to_dict()
  assert codec.config['variants']['head_start'] == {'share': 0.}  # its task is newer
  assert codec.config['variants']['sketch'] == {'cells': [128, 64]}
  for part in ('model', 'consistency', 'variants', 'train'):
    ours, theirs = ({key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
                    for fields in (codec.config[part], expected[part]))
    left_out = ('strides', 'sketch', 'head_start', 'init_from', 'reduction', 'compiler_options')  # the last are newer
    assert {k: v for k, v in ours.items() if k not in left_out} == {
        k: v for k, v in theirs.items() if k not in left_out}


@pytest.fixture(scope='module')
def whole(codec, clip):
  return distance(codec, clip, clip[1])


def test_music_comes_through_it(clip, whole):
  assert clip[1].z.shape == (2, 3, 8, 64)  # a stream a channel; chunks of 1.49 s, and what is over
  assert whole < .6


def test_other_latents_are_other_music(codec, clip, whole):
  wrong = Latents(**{**vars(clip[1]), 'z': clip[1].z[:, ::-1]})
  assert distance(codec, clip, wrong) > 1.2 * whole


def test_its_first_embeddings_carry_most(codec, clip, whole):
  some, none = (distance(codec, clip, z) for z in (
      codec.first(clip[1], 2), Latents(**{**vars(clip[1]), 'z': np.zeros_like(clip[1].z)})))
  assert whole < some < none
  assert some - whole < .5 * (none - some)


@pytest.fixture(scope='module')
def pianist():
  return m2l2.load('piano')


@pytest.fixture(scope='module')
def prelude(pianist):
  """(6 s of a piece that the model never heard, its latents, decoded), at the model's rate."""
  audio, rate = audio_io.read(assets.PIANO, frames=6 * 11025)
  assert rate == pianist.native_rates[0]
  latents = pianist.encode(audio, rate)
  return audio, latents, pianist.decode(latents, seed=0)


def test_pianos_recipe_is_the_shipped_config(pianist):
  config, expected = pianist.config, piano.get_config().to_dict()
  for part in ('model', 'consistency', 'variants', 'train'):
    theirs = {**json.loads(json.dumps(expected[part])), **{k: v for k, v in config[part].items() if k == 'log_every'}}
    assert theirs == config[part], part


def test_a_prelude_comes_through_piano(pianist, prelude):
  audio, latents, decoded = prelude
  rate = pianist.native_rates[0]
  assert latents.z.shape == (1, 9, 8, 32)
  wrong = Latents(**{**vars(latents), 'z': latents.z[:, ::-1]})
  mel = [pairs.mel_l1_db(audio, sound, sample_rate=rate) for sound in (decoded, pianist.decode(wrong, seed=0))]
  assert pairs.ratio(audio, decoded, sample_rate=rate) < .9
  assert mel[0] + 1.5 < mel[1]
