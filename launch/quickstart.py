"""What a run gained over the weights it began with: sounds, spectrograms and figures of two clips.

    python launch/quickstart.py WORKDIR

Writes, into the workdir: original.wav, reconstruction.wav (a training clip through the weights that the run began with:
train.init_from, else untrained ones) and reconstruction_trained.wav (through what became of them); the same of the
held-out clip with heldout_ before the name; comparison.png and report.json. Reconstructions are one step from
sigma_max: decoding starts from pure noise, so all that is heard comes through the latents. Figures and sounds are at
the model's own rate.
"""

import copy
import json
import os
from pathlib import Path
import sys

import jax
import numpy as np

from m2l2.clips import HELD_OUT, TRAINING
from m2l2.codec import Codec, load
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation import pictures
from m2l2.evaluation.pairs import pair_metrics
from m2l2.latents import Latents
from m2l2.snapshot import load_snapshot

SEED = 0


def measure(codec: Codec, audio, sample_rate):
  """-> (one-step reconstruction, figures) of audio [channels, samples]."""
  latents = codec.encode(audio, sample_rate)
  one_step = codec.decode(latents, SEED, refine=False)
  # The same noise with the latents of the chunks half a clip away.
  moved = np.roll(latents.z, latents.z.shape[1] // 2, axis=1)
  swapped = codec.decode(Latents(**{**vars(latents), 'z': moved}), SEED, refine=False)
  figures = {
      'one_step': pair_metrics(audio, one_step, sample_rate=sample_rate),
      'swap': float(np.linalg.norm(one_step - swapped) / max(np.linalg.norm(one_step), 1e-9)),
      'latents': {'saturated': float(np.mean(np.abs(latents.z) > 0.99)),
                  'spread_over_chunks': float(np.mean(np.std(latents.z, axis=1)))}}
  if codec.consistency.refine:  # where two steps are the model's way; elsewhere it would only be compiled for this
    two_step = codec.decode(latents, SEED, refine=True)
    figures['two_step'] = pair_metrics(audio, two_step, sample_rate=sample_rate)
  return one_step, figures


def main(workdir):
  trained, step = load(workdir), load_snapshot(workdir).step
  fields = trained.config['train']
  if step < fields['steps']:
    raise UserError(f"training stopped at step {step} of {fields['steps']}: run the same command to go on")
  began = load(fields['init_from']) if fields['init_from'] else Codec(
      config=trained.config, fingerprint='untrained',
      params=jax.jit(trained.network.init)(jax.random.key(trained.config['seed'])))
  if all(began.config[part] == trained.config[part] for part in ('model', 'consistency')):
    params, began = began.params, copy.copy(trained)  # nothing is traced and compiled twice
    began.params = params
  rate = trained.native_rates[0]
  report, rows = {'seed': SEED, 'steps': step, 'sample_rate': rate}, {}
  for name, path, prefix in (('training clip', TRAINING, ''), ('held-out clip', HELD_OUT, 'heldout_')):
    audio, source_rate = audio_io.read(path)
    audio = audio if source_rate == rate else audio_io.resample(audio, from_rate=source_rate, to_rate=rate)
    print(f'measuring the {name}, as it began and after {step} steps', flush=True)
    before, figures_before = measure(began, audio, rate)
    after, figures_after = measure(trained, audio, rate)
    report[name.replace(' ', '_').replace('-', '_')] = {
        'clip': path.stem, 'before': figures_before, 'trained': figures_after}
    for what, sound in (('original', audio), ('reconstruction', before), ('reconstruction_trained', after)):
      audio_io.write(Path(workdir) / f'{prefix}{what}.wav', sound, rate)
    told = lambda figures: f"(ratio {figures['one_step']['ratio']:.2f})"
    rows |= {f'{name}: {path.stem}': (audio, rate),
             f'{name}: as it began {told(figures_before)}': (before, rate),
             f'{name}: after {step} steps {told(figures_after)}': (after, rate)}
  pictures.save(pictures.spectrograms(rows), Path(workdir) / 'comparison.png')
  temporary = Path(workdir) / 'report.json.part'
  temporary.write_text(json.dumps(report, indent=2) + '\n', encoding='utf-8')
  os.replace(temporary, Path(workdir) / 'report.json')
  for name in ('training_clip', 'held_out_clip'):
    old, new = report[name]['before'], report[name]['trained']
    print(f"{name.replace('_', ' '):14} ratio to shaped noise {old['one_step']['ratio']:.2f} -> "
          f"{new['one_step']['ratio']:.2f}, change under swapped latents {old['swap']:.2f} -> {new['swap']:.2f}, "
          f"saturated latents {new['latents']['saturated']:.1%}")
  print(f'Listen to original.wav, reconstruction.wav (as it began) and reconstruction_trained.wav '
        f'in {workdir}, look at comparison.png; figures: report.json')


if __name__ == '__main__':
  try:
    main(sys.argv[1])
  except UserError as error:
    sys.exit(f'quickstart: {error}')
