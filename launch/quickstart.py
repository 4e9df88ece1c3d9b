"""Shows what a run has learned of its training clip: sounds, spectrograms and figures.

    python launch/quickstart.py WORKDIR

Writes, into the workdir: untrained.wav (the training clip reconstructed by the initial weights: train.init_from, else
random ones), trained.wav (by the trained weights), comparison.png and report.json; and original.wav and
heldout_original.wav, the two shipped clips. Decoding is one step from sigma_max, from pure noise, so the result depends
on the latents alone. Figures are at the model's own rate.
"""

import copy
from pathlib import Path
import sys

import jax
import numpy as np

from m2l2 import files
from m2l2.assets import HELD_OUT, TRAINING
from m2l2.codec.codec import Codec, load
from m2l2.codec.latents import Latents
from m2l2.codec.snapshot import load_snapshot
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation.metrics.pairs import pair_metrics
from m2l2.evaluation.reports import pictures

SEED = 0


def measure(codec: Codec, audio, sample_rate):
  """-> (one-step reconstruction, figures) of audio [channels, samples]."""
  latents = codec.encode(audio, sample_rate)
  one_step = codec.decode(latents, SEED, refine=False)
  # The same noise with the latents of the chunks half a clip away.
  moved = np.roll(latents.z, latents.z.shape[1] // 2, axis=1)
  swapped = codec.decode(Latents(**{**vars(latents), 'z': moved}), SEED, refine=False)
  return one_step, {
      'one_step': pair_metrics(audio, one_step, sample_rate=sample_rate),
      'swap': float(np.linalg.norm(one_step - swapped) / max(np.linalg.norm(one_step), 1e-9)),
      'latents': {'saturated': float(np.mean(np.abs(latents.z) > 0.99)),
                  'spread_over_chunks': float(np.mean(np.std(latents.z, axis=1)))}}


def main(workdir):
  jax.config.update('jax_disable_most_optimizations', True)  # compiling takes longer than all that runs here
  trained, step = load(workdir), load_snapshot(workdir).step
  fields = trained.config['train']
  if step < fields['steps']:
    raise UserError(f"training stopped at step {step} of {fields['steps']}: run the same command to go on")
  began = load(fields['init_from']) if fields['init_from'] else Codec(
      config=trained.config, fingerprint='untrained',
      params=jax.jit(trained.network.init)(jax.random.key(trained.config['seed'])))
  if all(began.config[part] == trained.config[part] for part in ('model', 'consistency', 'variants')):
    params, began = began.params, copy.copy(trained)  # nothing is traced and compiled twice
    began.params = params
  rate = trained.native_rates[0]
  audio, source_rate = audio_io.read(TRAINING)
  audio = audio_io.resample(audio, from_rate=source_rate, to_rate=rate)
  before, figures_before = measure(began, audio, rate)
  after, figures_after = measure(trained, audio, rate)
  old, new = figures_before['one_step'], figures_after['one_step']
  rows = {f"original: {TRAINING.stem} (coherence {new['coherence_reference']:.2f})": (audio, rate),
          f"before training (coherence {old['coherence']:.2f})": (before, rate),
          f"after {step} steps (coherence {new['coherence']:.2f})": (after, rate)}
  for what, sound in (('untrained', before), ('trained', after)):
    audio_io.write(Path(workdir) / f'{what}.wav', sound, rate)
  for what, path in (('original', TRAINING), ('heldout_original', HELD_OUT)):
    audio_io.write(Path(workdir) / f'{what}.wav', *audio_io.read(path))
  pictures.save(pictures.spectrograms(rows), Path(workdir) / 'comparison.png')
  report = {'seed': SEED, 'steps': step, 'sample_rate': rate, 'clip': TRAINING.stem,
            'before': figures_before, 'trained': figures_after}
  files.write_json(Path(workdir) / 'report.json', report)
  print(f"after {step} steps: coherence {old['coherence']:.2f} -> {new['coherence']:.2f} (the clip has "
        f"{new['coherence_reference']:.2f}), ratio to shaped noise {old['ratio']:.2f} -> {new['ratio']:.2f}, change "
        f"under swapped latents {figures_before['swap']:.2f} -> {figures_after['swap']:.2f}")
  print(f'Listen to original.wav, untrained.wav and trained.wav in {workdir}, look at comparison.png; figures: '
        'report.json')


if __name__ == '__main__':
  try:
    main(sys.argv[1])
  except UserError as error:
    sys.exit(f'quickstart: {error}')
