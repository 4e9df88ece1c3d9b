#!/usr/bin/env python3
"""Measures how much of (student - teacher) is rounding: in the paper's late steps the two outputs hardly differ.

  python launch/research/rounding.py                 # the model in the box, and the run of rung T1
  python launch/research/rounding.py runs/mine ...   # names, snapshots or workdirs

For each level sigma and index step dt: the RMS of student - teacher in float32 (`size`), the RMS of the error of
bfloat16 products (`error`), both in thousandths of the data's RMS, and their ratio, which should be a quarter at most
at dt = .001 and sigma .2 to 24. Both networks see the same noise, as in training.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from m2l2 import build
from m2l2.assets import CLIPS
from m2l2.codec.codec import load
from m2l2.data import audio_io
from m2l2.errors import UserError

SIGMAS = (0.2, 0.8, 2.5, 8.6, 24.0)
STEPS = (0.01, 0.001)


def differences(config, params, audio, *, dtype):
  """student - teacher of audio [B, C, N] for all of SIGMAS and STEPS: {(sigma, dt): [B, S, F, T, 2C]}."""
  network = build.network({**config, 'model': {**config['model'], 'dtype': dtype}})
  representation, consistency = build.representation(config['model']), build.consistency(config)
  spec = representation.analyse(audio)
  features = jax.jit(network.decode)(params, network.arch.make_bottleneck()(jax.jit(network.encode)(params, spec)))
  keys = jax.random.split(jax.random.key(0), len(audio))
  noise = jax.vmap(lambda k: consistency.unit_noise(k, representation, spec.shape[1]))(keys)

  # Else XLA leaves out roundings to bfloat16 between two operations on the CPU, which an accelerator makes.
  @functools.partial(jax.jit, compiler_options={'xla_allow_excess_precision': False})
  def run(sigma):
    level = jnp.full(spec.shape[:2], sigma, jnp.float32)
    return consistency.bind(network, params, features)(spec + sigma * noise, level)

  return spec, {(sigma, dt): run(sigma) - run(consistency.sigma(consistency.index(sigma) - dt)) for sigma in SIGMAS
                for dt in STEPS}


def rms(x):
  return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def table(name, batch):
  """Prints one network's rows and returns the largest ratio at the smallest step."""
  codec = load(name)
  config = codec.config
  rate, channels = build.native_rates(config['model'])[0], config['model']['channels']
  samples = codec.representation.crop_samples(config['model']['chunks'])
  clips = []
  for path in sorted((CLIPS / 'train').glob('*.ogg'))[:batch]:
    audio, own = audio_io.read(path)
    audio = audio_io.resample(audio.mean(axis=0, keepdims=True), from_rate=own, to_rate=rate)[:, rate:rate + samples]
    clips.append(np.broadcast_to(audio, (channels, samples)))
  spec, exact = differences(config, codec.params, np.stack(clips), dtype='float32')
  _, rounded = differences(config, codec.params, np.stack(clips), dtype='bfloat16')
  unit, worst = 1e-3 * rms(spec), 0.0
  print(f'{name}: {"sigma":>6} {"dt":>6} {"size":>8} {"error":>8} {"ratio":>6}')
  for (sigma, dt), size in exact.items():
    error = rms(rounded[sigma, dt] - size)
    print(f'{"":{len(name)}}  {sigma:6g} {dt:6g} {rms(size) / unit:8.2f} {error / unit:8.2f} {error / rms(size):6.2f}')
    worst = max(worst, error / rms(size)) if dt == min(STEPS) else worst
  return worst


def main(argv) -> int:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('models', nargs='*', default=['tiny', 'runs/ladder/T1'])
  flags.add_argument('--batch', type=int, default=2)
  args = flags.parse_args(argv)
  for name in args.models:
    print(f'{name}: at most {table(name, args.batch):.2f} at dt = {min(STEPS)}', flush=True)
  return 0


if __name__ == '__main__':
  try:
    sys.exit(main(sys.argv[1:]))
  except UserError as error:
    sys.exit(f'rounding: {error}')
