#!/usr/bin/env python3
"""A ladder of known answers: does the recipe learn? Each rung says what must come out, and fails where it does not.

  python launch/research/ladder.py T1                                   # one rung; exits 1 where it fails
  python launch/research/ladder.py C variants.head_start.share=0        # the same without its head start
  python launch/research/ladder.py M --data=data/prepared

  G   independent Gaussian bins: the network must become their flow map, which is known in closed form
  T1  two pairs of harmonic tones, the same in each step: phases and latents are remembered
  T2  harmonic tones without end: those never heard come back through their latents
  C   one real clip of 6 s, random crops
  P   piano, pieces never heard (rendered from generated scores; fluidsynth and fluid-soundfont-gm are needed)
  M   general music, tracks never heard

  --quick            G and T1 in a form of at most a minute, as the tests run them
  --seed=N           of weights and of noise; the rung's own by default
  --output=DIR       default runs/ladder: DIR/ladder.jsonl gets a line a run, DIR/NAME its weights; P and M are
                     trained there, and the same command goes on with them
  --name=NAME        of the run in the table; the rung's own by default
  --data=PLACE       of P: what launch/research/piano.py made (data/piano); of M: music to train on, as prepared with
                     --validation-fraction=0.08 (data/prepared)
  --held=DIR         of M: where the excerpts of launch/research/excerpts/validation.txt are (data/music/train)
  group.field=VALUE  what differs from the rung's config

Figures: SNR in dB of the compressed spectrogram, of one step from sigma_max with the right latents and with another
crop's (`own`, `wrong`), of denoising at lower levels (`own_1`, `wrong_1`: sigma 1); `left_1`, `left_2`: of the left
chunk after one step and after the second denoising, `gain_error` the standard error of their difference;
`coherence`: evaluation/metrics/phases.py, beside the source's;
`log_magnitude`: mean error of log-magnitudes from sigma_max, with right and wrong latents.
"""

import argparse
import ast
import dataclasses
import functools
import json
import math
import os
from pathlib import Path
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from m2l2 import build, compiling
from m2l2.assets import TRAINING
from m2l2.codec.codec import load
from m2l2.codec.snapshot import save_snapshot
from m2l2.configs import base, clip
from m2l2.configs import piano as piano_preset
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation.embedders.embeddings import make_embedder
from m2l2.evaluation.metrics.phases import coherence
from m2l2.evaluation.studies import baselines, judging
from m2l2.training import config_file, timing
from m2l2.training.loop import train
from m2l2.variants import envelope

EMBEDDING = 'musicnn_mtt'
SIGMA_CONDS = (0.1, 0.3, 0.965, 2.0, 5.0, 15.0)  # the curve of the paper's figure 3
LEVELS = (0.2, 1.0, 5.0)


# Rungs' configs: base with other sizes, and with learning rate, warm-up and average to match the steps. G and T1 are
# the paper's recipe but for these; T2, C, P and M have linear paths to the latents and a head start, P and M the flow's
# c_skip, too.


def recipe(*, steps, batch_size, learning_rate=1e-3, warmup_steps=100, ema_decay=0.95):
  """The paper's recipe for a small network and a short run."""
  config = base.get_config().unlock()
  config.model.remat = 'none'
  config.consistency.step_exponent = 2.0
  config.train.update(
      steps=steps, batch_size=batch_size, learning_rate=learning_rate, final_learning_rate=learning_rate / 10,
      warmup_steps=warmup_steps, ema_decay=ema_decay, b2=0.99, probe_every=0, log_every=50, checkpoint_every=500)
  return config


def gaussian_config(quick):
  config = recipe(steps=2000, batch_size=8, learning_rate=4e-3, ema_decay=0.98)
  if quick:
    config.train.update(steps=400, batch_size=2, learning_rate=1e-2)
  config.train.final_learning_rate = 1e-4
  config.model.update(
      native_rates=(8000,), window=64, hop=16, bins=Gaussian.bins, frames=Gaussian.frames, stem=(2, 2), widths=(16, 32),
      blocks=(1, 1), strides=((4, 4),), layers=1, head_dim=32, cond_dim=32, registers=1, num_latents=1, latent_dim=1)
  return config


