"""Fixed excerpts of music and their reconstructions, by which training is judged.

A list of excerpts is a text file: lines of start in seconds, a tab and the file's name under the root; # begins a
comment.
"""

from collections.abc import Mapping
import dataclasses
import os

import numpy as np

from m2l2.codec.codec import Codec
from m2l2.codec.latents import Latents
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation import evaluate

SATURATED = 0.99


def read_list(path) -> list[tuple[float, str]]:
  """(start in seconds, name) of each excerpt. Raises UserError: no such file, or another format."""
  try:
    with open(path, encoding='utf-8') as file:
      lines = [line.rstrip('\n') for line in file if line.strip() and not line.startswith('#')]
    return [(float(start), name) for start, name in (line.split('\t') for line in lines)]
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  except ValueError as error:
    raise UserError(f'{path}: a line is not "start in seconds<tab>name" ({error})') from error


def load(path, root, *, seconds: float, sample_rate: int) -> dict[str, np.ndarray]:
  """The excerpts listed in `path`, of files under `root`: name@start -> float32 [1, samples], mono, at `sample_rate`.

  Raises UserError: a file is missing or ends before the excerpt does.
  """
  sounds = {}
  for start, name in read_list(path):
    with audio_io.AudioReader(os.path.join(root, name)) as reader:
      rate = reader.info.sample_rate
      audio = reader.read(start=round(start * rate), frames=round(seconds * rate), check_finite=True)
    audio = audio.mean(axis=0, keepdims=True)
    audio = audio_io.resample(audio, from_rate=rate, to_rate=sample_rate)
    sounds[f'{name}@{start:g}'] = audio[:, :round(seconds * sample_rate)]
  return sounds


def encode(codec: Codec, sounds: Mapping[str, np.ndarray], sample_rate: int) -> dict[str, Latents]:
  return {name: codec.encode(audio, sample_rate) for name, audio in sounds.items()}


def decode(codec: Codec, latents: Mapping[str, Latents], *, seed: int = 0, **how) -> dict[str, np.ndarray]:
  """`Codec.decode` of each, with different noise for each excerpt."""
  return {name: codec.decode(z, seed=seed + number, **how) for number, (name, z) in enumerate(latents.items())}


def away(names: list) -> list:
  """For each excerpt the one half the list away."""
  return names[len(names) // 2:] + names[:len(names) // 2]


def exchanged(latents: Mapping[str, Latents]) -> dict[str, Latents]:
  """Each excerpt with the latents of the one half the list away, of another piece. All have equal lengths."""
  names = list(latents)
  return {name: dataclasses.replace(latents[name], z=latents[other].z)
          for name, other in zip(names, away(names), strict=True)}


def judge(sounds, estimates, sample_rate: int, *, metrics=('ratio', 'mel_l1_db', 'si_sdr'), embedders=None,
          workers: int = 1) -> dict:
  """`evaluate.evaluate` of two sets of sounds with equal names, and how much louder the estimates are in dB: the mean,
  and the mean of the absolute value."""
  pairs = [evaluate.Pair(name, audio, estimates[name], sample_rate) for name, audio in sounds.items()]
  report = evaluate.evaluate(pairs, metrics=metrics, embedders=embedders, workers=workers)
  levels = np.array([level_db(estimates[name]) - level_db(audio) for name, audio in sounds.items()])
  return {**report, 'level_db': float(levels.mean()), 'level_error_db': float(np.abs(levels).mean())}


def level_db(audio) -> float:
  """RMS in dB of full scale, not below -100."""
  return 10 * np.log10(max(float(np.mean(np.square(audio, dtype=np.float64))), 1e-10))


def change(own: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
  """Relative change |own - other| / |own| over all sounds."""
  squares = lambda sounds: sum(float(np.sum(np.square(x))) for x in sounds)
  return (squares(own[name] - other[name] for name in own) / max(squares(own.values()), 1e-12)) ** 0.5


def latent_health(latents: Mapping[str, Latents]) -> dict[str, float]:
  """How much the latents of chunks differ, and in how many dimensions.

  spread: standard deviation over chunks, mean over the numbers; saturated: share with |z| > 0.99; rank: the effective
  rank (Roy and Vetterli, 2007), exp of the entropy of the normalised singular values of the centred chunks.
  """
  z = np.concatenate([x.z.reshape(-1, x.z.shape[-2] * x.z.shape[-1]) for x in latents.values()]).astype(np.float64)
  singular = np.linalg.svd(z - z.mean(axis=0), compute_uv=False)
  p = singular / max(singular.sum(), 1e-12)
  return {'spread': float(z.std(axis=0).mean()), 'saturated': float(np.mean(np.abs(z) > SATURATED)),
          'rank': float(np.exp(-np.sum(p * np.log(np.maximum(p, 1e-12))))), 'chunks': len(z)}
