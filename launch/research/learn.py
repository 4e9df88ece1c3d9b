#!/usr/bin/env python3
"""One trial of a recipe: trains with a fixed budget, judges on fixed excerpts, adds a line to a table.

  python launch/research/learn.py --name=rate22 --cpu-seconds=480 --config=configs/nano.py \\
    --config.data.root=PREPARED --config.model.native_rates='(22050,)'

  --name=NAME        of the trial; its workdir is TABLE/NAME, and the same command resumes it
  --table=DIR        default runs/learn: trials.jsonl and trials.md get a line per trial
  --cpu-seconds=S    as many steps as fit into S processor seconds (measured first);
                     default: config.train.steps
  --music=DIR        the folder of the excerpts' files (default data/music/train)
  --excerpts=FILE    list of excerpts (default launch/research/excerpts/validation.txt), --seconds=6 each
  --compare=A,B,...  no training: draws TABLE/compare.png, the metrics of trials with config.evaluate.root against hours
                     of audio and PFLOP
  --snapshots=DIR    no training: judges the snapshots DIR/*, kept of one run: DIR/curve.json, and DIR/curve.png of
                     their metrics against PFLOP
  --config...        as for m2l2 train: the fields that differ from the file are the trial's delta

Train on the output of `m2l2 prepare --validation-fraction=0.08`: the excerpts of the default list are of files that it
puts aside. In the table: ratio, level, log-mel L1, SI-SDR and FD of one step from pure noise ('2'
behind a name: two steps); exchanged: ratio when another piece's latents are decoded; swap: the relative change then;
spread and rank of the latents; SNR at two noise levels, compared with a Wiener filter that knows each excerpt's mean
spectrum, and with wrong latents.
"""

import argparse
import functools
import json
import os
from pathlib import Path
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np

from m2l2 import build, files
from m2l2.codec import renamed
from m2l2.codec.codec import Codec, load
from m2l2.codec.snapshot import load_snapshot
from m2l2.errors import UserError
from m2l2.evaluation.embedders.embeddings import make_embedder, remembering
from m2l2.evaluation.reports import pictures
from m2l2.evaluation.studies import judging
from m2l2.evaluation.studies.baselines import noise_phases
from m2l2.training import main as command
from m2l2.training import timing
from m2l2.training.probe import probe

EMBEDDING = 'musicnn_mtt'
METRICS = ('ratio', 'mel_l1_db', 'coherence', 'coherence_reference', 'si_sdr')
SIGMAS = (0.2, 1.0)  # those of training/probe.py
COLUMNS = ('name', 'steps', 'cpu_s', 'audio_h', 'pflop', 'ratio', 'fd', 'mel_l1_db', 'coherence',
           'coherence_reference', 'si_sdr', 'level_db', 'ratio2', 'fd2', 'coherence2', 'swap', 'exchanged_ratio',
           'spread', 'rank', 'saturated', 'snr_0.2', 'snr_0.2_wiener', 'snr_1.0', 'snr_1.0_wiener',
           'snr_1.0_swapped', 'seed', 'delta')


def parser():
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--name')
  flags.add_argument('--compare')
  flags.add_argument('--snapshots', type=Path)
  flags.add_argument('--table', default='runs/learn')
  flags.add_argument('--cpu-seconds', type=float)
  flags.add_argument('--music', default='data/music/train')
  flags.add_argument('--excerpts', default=os.path.join(os.path.dirname(__file__), 'excerpts', 'validation.txt'))
  flags.add_argument('--seconds', type=float, default=6.0)
  return flags


def run(argv) -> dict:
  """One trial; returns its line of the table."""
  from m2l2.training.loop import train

  args, rest = parser().parse_known_args(argv)
  if args.compare:
    target = Path(args.table) / 'compare.png'
    pictures.save(pictures.learning_curves(curves(Path(args.table), args.compare.split(','))), target)
    return {'picture': str(target)}
  if args.snapshots:
    return {'picture': str(judge_snapshots(args))}
  if not args.name:
    raise UserError('--name=NAME is missing: the trial\'s')
  config = command.parse(['learn', *rest], required=('config',)).config
  workdir = Path(args.table) / args.name
  rate = build.native_rates(config.model)[0]
  sounds = judging.load(args.excerpts, args.music, seconds=args.seconds, sample_rate=rate)
  if args.cpu_seconds and (workdir / 'config.json').is_file():  # resumed: the steps are those of the first start
    config.train.steps = json.loads((workdir / 'config.json').read_text())['train']['steps']
  elif args.cpu_seconds:
    config.train.steps = steps_within(config, args.cpu_seconds)
  wall, cpu = time.perf_counter(), time.process_time()
  train(config, workdir)
  line = {'name': args.name, 'delta': ' '.join(arg for arg in rest if 'data.root' not in arg), 'seed': config.seed,
          'seconds': time.perf_counter() - wall, 'cpu_s': time.process_time() - cpu, **cost(config),
          **report(load(workdir), sounds, rate, workdir)}
  write(line, Path(args.table))
  return line


