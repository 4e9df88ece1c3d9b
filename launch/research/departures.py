#!/usr/bin/env python3
"""What each departure from the paper's recipe is worth on two rungs of the ladder, in sizes of minutes. Prints a table.

  python launch/research/departures.py                     # all rows; those that are there already are left alone
  python launch/research/departures.py --only="nested; clip_norm"

  T1s  two pairs of tones remembered: rung T1 at a quarter of the numbers, 800 steps, processor minutes each
  T2s  tones never heard: rung T2 at half its steps and half its batch

Rows of `paper` start from the paper's recipe (only sizes, learning rate, warm-up and average differ), rows of `paths`
from that and the linear paths and latent_norm, without which the latents are alike at this length (a matter of luck).
"""

import argparse
import json
from pathlib import Path

import ladder

PAPER = 'variants.head_start.share=0 variants.latent_norm.on=False variants.shortcut.width=0'
PATHS = 'variants.head_start.share=0 variants.latent_norm.on=True variants.shortcut.width=8'
ENVELOPE = f'{PATHS} variants.envelope.on=True variants.envelope.weight'
ROWS = {
    'paper': PAPER,
    'latent_norm': f'{PAPER} variants.latent_norm.on=True',
    'paths': PATHS,
    'paths, seed 1': f'{PATHS} --seed=1',
    'head_start': f'{PAPER} variants.head_start.share=0.1',
    'paths, head_start': f'{PATHS} variants.head_start.share=0.1',
    'paths, head_start on magnitudes': f'{PATHS} variants.head_start.share=0.1 variants.head_start.task=magnitudes',
    'envelope .3': f'{ENVELOPE}=0.3',
    'envelope 3': f'{ENVELOPE}=3.0',
    'envelope 30': f'{ENVELOPE}=30.0',
    'envelope 30, head_start on it': f'{ENVELOPE}=30.0 variants.head_start.share=0.3 variants.head_start.task=envelope',
    'envelope 3, local': f'{ENVELOPE}=3.0 variants.local_scale.on=True',
    'envelope 3, local, flow':
        f'{ENVELOPE}=3.0 variants.local_scale.on=True variants.flow_skip.on=True',
    'skip flow': f'{PATHS} variants.flow_skip.on=True',
    'skip flow, seed 1': f'{PATHS} variants.flow_skip.on=True --seed=1',
    'skip flow, envelope .3': f'{ENVELOPE}=0.3 variants.flow_skip.on=True',
    'paper, skip flow': f'{PAPER} variants.flow_skip.on=True',
    'noise signal': f'{PATHS} variants.signal_noise.on=True',
    'feature_norm': f'{PATHS} variants.feature_norm.on=True',
    'magnitude_input': f'{PATHS} variants.magnitude_input.on=True',
    'latents_in_denoiser': f'{PATHS} variants.denoiser.latents=True',
    'nested': f'{PATHS} variants.nested.chance=0.25',
    'clip_norm': f'{PATHS} train.clip_norm=1.0',
}
SMALL = ('model.native_rates=(4000,) model.window=64 model.hop=16 model.bins=32 model.frames=32 '
         'train.steps=800 train.ema_decay=0.98 train.learning_rate=1e-3 train.final_learning_rate=1e-4')
RUNGS = {'T1s': ('T1', SMALL), 'T2s': ('T2', 'train.steps=1500 train.batch_size=4')}


def main():
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--output', default='runs/departures')
  flags.add_argument('--only', default='', help='names of rows, separated by semicolons')
  flags.add_argument('--rung', choices=RUNGS)
  args = flags.parse_args()
  only = [name.strip() for name in args.only.split(';') if name.strip()]
  for rung in [args.rung] if args.rung else RUNGS:
    done = {line['name'] for line in lines(args.output)}
    for row, changes in ROWS.items():
      name = run_name(rung, row)
      if name not in done and (not only or row in only):
        base, sizes = RUNGS[rung]
        ladder.run([base, '--seed=0', *sizes.split(), *changes.split(), f'--output={args.output}', f'--name={name}'])
    print(table(rung, args.output), flush=True)


def run_name(rung, row):
  return f'{rung} {row}'.replace(' ', '_').replace(',', '')


def lines(output):
  path = Path(output) / 'ladder.jsonl'
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []


def table(rung, output) -> str:
  rows = ['| row | CPU s | own (wrong) | sigma 1: own (wrong) | sigma .2 | left, second | coherence | spread |',
          '|---|---|---|---|---|---|---|---|']
  rows_done = {line['name']: line for line in lines(output)}
  for row in ROWS:
    f = rows_done.get(run_name(rung, row))
    if f:
      rows.append(f'| {row} | {f["cpu_s"]:.0f} | {f["own"]:.1f} ({f["wrong"]:.1f}) '
                  f'| {f["own_1"]:.1f} ({f["wrong_1"]:.1f}) | {f["own_0.2"]:.1f} '
                  f'| {f["left_1"]:.1f}, {ladder.best_second(f):.1f} | {f["coherence"]:.2f} '
                  f'of {f["coherence_source"]:.2f} | {f["spread"]:.3f} |')
  return f'{rung}\n' + '\n'.join(rows)


if __name__ == '__main__':
  main()
