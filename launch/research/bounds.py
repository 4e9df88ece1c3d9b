#!/usr/bin/env python3
"""The best result of a model with a coded envelope and random phases, without training.

  python launch/research/bounds.py --config=configs/tiny.py --config.data.root=PREPARED --components=512,1024

  --components=A,B   of the log-magnitudes of the cells of variants.sketch (default 512)
  --crops=N          of two chunks that they are fitted on, from the training music (default 5000)
  --music=DIR        default data/music/train (launch/get_music.sh)
  --excerpts=FILE    default launch/research/excerpts/validation.txt, tracks that m2l2 prepare
                     --validation-fraction=0.08 puts aside, of --seconds=6
  --power=P          the noise's magnitudes to this power, its phases as they are (default 1)

A table: for the exact log-magnitude of every bin, for its exact means over the cells, and for so many components of
those, the spectrogram of white noise scaled by it: ratio, level, FD and log-mel L1 of the sound. And the SNR in dB of
denoising at sigma .2 and 1 with that scale, bin by bin: by the flow that variants.flow_skip begins with, and by a
Wiener filter.
"""

import argparse
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.research import pca_start  # noqa: E402  (the checkout's own)
from m2l2 import build  # noqa: E402
from m2l2.errors import UserError  # noqa: E402
from m2l2.evaluation.embedders.embeddings import make_embedder  # noqa: E402
from m2l2.evaluation.studies import judging  # noqa: E402
from m2l2.evaluation.studies.baselines import fit_pca, in_chunks  # noqa: E402
from m2l2.training import main as command  # noqa: E402
from m2l2.variants import envelope  # noqa: E402
from m2l2.variants.consistency import signal_noise  # noqa: E402

EMBEDDING = 'musicnn_mtt'
SIGMAS = (.2, 1.)
COLUMNS = ('ratio', 'level_db', 'fd', 'mel_l1_db', 'snr_flow', 'snr_wiener')


def parser():
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--components', type=lambda text: [int(x) for x in text.split(',')], default=[512])
  flags.add_argument('--crops', type=int, default=5000)
  flags.add_argument('--music', default=ROOT / 'data' / 'music' / 'train')
  flags.add_argument('--excerpts', default=ROOT / 'launch' / 'research' / 'excerpts' / 'validation.txt')
  flags.add_argument('--seconds', type=float, default=6.0)
  flags.add_argument('--power', type=float, default=1.0)
  return flags


def run(argv) -> dict[str, dict]:
  """The rows by name."""
  args, rest = parser().parse_known_args(argv)
  config = command.parse(['bounds', *rest], required=('config',)).config
  functions, rep = build.step_functions(config), build.representation(config.model)
  arch = functions.network.arch
  if not arch.sketch_cells:
    raise UserError('this config names no cells: variants.sketch.cells=(bands, stretches)')
  if rep.channels != 1:
    raise UserError('the excerpts are mono: take a config of model.channels=1')
  rate, grid = functions.sample_rate, (*arch.sketch_cells, 1)
  sounds = judging.load(args.excerpts, args.music, seconds=args.seconds, sample_rate=rate)
  analyse = jax.jit(rep.analyse)
  chunked = {name: in_chunks(audio, rep) for name, audio in sounds.items()}
  specs = {name: (np.asarray(analyse(padded)), signal) for name, (padded, signal) in chunked.items()}
  cells, whole = pca_start.read(config, functions, args.crops)

  spread = lambda small: np.asarray(envelope.spread_bands(small, arch.bins, arch.frames))
  means = lambda large: np.asarray(envelope.band_means(large, grid))
  codes = {'every bin': lambda large: large,
           f'{grid[0]} x {grid[1]} cells': lambda large: spread(means(large))}
  for count in args.components:
    pca = fit_pca(cells.reshape(len(cells), -1), count)
    codes[f'{count} components'] = lambda large, pca=pca: spread(
        pca.inverse_transform(pca.transform(means(large).reshape(len(large), -1))).reshape(-1, *grid))
  embedders = {EMBEDDING: make_embedder(EMBEDDING)}
  table = {}
  for name, code in codes.items():
    # Where training would set the envelope: at a quantile of the magnitudes, by frequency (0 where nothing is lost).
    bias = np.quantile(whole - code(whole), envelope.QUANTILE, axis=(0, 2))[:, None]
    table[name] = judged(lambda large: code(large) + bias, sounds, specs, rep, rate, embedders,
                         power=args.power)
    print(line([name, *(table[name][column] for column in COLUMNS)]), flush=True)
  return table


def judged(code, sounds, specs, rep, rate, embedders, *, power) -> dict[str, float | tuple]:
  """What comes of noise scaled by `code` of the excerpts' log-magnitudes, and of denoising with that scale."""
  estimates, signal, errors = {}, 0.0, {(kind, sigma): 0.0 for kind in ('flow', 'wiener') for sigma in SIGMAS}
  for number, (name, (spec, where)) in enumerate(specs.items()):
    scale = np.asarray(envelope.deviation(jnp.asarray(code(np.asarray(envelope.log_magnitude(spec))))))
    noise = np.asarray(signal_noise(jax.random.key(number), rep, len(spec)))
    signal += float(np.sum(np.square(spec)))
    for (kind, sigma), error in errors.items():
      part = np.square(scale) / (np.square(scale) + sigma ** 2)
      gain = part if kind == 'wiener' else np.sqrt(part)
      errors[kind, sigma] = error + float(np.sum(np.square(gain * (spec + sigma * noise) - spec)))
    body, tail = rep.synthesise(jnp.asarray(scale * bent(noise, power)))
    whole = np.concatenate([np.asarray(body), np.asarray(tail)], axis=-1)
    estimates[name] = np.clip(whole[:, where], -1, 1)
  scores = judging.judge(sounds, estimates, rate, metrics=('ratio', 'mel_l1_db'), embedders=embedders)
  snr = lambda kind: tuple(10 * np.log10(signal / errors[kind, sigma]) for sigma in SIGMAS)
  return {'ratio': scores['metrics']['ratio']['mean'], 'mel_l1_db': scores['metrics']['mel_l1_db']['mean'],
          'fd': scores['frechet'][EMBEDDING]['value'] if scores['frechet'] else float('nan'),
          'level_db': scores['level_db'], 'snr_flow': snr('flow'), 'snr_wiener': snr('wiener')}


def bent(noise, power: float):
  """Complex noise [..., 2] with its magnitudes to a power, of the same mean square as before."""
  if power == 1:
    return noise
  magnitude = np.sqrt(np.sum(np.square(noise), axis=-1, keepdims=True))
  changed = noise * np.maximum(magnitude, 1e-9) ** (power - 1)
  return changed * np.sqrt(np.mean(np.square(noise)) / np.mean(np.square(changed)))


def line(cells) -> str:
  shown = lambda cell: (cell if isinstance(cell, str) else '/'.join(map(shown, cell)) if isinstance(cell, tuple)
                        else f'{cell:.2f}' if abs(cell) >= 1 else f'{cell:.3f}')
  return f'| {" | ".join(map(shown, cells))} |'


if __name__ == '__main__':
  try:
    print(line(['envelope', *COLUMNS]), line(['---'] * (len(COLUMNS) + 1)), sep='\n')
    run(sys.argv[1:])
  except UserError as error:
    sys.exit(f'bounds: {error}')