def curves(table: Path, names) -> dict[str, list[dict]]:
  """What the averaged weights of trials measured while they were trained, with its cost, for `learning_curves`."""
  runs = {}
  for name in names:
    lines = pictures.read_metrics(table / name)
    config = config_dict.ConfigDict(renamed.current(json.loads((table / name / 'config.json').read_text())))
    measured = [line for line in lines if any(key.startswith('evaluate_ema/') for key in line)]
    if not measured:
      raise UserError(f'{table / name} was trained without config.evaluate.root: nothing to compare')
    flops, hours = timing.model_flops(config), cost(config)['audio_h'] / config.train.steps
    runs[name] = [{'hours': hours * line['step'], 'pflop': flops(line['step']) / 1e15, **{
        key.removeprefix('evaluate_ema/'): line[key] for key in line if key.startswith('evaluate_ema/')}}
                  for line in measured]
  return runs


def judge_snapshots(args) -> Path:
  """One and two steps of each snapshot of a folder, beside exact magnitudes with phases of noise."""
  kept = sorted((load_snapshot(place) for place in args.snapshots.glob('[!.]*') if place.is_dir()),
                key=lambda snapshot: snapshot.step)
  if not kept:
    raise UserError(f'{args.snapshots} holds no snapshots')
  flops = timing.model_flops(config_dict.ConfigDict(renamed.current(kept[-1].config)))
  embedders, points, sounds = {EMBEDDING: remembering(make_embedder(EMBEDDING))}, [], {}
  for snapshot in kept:
    codec = Codec(config=snapshot.config, params=snapshot.params, fingerprint=snapshot.fingerprint)
    rate = codec.native_rates[0]
    sounds = sounds or judging.load(args.excerpts, args.music, seconds=args.seconds, sample_rate=rate)
    line, _ = heard(codec, sounds, rate, embedders)
    points.append({'step': snapshot.step, 'pflop': flops(snapshot.step) / 1e15, **line})
    print(json.dumps(points[-1]), flush=True)
  bound = judging.judge(sounds, {name: noise_phases(audio, codec.representation) for name, audio in sounds.items()},
                        rate, metrics=METRICS, embedders=embedders)
  bounds = {'fd': distance(bound), 'coherence': bound['metrics']['coherence']['mean'],
            'coherence_reference': bound['metrics']['coherence_reference']['mean'],
            'mel_l1_db': bound['metrics']['mel_l1_db']['mean']}
  files.write_json(args.snapshots / 'curve.json', {'points': points, 'phases of noise': bounds})
  pictures.save(pictures.snapshots(points, bounds), args.snapshots / 'curve.png')
  return args.snapshots / 'curve.png'


def steps_within(config, cpu_seconds: float) -> int:
  """Steps of this config that fit in so many seconds of the processors, from timing three of either kind."""
  functions = build.step_functions(config)
  rng = np.random.default_rng(0)
  batch = {'audio': jnp.asarray(0.1 * rng.standard_normal(
      (config.train.batch_size, functions.channels, functions.crop_samples)), jnp.float32)}
  state = jax.jit(functions.init)(jax.random.key(0))

  def seconds(phase):
    step = jax.jit(functools.partial(functions.train_step, phase=phase))
    jax.block_until_ready(step(state, batch))
    times = []
    for _ in range(3):
      begin = time.process_time()
      jax.block_until_ready(step(state, batch))
      times.append(time.process_time() - begin)
    return statistics.median(times)

  total, begin = 0.0, 0
  for phase, end in functions.phases:
    total, begin = total + (end - begin) * seconds(phase), end
  mean = total / config.train.steps
  return max(1, int(cpu_seconds / mean))


def cost(config) -> dict[str, float]:
  functions, train = build.step_functions(config), config.train
  audio = train.steps * train.batch_size * functions.crop_samples / functions.sample_rate
  return {'steps': train.steps, 'audio_h': audio / 3600, 'pflop': timing.model_flops(config)(train.steps) / 1e15}


def report(codec: Codec, sounds, rate: int, workdir: Path) -> dict[str, float]:
  """What a model makes of the excerpts, as numbers; pictures go to the workdir."""
  line, estimates = heard(codec, sounds, rate, {EMBEDDING: make_embedder(EMBEDDING)})
  draw(sounds, estimates, rate, workdir)
  return {**line, **denoising(codec, sounds)}