def tones_config(quick):
  # Without linear paths a larger rate makes the latents all alike for thousands of steps, in some seeds.
  config = recipe(steps=3000, batch_size=2, learning_rate=4e-4, ema_decay=0.98)
  config.seed = 0 if quick else 1
  config.model.update(
      native_rates=(8000,), window=128, hop=32, bins=64, frames=64, widths=(16, 32, 64), blocks=(1, 1, 1),
      strides=((4, 2), (2, 2)), layers=2, head_dim=32, cond_dim=64, registers=4, num_latents=8, latent_dim=8)
  if quick:
    # A quarter of the numbers, in one level, and linear paths.
    config.train.update(FAST, steps=100, warmup_steps=50)
    config.model.update(SMALL | dict(stem=(4, 4), widths=(64,), blocks=(1,), strides=()))
    config.variants.update(PATHS)
  return config


FAST = dict(learning_rate=1e-3, final_learning_rate=1e-4)
SMALL = dict(native_rates=(4000,), window=64, hop=16, bins=32, frames=32)
PATHS = {'latent_norm': {'on': True}, 'shortcut': {'width': 8}}  # tokens -> latents -> tokens


def unheard_tones_config(quick):
  config = tones_config(False)
  config.model.update(SMALL)
  config.variants.update(PATHS, head_start={'share': 0.1})
  config.train.update(FAST, steps=3000, batch_size=8, ema_decay=0.99)
  return config


def clip_config(quick):
  """Linear paths to the latents and a head start on the data."""
  return clip.get_config().unlock()


def piano_config(quick):
  return piano_preset.get_config().unlock()


def corpus_config(quick):
  """Room on every level: as many channels as a patch holds numbers (16 in 64, 256 in 256). 11.5 M parameters."""
  config = clip_config(quick)
  config.train.update(steps=2400, warmup_steps=200, ema_decay=0.99, probe_every=200, checkpoint_every=200)
  config.variants.flow_skip.on = True
  config.variants.head_start.update(share=0.05, task='magnitudes')
  config.model.update(widths=(64, 256), blocks=(1, 1), strides=((4, 4),), cond_dim=128)
  return config


# Data.


def tones(rng, count, samples, rate=8000):
  """Harmonic tones, one a crop, 110 to 880 Hz, of at most four partials with random phases: [count, 1, samples]."""
  pitch = 110 * 2 ** rng.uniform(0, 3, (count, 1, 1))
  partial = np.arange(1, 5)[None, :, None]
  amplitude = rng.uniform(0.3, 0.8, (count, 1, 1)) ** (partial - 1) * (pitch * partial < 0.45 * rate)
  phase = rng.uniform(0, 2 * np.pi, (count, 4, 1))
  sines = amplitude * np.sin(2 * np.pi * pitch * partial * np.arange(samples) / rate + phase)
  audio = sines.sum(axis=1) * rng.uniform(0.1, 0.4, (count, 1)) + 1e-3 * rng.standard_normal((count, samples))
  return audio[:, None].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """Stands where a Representation stands: its `audio` are independent Gaussian bins, rows with known deviations."""
  bins: int = 32
  frames: int = 32
  channels: int = 1

  @property
  def deviations(self):
    return np.geomspace(1.6, 0.06, self.bins).astype(np.float32)

  def crop_samples(self, chunks):
    return chunks * self.bins * self.frames * 2

  def draw(self, rng, count):
    shape = (count, 2, self.bins, self.frames, 2)
    return (rng.standard_normal(shape) * self.deviations[:, None, None]).astype(np.float32).reshape(count, 1, -1)

  def analyse(self, audio):
    return audio.reshape(audio.shape[0], -1, self.bins, self.frames, 2)

  @property
  def chunk_shape(self):
    return self.bins, self.frames, 2


def read_mono(path, rate):
  """The file at `rate`, float32 [samples]."""
  audio, own = audio_io.read(path)
  return audio_io.resample(audio.mean(axis=0, keepdims=True), from_rate=own, to_rate=rate)[0]


