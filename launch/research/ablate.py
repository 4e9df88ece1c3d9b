"""Trains a config unchanged and with one of the paper's choices changed at a time, and measures all in the same way.

    python launch/research/ablate.py --config=configs/small.py --config.data.root=data/music/train \\
      --reference=data/music/heldout --output=runs/ablations

OUTPUT/NAME is the workdir of each run, OUTPUT/reports/NAME.json its report by `m2l2 evaluate`, OUTPUT/ablations.json,
.md and .png the table. Completed runs are kept; the same command resumes a stopped one. Further --config.FIELD=VALUE
flags hold for all runs. A difference that is no larger than that between as_is and other_seed is chance.
"""

import argparse
import json
import os
from pathlib import Path
import subprocess
import sys

from m2l2 import build, files
from m2l2.codec.snapshot import load_snapshot
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation import excerpts
from m2l2.evaluation.reports import pictures, report
from m2l2.evaluation.studies import sweep
from m2l2.training import main as training
from m2l2.training import timing

# Name -> (what it says, fields that differ). {chunks} is the config's batch in chunks, {seed} the next seed.
ABLATIONS = {
    'as_is': ('the config as it is', {}),
    'other_seed': ('the same with another seed: how far chance goes', {'seed': '{seed}'}),
    'local': ('ordered, local embeddings at the same rate', {'variants.local_embeddings.on': True}),
    'one_chunk': ('each chunk denoised alone; as many chunks a step',
                  {'model.chunks': 1, 'train.batch_size': '{chunks}'}),
    'no_cross': ('no cross connections; the latents are tokens of the denoiser instead',
                 {'variants.no_cross_connections.on': True, 'variants.denoiser.latents': True}),
    'latents_in_denoiser': ('the latents are tokens of the denoiser, too', {'variants.denoiser.latents': True}),
    'component': ('real and imaginary parts compressed apart', {'model.transform': 'component'}),
}
METRICS = 'si_sdr,mel_l1_db,mrstft,ratio,seam_db,musicnn_mtt,musicnn_msd'


def main(argv) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True, metavar='FILE[:WORDS]')
  parser.add_argument('--reference', required=True, metavar='DIR', help='music to measure on, never trained on')
  parser.add_argument('--output', required=True, metavar='DIR')
  parser.add_argument('--only', metavar='A,B,...', help=f'some of {", ".join(ABLATIONS)}')
  parser.add_argument('--metrics', default=METRICS, metavar='A,B,...', help=f'of m2l2 evaluate (default: {METRICS})')
  parser.add_argument('--clips', type=int, default=36, metavar='N', help='files of the reference (default 36)')
  parser.add_argument('--seconds', type=float, default=10., metavar='X', help='from the middle of each (default 10)')
  args, flags = parser.parse_known_args(argv)
  names = list(ABLATIONS) if args.only is None else args.only.split(',')
  unknown = [name for name in names if name not in ABLATIONS]
  if unknown:
    raise UserError(f'there is no ablation {unknown[0]!r}: pick from {", ".join(ABLATIONS)}')
  # All of them are built before the first is trained: a config that cannot work says so now.
  about = {name: describe(args.config, flags + fields_of(name, args.config, flags)) for name in names}
  output = Path(args.output)
  reference = cut(args.reference, output / 'reference', seconds=args.seconds, most=args.clips)
  (output / 'reports').mkdir(exist_ok=True)
  for name in names:
    workdir, saved = output / name, output / 'reports' / f'{name}.json'
    if not is_trained(workdir, about[name]['steps']):
      run('train', f'--config={args.config}', f'--workdir={workdir}', *flags, *fields_of(name, args.config, flags))
    if not is_trained(workdir, about[name]['steps']):
      raise UserError(f'{workdir}: training stopped before its end: run the same command to go on')
    if not is_newer(saved, workdir / 'snapshot'):
      run('evaluate', f'--reference={reference}', f'--checkpoint={workdir}', f'--output={saved}', '--quiet',
          f'--metrics={args.metrics}')
    about[name] |= {'what': ABLATIONS[name][0], 'values': sweep.means(json.loads(saved.read_text(encoding='utf-8')))}
    # After each run, so that a table is there before the last.
    done = {name: row for name, row in about.items() if 'values' in row}
    report.write_json(output / 'ablations.json', {'clips': args.clips, 'seconds': args.seconds, 'runs': done})
    files.write_text(output / 'ablations.md', table(done))
    pictures.save(pictures.bars({name: row['values'] for name, row in done.items()}), output / 'ablations.png')
  print(table(done), end='')
  return 0


def fields_of(name, config, flags) -> list[str]:
  """The flags in which an ablation differs from the config as it is."""
  _, changes = ABLATIONS[name]
  plain = parsed(config, flags)
  chunks = plain.train.batch_size * plain.model.chunks
  return [f'--config.{field}={str(value).format(chunks=chunks, seed=plain.seed + 1)}'
          for field, value in changes.items()]


def parsed(config, flags):
  return training.parse(['ablate', f'--config={config}', *flags], required=('config',)).config


def describe(config, flags) -> dict:
  """{'parameters', 'gflop_a_step', 'steps'} of a config with flags. Raises UserError where it cannot be built."""
  config = parsed(config, flags)
  functions = build.step_functions(timing.plain_model(config), ravel=True)
  return {'parameters': timing.parameters(functions), 'steps': config.train.steps,
          'gflop_a_step': timing.step_flops(functions, config.train.batch_size).total / 1e9}


def cut(reference, folder, *, seconds, most) -> Path:
  """The excerpts as files, made once."""
  if not folder.is_dir():
    clips, warnings = excerpts.take_excerpts(reference, seconds=seconds, most=most)
    for line in warnings:
      print(f'ablate: {line}', file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(folder) as aside:
      os.mkdir(aside)
      for number, clip in enumerate(clips):
        audio_io.write(os.path.join(aside, f'{number:03d}-{Path(clip.name).stem}.wav'), clip.audio, clip.sample_rate)
  return folder


def run(*arguments):
  """One m2l2 command in a process of its own: its memory goes with it."""
  done = subprocess.run([sys.executable, '-m', 'm2l2', *map(str, arguments)], check=False)
  if done.returncode:
    raise UserError(f'm2l2 {arguments[0]} ended with status {done.returncode}; the same command resumes it')


def is_trained(workdir, steps) -> bool:
  try:
    return load_snapshot(workdir).step >= steps
  except UserError:  # none yet
    return False


def is_newer(path, than) -> bool:
  return path.is_file() and path.stat().st_mtime > than.stat().st_mtime


def table(rows) -> str:
  """Markdown: a row a run, a column a metric, each with its error."""
  metrics = list(dict.fromkeys(name for row in rows.values() for name in row['values']))
  lines = [f'| run | parameters | GFLOP a step | {" | ".join(metrics)} |', '|---' * (3 + len(metrics)) + '|']
  for name, row in rows.items():
    cells = [cell(row['values'].get(metric)) for metric in metrics]
    lines.append(f'| {name}: {row["what"]} | {row["parameters"] / 1e6:.2f} M | {row["gflop_a_step"]:.1f} | '
                 f'{" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def cell(value) -> str:
  if value is None:
    return '-'
  error = '' if value['error'] is None else f' +- {value["error"]:.2g}'
  return f'{value["mean"]:.3g}{error}'


if __name__ == '__main__':
  try:
    sys.exit(main(sys.argv[1:]))
  except UserError as error:
    sys.exit(f'ablate: {error}')