def distance(judgement) -> float:
  return judgement['frechet'][EMBEDDING]['value'] if judgement['frechet'] else float('nan')


def heard(codec: Codec, sounds, rate: int, embedders) -> tuple[dict[str, float], dict[str, dict]]:
  """(figures, the sounds of one step, of two, and of one step with the latents of another piece)."""
  latents = judging.encode(codec, sounds, rate)
  one_step = judging.decode(codec, latents, refine=False)
  two = judging.decode(codec, latents, refine=True)
  other = judging.decode(codec, judging.exchanged(latents), refine=False)
  judged, judged2 = (judging.judge(sounds, estimates, rate, metrics=METRICS, embedders=embedders)
                     for estimates in (one_step, two))
  exchanged = judging.judge(sounds, other, rate, metrics=('ratio',))
  mean = lambda judgement, name: judgement['metrics'][name]['mean']
  line = {name: mean(judged, name) for name in METRICS}
  line |= {'fd': distance(judged), 'level_db': judged['level_db'], 'level_error_db': judged['level_error_db'],
           'ratio2': mean(judged2, 'ratio'), 'mel_l1_db2': mean(judged2, 'mel_l1_db'), 'fd2': distance(judged2),
           'coherence2': mean(judged2, 'coherence'),
           'level_db2': judged2['level_db'], 'swap': judging.change(one_step, other),
           'exchanged_ratio': mean(exchanged, 'ratio'), **judging.latent_health(latents)}
  return line, {'one step': one_step, 'two steps': two, 'latents of another piece': other}


def denoising(codec: Codec, sounds) -> dict[str, float]:
  """SNR in dB of denoising the excerpts' first pairs of chunks: the model, with wrong latents, a Wiener filter."""
  crop = codec.representation.crop_samples(codec.network.arch.chunks)
  channels = codec.representation.channels  # mono excerpts are heard on both of a stereo model's
  audio = jnp.asarray(np.stack([np.broadcast_to(audio[:, :crop], (channels, crop)) for audio in sounds.values()
                                if audio.shape[1] >= crop]))
  key = jax.random.key(0)
  probed = jax.jit(functools.partial(
      probe, network=codec.network, representation=codec.representation, consistency=codec.consistency))(
          codec.params, audio, key)
  spec = np.asarray(codec.representation.analyse(audio))
  noise = np.asarray(codec.consistency.unit_noise(key, codec.representation, spec.shape[1]))
  snr = {f'snr_{sigma}_wiener': wiener_snr(spec, noise, sigma) for sigma in SIGMAS}
  return snr | {name: float(value) for name, value in probed.items() if name.startswith('snr')}


def wiener_snr(spec, noise, sigma: float) -> float:
  """SNR in dB of the Wiener filter that knows the power of each bin of [B, S, F, T, C], mean over S and T."""
  power = np.mean(np.square(spec), axis=(1, 3), keepdims=True)
  estimate = power / (power + sigma ** 2) * (spec + sigma * noise)
  return float(10 * np.log10(np.sum(np.square(spec)) / np.sum(np.square(estimate - spec))))


def draw(sounds, estimates, rate, workdir, *, count: int = 3):
  """spectrograms.png of a few excerpts and what came of them, and curves.png of the run."""
  rows = {}
  names = list(sounds)
  for name in names[::max(1, len(names) // count)][:count]:
    rows[name] = (sounds[name], rate)
    rows |= {f'{kind}: {name}': (by_name[name], rate) for kind, by_name in estimates.items()}
  pictures.save(pictures.spectrograms(rows), workdir / 'spectrograms.png')
  pictures.save(pictures.curves(workdir, ('loss', 'loss/envelope', 'probe_ema/swap', 'latent/spread')),
                workdir / 'curves.png')


def write(line: dict, table: Path):
  """Adds the line to trials.jsonl (an older one of that name goes) and writes trials.md anew."""
  table.mkdir(parents=True, exist_ok=True)
  path = table / 'trials.jsonl'
  lines = [json.loads(old) for old in path.read_text().splitlines()] if path.is_file() else []
  lines = [old for old in lines if old['name'] != line['name']] + [line]
  files.write_text(path, '\n'.join(map(json.dumps, lines)) + '\n')
  files.write_text(table / 'trials.md', markdown(lines))


def markdown(lines) -> str:
  shown = lambda value: f'{value:.3g}' if isinstance(value, float) else str(value)
  rows = [COLUMNS, ['---'] * len(COLUMNS), *([shown(line.get(name, '')) for name in COLUMNS] for line in lines)]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows) + '\n'


if __name__ == '__main__':
  try:
    print(json.dumps(run(sys.argv[1:]), indent=2))
  except UserError as error:
    sys.exit(f'learn: {error}')