def crops(audio, starts, samples):
  return np.stack([audio[start:start + samples][None] for start in starts])


# Training and measuring.


def fit(functions, config, batches, *, output, quick=False):
  """config.train.steps steps on what `batches(step)` gives -> the averaged weights, which m2l2.load(output) reads too,
  and the processor seconds of the steps. quick: so few steps that optimising them takes longer.
  """
  options = build.compiler_options(config) | (compiling.optimised(1) if quick else {})
  jitted = {name: jax.jit(functools.partial(functions.train_step, phase=name), donate_argnums=0)
            for name, _ in functions.phases}
  state = functions.ravel(jit(functions.init)(jax.random.key(config.seed)))
  compiled, began = {}, None
  for step in range(config.train.steps):
    batch = {'audio': jnp.asarray(batches(step))}
    phase = functions.phase(step)
    if phase not in compiled:
      compiled[phase] = jitted[phase].lower(state, batch).compile(compiler_options=options)
    began = began or time.process_time()
    state, metrics = compiled[phase](state, batch)
    if (step + 1) % max(1, config.train.steps // 10) == 0:
      show(f'step {step + 1}', {name: float(metrics[name]) for name in (
          'loss', 'norm/gradients', 'latent/spread', 'latent/pre_rms')})
  seconds = time.process_time() - began
  params = functions.unravel(state).ema
  save_snapshot(output, params=params, config=json.loads(json.dumps(config.to_dict())), step=config.train.steps)
  return jax.device_put(params), seconds


def jit(function):
  """jax.jit for what runs a few times alone."""
  return jax.jit(function, compiler_options=compiling.optimised(0))


def judge(functions, config, params, audio, seed=5):
  """Figures of a network on audio [B, 1, N], B >= 2: see the top."""
  network, consistency = functions.network, build.consistency(config)
  representation = build.representation(config.model)
  bottleneck = network.arch.make_bottleneck()
  run = jit(lambda x, noise, sigma, features: consistency.bind(network, params, features)(
      x + sigma[:, :, None, None, None] * noise, sigma))

  spec = jit(representation.analyse)(audio)
  z = bottleneck(jit(network.encode)(params, spec))
  decode, coherent = jit(network.decode), jit(lambda x: coherence(x).mean())
  own, wrong = decode(params, z), decode(params, jnp.roll(z, len(z) // 2, axis=0))
  keys = jax.random.split(jax.random.key(seed), 2 * len(audio)).reshape(2, len(audio))
  draw = jit(jax.vmap(lambda k: consistency.unit_noise(k, representation, 2)))
  noise, second = draw(keys[0]), draw(keys[1])
  level = lambda sigma: jnp.full(spec.shape[:2], sigma, jnp.float32)
  figures = {'coherence_source': coherent(spec), 'spread': jnp.std(z, axis=(0, 1)).mean()}

  estimate = run(jnp.zeros_like(spec), noise, level(consistency.sigma_max), own)
  estimate_wrong = run(jnp.zeros_like(spec), noise, level(consistency.sigma_max), wrong)
  error = jit(lambda x: jnp.abs(envelope.log_magnitude(x) - envelope.log_magnitude(spec)).mean() * envelope.UNIT)
  figures |= {'own': snr(spec, estimate), 'wrong': snr(spec, estimate_wrong), 'coherence': coherent(estimate),
              'energy': jnp.sqrt(jnp.sum(estimate ** 2) / jnp.sum(spec ** 2)),
              'log_magnitude': error(estimate), 'log_magnitude_wrong': error(estimate_wrong),
              'left_1': snr(spec[:, :1], estimate[:, :1])}
  first = snr_of_each(spec[:, :1], estimate[:, :1])
  for sigma in LEVELS:
    for name, features in (('own', own), ('wrong', wrong)):
      figures[f'{name}_{sigma:g}'] = snr(spec, run(spec, noise, level(sigma), features))
  # The second denoising: the left chunk as it came, noise again, a new chunk to its right.
  curve = {}
  for sigma in sorted({*SIGMA_CONDS, consistency.sigma_cond}):
    pair = jnp.stack([estimate[:, 0], jnp.zeros_like(estimate[:, 0])], axis=1)
    levels = jnp.stack([jnp.full(len(spec), sigma), jnp.full(len(spec), consistency.sigma_max)], axis=1)
    two = run(pair, second, levels, own)
    left = snr_of_each(spec[:, :1], two[:, :1])
    curve[f'{sigma:g}'] = {'left': left.mean(), 'coherence': coherent(two[:, :1]),
                           'gain_error': jnp.std(left - first, ddof=1) / math.sqrt(len(spec))}
  at = curve[f'{consistency.sigma_cond:g}']
  figures |= {'left_2': at['left'], 'coherence_2': at['coherence'], 'sigma_cond': curve}
  return jax.tree.map(float, figures)


@jax.jit
def snr(target, estimate):
  """Mean over chunks of the SNR in dB."""
  return jnp.mean(snr_of_each(target, estimate))


@jax.jit
def snr_of_each(target, estimate):
  """[B, S] in dB."""
  axes = (2, 3, 4)
  return 10 * jnp.log10(jnp.sum(target ** 2, axis=axes) / jnp.sum((target - estimate) ** 2, axis=axes))


# The rungs: each returns (figures, failures).


def gaussian(config, args):
  """Flow map of a Gaussian of deviation s: x / sqrt(1 + (sigma / s)^2), of SNR 10.7, 2.3, -1.4 dB at sigma / s = .3, 1,
  3; a Wiener filter has 10.8, 3.0, .5."""
  representation = Gaussian()
  functions = build.step_functions(config, ravel=True, data=representation)
  consistency, network = build.consistency(config), functions.network
  rng = np.random.default_rng(config.seed)
  params, seconds = fit(functions, config, lambda step: representation.draw(rng, config.train.batch_size),
                        output=workdir(args), quick=args.quick)

  spec = representation.analyse(jnp.asarray(representation.draw(np.random.default_rng(999), 16)))
  features = jit(network.decode)(params, network.arch.make_bottleneck()(jit(network.encode)(params, spec)))
  noise = jit(lambda key: jax.random.normal(key, spec.shape))(jax.random.key(5))
  run = jit(lambda x, sigma: consistency.bind(network, params, features)(
      x + sigma * noise, jnp.full(spec.shape[:2], sigma, jnp.float32)))
  figures, failures = {}, []
  for ratio in (0.3, 1.0, 3.0):
    gain = 1 / math.sqrt(1 + ratio ** 2)
    known = -10 * math.log10((1 - gain) ** 2 + (gain * ratio) ** 2)
    rows = []
    for row in range(0, representation.bins, 3):
      estimate = np.asarray(run(spec, ratio * representation.deviations[row]))[:, :, row]
      known_row = np.asarray(spec)[:, :, row]
      rows.append(10 * math.log10(np.sum(known_row ** 2) / np.sum((known_row - estimate) ** 2)))
    figures[f'snr_{ratio:g}'], figures[f'known_{ratio:g}'] = float(np.mean(rows)), known
    near = 0.7 if args.quick else 0.3
    if abs(np.mean(rows) - known) > near:
      failures.append(f'SNR at sigma / s = {ratio:g} is {np.mean(rows):.2f} dB, not {known:.2f} +- {near:g}')
  sample = np.asarray(run(jnp.zeros_like(spec), consistency.sigma_max))
  level = 20 * np.log10(np.std(sample, axis=(0, 1, 3, 4)) / representation.deviations)
  figures['rows_db'] = float(np.abs(level).max())
  most = 4 if args.quick else 0.8
  if figures['rows_db'] > most:
    failures.append(f'a row of one-step samples is off by {figures["rows_db"]:.2f} dB, more than {most:g}')
  return {**figures, 'cpu_s': seconds}, failures


def remembered_tones(config, args):
  functions = build.step_functions(config, ravel=True)
  audio = tones(np.random.default_rng(config.seed), config.train.batch_size, functions.crop_samples,
                rate=functions.sample_rate)
  params, seconds = fit(functions, config, lambda step: audio, output=workdir(args), quick=args.quick)
  figures = judge(functions, config, params, audio)
  conditions = {f'one step reaches {5 if args.quick else 14} dB': figures['own'] >= (5 if args.quick else 14),
                'wrong latents stay below 0 dB': figures['wrong'] < 0}
  if not args.quick:  # low levels come late
    conditions['the second denoising gains 1 dB'] = best_second(figures) >= figures['left_1'] + 1
  return {**figures, 'cpu_s': seconds}, check(figures, conditions)


def unheard_tones(config, args):
  functions = build.step_functions(config, ravel=True)
  rng = np.random.default_rng(config.seed)
  draw = lambda rng, count: tones(rng, count, functions.crop_samples, rate=functions.sample_rate)
  params, seconds = fit(functions, config, lambda step: draw(rng, config.train.batch_size), output=workdir(args))
  figures = judge(functions, config, params, draw(np.random.default_rng(999), 32))
  return {**figures, 'cpu_s': seconds}, check(figures, {
      'one step reaches 6 dB': figures['own'] >= 6, 'coherence reaches .8': figures['coherence'] >= 0.8})


def one_clip(config, args):
  """A sample has at best 3 dB less SNR than the mean, which a regression gives: 2.4 dB here, in the same sizes."""
  functions = build.step_functions(config, ravel=True)
  audio = read_mono(TRAINING, functions.sample_rate)
  last = len(audio) - functions.crop_samples
  rng = np.random.default_rng(config.seed)
  params, seconds = fit(functions, config, lambda step: crops(
      audio, rng.integers(0, last, config.train.batch_size), functions.crop_samples), output=workdir(args))
  figures = judge(functions, config, params, crops(
      audio, np.linspace(0, last, 24).astype(int), functions.crop_samples))
  return {**figures, 'cpu_s': seconds}, check(figures, {
      "coherence reaches .9 of the clip's": figures['coherence'] >= 0.9 * figures['coherence_source'],
      'right latents gain 2 dB over wrong ones': figures['own'] >= figures['wrong'] + 2,
      "one step is within 3.5 dB of a regression's 2.4": figures['own'] >= 2.4 - 3.5,
      'two steps are no worse than one': best_second(figures) >= figures['left_1'] - 0.01})


def best_second(figures):
  """SNR of the left chunk after the second denoising at the level that suits this network, as the paper chose its own
  by a sweep (figure 3)."""
  return max(level['left'] for level in figures['sigma_cond'].values())


def corpus(config, args, sounds, goals):
  """Trains as `m2l2 train` does, in a workdir of its own (the same command goes on with it), and judges on sounds."""
  began = time.process_time()
  train(config, str(workdir(args)))
  seconds = time.process_time() - began
  codec, functions = load(workdir(args)), build.step_functions(config)
  crop = functions.crop_samples
  whole = [audio for audio in sounds.values() if audio.shape[1] >= crop]
  figures = judge(functions, config, codec.params, np.stack([audio[:, :crop] for audio in whole]))
  rate, embedders = functions.sample_rate, {EMBEDDING: make_embedder(EMBEDDING)}
  latents = judging.encode(codec, sounds, rate)
  for name, estimates in (('', judging.decode(codec, latents, refine=False)),
                          ('_2', judging.decode(codec, latents, refine=True)),
                          ('_bound', {name: baselines.noise_phases(audio, codec.representation)
                                      for name, audio in sounds.items()})):
    judged = judging.judge(sounds, estimates, rate, metrics=('mel_l1_db', 'coherence', 'coherence_reference'),
                           embedders=embedders)
    figures[f'fd{name}'] = judged['frechet'][EMBEDDING]['value']
    figures |= {f'{metric}_of_sound{name}': judged['metrics'][metric]['mean'] for metric in judged['metrics']}
  return {**figures, 'cpu_s': seconds}, check(figures, goals(figures))


def piano(config, args):
  root = Path(args.data or 'data/piano')
  if not (root / 'train').is_dir():
    raise UserError(f'{root}/train is missing: python launch/research/piano.py --output={root} renders it')
  config.data.root = str(root / 'train')
  rate, sounds = build.native_rates(config.model)[0], {}
  for path in sorted((root / 'heldout').glob('*.flac')):
    audio = read_mono(path, rate)
    for start in np.linspace(5, len(audio) / rate - 15, 3):
      sounds[f'{path.stem}@{start:.0f}'] = audio[None, int(start * rate):int((start + 6) * rate)]
  return corpus(config, args, sounds, lambda f: {
      'coherence reaches .5': f['coherence'] >= 0.5, 'two steps are no worse than one': best_second(f) >= f['left_1'],
      'FD is below that of exact magnitudes with random phases': f['fd'] < f['fd_bound']})


def music(config, args):
  config.data.root = args.data or 'data/prepared'
  folder = Path(__file__).resolve().parent / 'excerpts'
  rate = build.native_rates(config.model)[0]
  sounds = judging.load(folder / 'validation.txt', args.held, seconds=6, sample_rate=rate)
  return corpus(config, args, sounds, lambda f: {
      'FD is below 200': f['fd'] < 200, 'coherence reaches .35': f['coherence'] >= 0.35})


def workdir(args) -> Path:
  return Path(args.output) / args.name


def check(figures, conditions):
  return [name for name, holds in conditions.items() if not holds]


RUNGS = {'G': (gaussian_config, gaussian), 'T1': (tones_config, remembered_tones),
         'T2': (unheard_tones_config, unheard_tones), 'C': (clip_config, one_clip), 'P': (piano_config, piano),
         'M': (corpus_config, music)}


def show(title, figures):
  numbers = ' '.join(f'{name} {value:.3g}' for name, value in figures.items() if isinstance(value, (int, float)))
  print(f'{title}: {numbers}', flush=True)


def override(config, changes):
  """Applies group.field=VALUE to the config. Raises UserError for what it does not have."""
  for change in changes:
    name, _, value = change.partition('=')
    if not value or name not in config_file.field_names():
      raise UserError(f'{change!r}: give group.field=VALUE; {config_file.missing(name.rpartition(".")[2], near=name)}')
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      pass  # a word
    try:
      config.update_from_flattened_dict({name: value})
    except TypeError as error:
      raise UserError(f'{change!r}: {error}') from error
  return config


def run(argv) -> dict:
  """One rung's line: its figures, what they cost, and what failed."""
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('rung', choices=RUNGS)
  flags.add_argument('changes', nargs='*', metavar='group.field=VALUE')
  flags.add_argument('--quick', action='store_true')
  flags.add_argument('--seed', type=int)
  flags.add_argument('--output', default='runs/ladder')
  flags.add_argument('--name')
  flags.add_argument('--data')
  flags.add_argument('--held', default='data/music/train')
  args = flags.parse_intermixed_args(argv)
  args.name = args.name or args.rung
  make_config, climb = RUNGS[args.rung]
  config = make_config(args.quick)
  config.seed = config.seed if args.seed is None else args.seed
  config = override(config, args.changes)
  figures, failures = climb(config, args)
  steps = config.train.steps
  line = {'name': args.name, 'rung': args.rung, 'changes': ' '.join(args.changes), 'seed': config.seed,
          'steps': steps, 'pflop': timing.model_flops(config)(steps) / 1e15, **figures, 'failures': failures}
  os.makedirs(args.output, exist_ok=True)
  with open(Path(args.output) / 'ladder.jsonl', 'a', encoding='utf-8') as file:
    file.write(json.dumps(line) + '\n')
  return line


def main(argv) -> int:
  line = run(argv)
  show(line['name'], {name: value for name, value in line.items() if name != 'seed'})
  print('PASS' if not line['failures'] else f'FAIL: {"; ".join(line["failures"])}')
  return 1 if line['failures'] else 0


if __name__ == '__main__':
  try:
    sys.exit(main(sys.argv[1:]))
  except UserError as error:
    sys.exit(f'ladder: {error}')
