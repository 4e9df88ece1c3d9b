"""What the quickstart has learned: sounds, spectrograms and figures of a training and the held-out clip.

    python launch/quickstart.py WORKDIR

Writes original.wav, reconstruction.wav (a training clip), heldout_original.wav, heldout_reconstruction.wav,
comparison.png and report.json into the workdir. Reconstructions are one step from sigma_max: decoding starts
from pure noise, so all that is heard comes through the latents.
"""

import json
import os
from pathlib import Path
import sys

import jax
import numpy as np

from m2l2.codec import Codec, load
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation import pictures
from m2l2.evaluation.pairs import pair_metrics
from m2l2.latents import Latents
from m2l2.sketch import HELD_OUT, TRAINING
from m2l2.snapshot import load_snapshot

SEED = 0


def measure(codec: Codec, audio, sample_rate):
  """-> (one-step reconstruction, figures) of audio [channels, samples]."""
  latents = codec.encode(audio, sample_rate)
  one_step = codec.decode(latents, SEED, refine=False)
  two_step = codec.decode(latents, SEED)
  # The same noise with the latents of the chunks half a clip away.
  moved = np.roll(latents.z, latents.z.shape[1] // 2, axis=1)
  swapped = codec.decode(Latents(**{**vars(latents), 'z': moved}), SEED, refine=False)
  figures = {
      'one_step': pair_metrics(audio, one_step, sample_rate=sample_rate),
      'two_step': pair_metrics(audio, two_step, sample_rate=sample_rate),
      'swap': float(np.linalg.norm(one_step - swapped) / max(np.linalg.norm(one_step), 1e-9)),
      'latents': {'saturated': float(np.mean(np.abs(latents.z) > 0.99)),
                  'spread_over_chunks': float(np.mean(np.std(latents.z, axis=1)))}}
  return one_step, figures


def main(workdir):
  trained, step = load(workdir), load_snapshot(workdir).step
  steps = trained.config['train']['steps']
  if step < steps:
    raise UserError(f'training stopped at step {step} of {steps}: run the same command to go on')
  untrained = Codec(config=trained.config, fingerprint='untrained',
                    params=trained.network.init(jax.random.key(trained.config['seed'])))
  report, rows = {'seed': SEED, 'steps': step}, {}
  for name, path, prefix in (('training clip', TRAINING, ''), ('held-out clip', HELD_OUT, 'heldout_')):
    audio, rate = audio_io.read(path)
    sound, figures = measure(trained, audio, rate)
    before, untrained_figures = measure(untrained, audio, rate)
    report[name.replace(' ', '_').replace('-', '_')] = {
        'clip': path.stem, 'trained': figures, 'untrained': untrained_figures}
    audio_io.write(Path(workdir) / f'{prefix}original.wav', audio, rate)
    audio_io.write(Path(workdir) / f'{prefix}reconstruction.wav', sound, rate)
    ratio = figures['one_step']['ratio']
    rows |= {f'{name}: {path.stem}': (audio, rate),
             f'{name}: reconstruction (ratio {ratio:.2f})': (sound, rate),
             f'{name}: by the untrained model': (before, rate)}
  pictures.save(pictures.spectrograms(rows), Path(workdir) / 'comparison.png')
  temporary = Path(workdir) / 'report.json.part'
  temporary.write_text(json.dumps(report, indent=2) + '\n', encoding='utf-8')
  os.replace(temporary, Path(workdir) / 'report.json')
  for name in ('training_clip', 'held_out_clip'):
    new, old = report[name]['trained'], report[name]['untrained']
    print(f"{name.replace('_', ' '):14} ratio to shaped noise {new['one_step']['ratio']:.2f} "
          f"(untrained {old['one_step']['ratio']:.2f}), change under swapped latents {new['swap']:.2f} "
          f"(untrained {old['swap']:.2f}), saturated latents {new['latents']['saturated']:.1%}")
  print(f'Listen to {workdir}/original.wav and {workdir}/reconstruction.wav, look at {workdir}/comparison.png; '
        f'figures: {workdir}/report.json')


if __name__ == '__main__':
  try:
    main(sys.argv[1])
  except UserError as error:
    sys.exit(f'quickstart: {error}')
