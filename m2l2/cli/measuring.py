"""evaluate, sweep-sigma-cond, probe: reports on reconstructions and latents."""

import argparse
import contextlib
import datetime
import functools
import os
from pathlib import Path
import tempfile

from m2l2 import __version__
from m2l2.cli import coding, extras, options, terminal
from m2l2.errors import UserError
from m2l2.evaluation.metrics.registry import METRICS


def add(command):
  from m2l2.evaluation.embedders.embeddings import EMBEDDINGS  # imports no package of the extras
  parser = command('evaluate', _evaluate,
                   summary='Metrics of reconstructions against their originals, in pairs by file name.',
                   example='  m2l2 evaluate --reference=DIR --estimate=DIR --output=report.json --html=report.html\n'
                           '  m2l2 evaluate --reference=DIR --checkpoint=tiny --output=report.json '
                           '--metrics=si_sdr,musicnn_mtt')
  parser.add_argument('--reference', required=True, metavar='DIR', help='the originals (a folder, or one file)')
  parser.add_argument('--estimate', metavar='DIR',
                      help='their reconstructions; with --checkpoint, the folder to write them to')
  options.overwrite(parser, 'with --checkpoint: replace files that --estimate holds (default: refuse)')
  options.checkpoint(parser, required=False,
                     help='reconstruct first, with this snapshot, workdir or model in the box')
  parser.add_argument('--beside', metavar='NAME=DIR', action='append', default=[],
                      help='other reconstructions of the same files: a column of the table of means and a player of '
                      'the page; repeat for several')
  options.report(parser)
  parser.add_argument('--csv', metavar='*.csv', help='a table with one row per file')
  parser.add_argument('--html', metavar='*.html', help='one page with tables, plots, spectrograms and players')
  parser.add_argument('--players', type=int, default=6, metavar='N', help='files with players in it (default 6)')
  parser.add_argument('--small', action='store_true', help='MP3 and JPEG in it: a fifth of the bytes')
  parser.add_argument('--credits', metavar='FILE', help='text for the end of that page: whose music it is, its licence')
  parser.add_argument('--metrics', metavar='A,B,...',
                      help=f'some of {", ".join(METRICS)}, and Frechet distances over {", ".join(EMBEDDINGS)} '
                      f'(default: {_defaults()})')
  parser.add_argument('--vggish', metavar='FILE',
                      help='weights of VGGish: vggish-10086976.pth of torchvggish, or its tensors as *.safetensors')
  parser.add_argument('--clap', metavar='FILE',
                      help='weights of LAION-CLAP: 630k-audioset-best.pt, or its tensors as *.safetensors')
  options.workers(parser)
  parser.add_argument('--chunk-seconds', type=float, metavar='X',
                      help=f"length of the model's chunks, for {_names(lambda metric: metric.chunks)} "
                      "(default: the checkpoint's, else 0.743)")
  options.quiet(parser, without='no progress bar, no table')
  options.decoding(parser)
  parser = command('sweep-sigma-cond', _sweep,
                   summary="Quality against sigma_cond, the noise added to a chunk before the next is decoded.",
                   example='  m2l2 sweep-sigma-cond --reference=DIR --checkpoint=tiny --output=sweep.json '
                           '--png=sweep.png')
  parser.add_argument('--reference', required=True, metavar='DIR', help='music to reconstruct (a folder, or one file)')
  options.checkpoint(parser)
  options.report(parser)
  parser.add_argument('--png', metavar='*.png', help='a plot of the results')
  parser.add_argument('--values', metavar='X,Y,...', help='values of sigma_cond (default 0.05,0.1,0.2,0.4,0.7,1,2,4)')
  parser.add_argument('--metrics', metavar='A,B,...', help='as for evaluate (default: si_sdr, mel_l1_db, mrstft, '
                      'ratio, seam_db, musicnn_mtt, musicnn_msd)')
  parser.add_argument('--by', metavar='NAME',
                      help='the metric that chooses the best value (default: the first Frechet distance)')
  parser.add_argument('--clips', type=int, default=36, metavar='N',
                      help='number of files, evenly spread over all (default 36)')
  parser.add_argument('--seconds', type=float, default=10., metavar='X',
                      help='length, from the middle of each (default 10)')
  parser.add_argument('--write-best', action='store_true',
                      help="make the best setting the default of the snapshot's decoding")
  options.workers(parser)
  options.seed(parser)
  options.quiet(parser, without='no progress bar, no table')
  parser = command('probe', _probe,
                   summary='Probes of the latents: classifiers on frozen features, compared with baselines.',
                   example='  m2l2 probe --checkpoint=tiny --music=data/probes/notes --output=probe.json '
                           '--png=probe.png\n'
                           '  m2l2 probe --checkpoint=tiny --music=tinysol:DIR --music=beatport:DIR '
                           '--output=probe.json')
  options.checkpoint(parser)
  parser.add_argument('--music', metavar='PLACE', required=True, action='append',
                      help='a folder with a labels.csv (launch/research/probe_data.py makes some), tinysol:DIR, '
                      'beatport:DIR or magnatagatune:DIR; repeat for several')
  options.report(parser)
  parser.add_argument('--png', metavar='*.png', help='a bar chart of the results')
  parser.add_argument('--baselines', action=argparse.BooleanOptionalAction, default=True,
                      help='log-mel statistics, musicnn and random weights in the same table (default)')
  parser.add_argument('--seconds', type=float, default=30., metavar='X',
                      help='length, from the middle of each file (default 30)')
  parser.add_argument('--seeds', type=int, default=3, metavar='N',
                      help='seeds that each probe is trained with (default 3)')
  options.quiet(parser, without='no progress bar, no table')


def _names(are) -> str:
  return ', '.join(name for name, metric in METRICS.items() if are(metric))


def _defaults() -> str:
  """The default of --metrics, in words."""
  installed = _names(lambda metric: metric.default and metric.package)
  others = _names(lambda metric: not metric.default)
  return ('all that need no file' + (f' but {others}' if others else '')
          + (f'; if installed: {installed}' if installed else ''))


def _evaluate(args):
  extras.require('evaluation', 'eval', 'scipy', *['matplotlib'] * bool(args.html))
  from m2l2 import compiling
  from m2l2.data import audio_io
  from m2l2.evaluation import evaluate
  from m2l2.evaluation.embedders import embeddings
  from m2l2.evaluation.metrics import seams
  from m2l2.evaluation.reports import report
  if not (args.estimate or args.checkpoint):
    raise UserError('give --estimate=DIR, or --checkpoint=DIR to reconstruct first')
  if args.workers < 0 or (args.chunk_seconds is not None and not args.chunk_seconds > 0):
    raise UserError('--workers must not be negative, and --chunk-seconds must be positive')
  if args.players < 0:
    raise UserError('--players must not be negative')
  folders = _named_folders(args.beside)
  for path, extension in ((args.output, '.json'), (args.csv, '.csv'), (args.html, '.html')):
    if path:
      audio_io.check_writable(path, extensions=(extension,))
  about = {'command': args.command_line, 'version': f'm2l2 {__version__}',
           'date': datetime.datetime.now(datetime.UTC).date().isoformat()}
  credits = Path(args.credits).read_text(encoding='utf-8', errors='replace') if args.credits else ''
  files = {name: path for name, path in (('vggish', args.vggish), ('clap', args.clap)) if path}
  compiling.use_cache()  # for the embedding networks; there may be no --checkpoint
  metrics, names = evaluate.split_names(args.metrics, with_files=files)
  embedders = {name: embeddings.make_embedder(name, files.get(name)) for name in names}
  beside = {name: evaluate.find_pairs(args.reference, folder) for name, folder in folders.items()}
  with contextlib.ExitStack() as stack:
    chunks = seams.Chunks()
    if args.checkpoint:
      codec = options.load_codec(args)
      about['model'] = f'{args.checkpoint}, weights {codec.fingerprint}'
      chunks = seams.of_model(codec.representation, rates=codec.native_rates)
      folder = args.estimate or stack.enter_context(tempfile.TemporaryDirectory())
      items, warnings = _reconstruct_all(codec, folder, args)
    else:
      items, warnings = evaluate.find_pairs(args.reference, args.estimate)
    if args.chunk_seconds:
      chunks = seams.Chunks(period=args.chunk_seconds, rates=(1,))
    steps = sum(evaluate.steps_of(pairs, embedders) for pairs in (items, *(pairs for pairs, _ in beside.values())))
    with terminal.bar('evaluate', steps, quiet=args.quiet) as progress:
      measure = functools.partial(evaluate.evaluate, metrics=metrics, embedders=embedders, workers=args.workers,
                                  chunks=chunks, seed=args.seed, progress=progress)
      results = measure(items)
      results['warnings'] = warnings + results['warnings']
      for name, (pairs, without) in beside.items():
        try:
          other = measure(pairs)
        except UserError as error:  # what is measured already shall not be lost
          without = [*without, f'left out: {error}']
        else:
          results.setdefault('beside', {})[name] = other
          without = without + other['warnings']
        results['warnings'] += [f'{name}: {line}' for line in without]
    shown = {name: beside[name][0] for name in results.get('beside', ())}
    report.write_json(args.output, results)
    if args.csv:
      report.write_csv(args.csv, results)
    if args.html:
      report.write_html(args.html, results, items, beside=shown, about=about, credits=credits, players=args.players,
                        small=args.small)
  if shown:
    terminal.say(args, ' ' * 21 + ' '.join(f'{name:22}' for name in ('estimate', *shown)))
  for name, *values, count in report.table(results):
    terminal.say(args, f'{name:20} {" ".join(f"{value:22}" for value in values)} n={count}')
  for line in results['warnings']:
    terminal.say(args, f'warning: {line}')


def _named_folders(texts) -> dict[str, str]:
  """{name: folder} of the values of --beside. Raises UserError: not NAME=DIR, or a name twice."""
  folders: dict[str, str] = {}
  for text in texts:
    name, _, folder = text.partition('=')
    if not name or not folder or name in (*folders, 'reference', 'estimate'):
      raise UserError(f'--beside={text}: give NAME=DIR, with another NAME for each (not reference, not estimate)')
    folders[name] = folder
  return folders


def _reconstruct_all(codec, folder, args):
  """Reconstructs every reference into `folder`, as WAV under its own name: (pairs, warnings)."""
  from m2l2.data import audio_io, sources
  from m2l2.evaluation.evaluate import Pair
  codec.check_decoding(args.seed, mode=args.mode, steps=args.steps, sigma_cond=args.sigma_cond)
  references, items, warnings = sources.find_audio_files(args.reference), list[Pair](), []
  targets = [os.path.join(folder, f'{os.path.splitext(name)[0]}.wav') for name in references.names]
  inode = lambda path: (os.stat(path).st_dev, os.stat(path).st_ino)  # a folder may have several names
  originals = {inode(references.path(number)) for number in range(len(references))}
  for number, target in enumerate(targets):
    if target in targets[:number]:
      raise UserError(f'{references.names[number]}: another reference has that name with another extension; give it a '
                      'name of its own')
    if os.path.exists(target) and inode(target) in originals:
      raise UserError(f'{audio_io.shown(target)}: is a reference; name another folder with --estimate')
    if os.path.exists(target) and not args.overwrite:
      raise UserError(f'{audio_io.shown(target)}: is there already; name another folder with --estimate, or add '
                      '--overwrite')
  quiet = argparse.Namespace(**{**vars(args), 'quiet': True})
  with terminal.bar('reconstruct', len(references), quiet=args.quiet) as progress:
    for number, (name, target) in enumerate(zip(references.names, targets, strict=True)):
      try:
        info = audio_io.info(references.path(number))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with audio_io.AudioWriter(target, info.sample_rate, info.channels) as writer:
          coding.decode_files(codec, [codec.encode(info.path)], [writer], quiet)
        items.append(Pair(name, references.path(number), target))
      except UserError as error:
        warnings.append(f'{name}: unreadable: {error}; left out')
      progress(1)
  if not items:
    raise UserError(f'nothing could be reconstructed; the first: {warnings[0]}')
  return items, warnings


def _sweep(args):
  extras.require('evaluation', 'eval', 'scipy', 'matplotlib')
  from m2l2.data import audio_io
  from m2l2.evaluation import excerpts
  from m2l2.evaluation.embedders import embeddings
  from m2l2.evaluation.reports import pictures, report
  from m2l2.evaluation.studies import sweep
  for path, extension in ((args.output, '.json'), (args.png, '.png')):
    if path:
      audio_io.check_writable(path, extensions=(extension,))
  if args.write_best and not os.path.exists(args.checkpoint):
    raise UserError(f'--write-best changes a snapshot, and {args.checkpoint} is a model in the box: copy it first')
  values = sweep.values_of(args.values)
  metrics, names = sweep.names_of(args.metrics)
  embedders = {name: embeddings.make_embedder(name) for name in names}
  codec = options.load_codec(args)
  clips, warnings = excerpts.take_excerpts(args.reference, seconds=args.seconds, most=args.clips)
  with terminal.bar('sweep', sweep.steps_of(clips, values), quiet=args.quiet) as progress:
    results = sweep.sweep(codec, clips, values=values, metrics=metrics, embedders=embedders, by=args.by,
                          workers=args.workers, seed=args.seed, progress=progress)
  results = {'checkpoint': args.checkpoint, 'fingerprint': codec.fingerprint, 'reference': args.reference,
             'seconds': args.seconds, **results, 'warnings': warnings + results['warnings']}
  report.write_json(args.output, results)
  if args.png:
    pictures.save(pictures.sweep_curves(results), args.png)
  best = results['best']
  for setting in results['settings']:
    cells = '  '.join(f'{name} {value["mean"]:.4g}' for name, value in setting['values'].items())
    terminal.say(args, f'{setting["sigma_cond"]:6g} {setting["steps"].replace("_", "-")}  {cells}')
  for line in results['warnings']:
    terminal.say(args, f'warning: {line}')
  terminal.say(args, f'best by {best["by"]}: sigma_cond {best["sigma_cond"]:g}, {best["steps"].replace("_", "-")}')
  if args.write_best:
    terminal.say(args, f'{sweep.write_best(args.checkpoint, best)}: decodes so by default')


def _probe(args):
  extras.require('probing', 'eval', 'scipy', 'optax', 'matplotlib', 'sklearn', 'mir_eval')
  from m2l2.data import audio_io
  from m2l2.evaluation.reports import pictures, report
  from m2l2.evaluation.studies import probes, tasks
  for path, extension in ((args.output, '.json'), (args.png, '.png')):
    if path:
      audio_io.check_writable(path, extensions=(extension,))
  if args.seeds < 1 or not args.seconds > 0:
    raise UserError('--seeds must be at least 1, and --seconds positive')
  music = [tasks.read(place) for place in args.music]
  codec = options.load_codec(args)
  functions = probes.extractors(codec, baselines=args.baselines)
  with terminal.bar('probe', sum(len(dataset.paths) for dataset in music), quiet=args.quiet) as progress:
    results = probes.probe(music, functions, seconds=args.seconds, seeds=args.seeds, progress=progress)
  results = {'checkpoint': args.checkpoint, 'fingerprint': codec.fingerprint, **results}
  report.write_json(args.output, results)
  if args.png:
    pictures.save(pictures.bars(probes.bars(results)), args.png)
  terminal.say(args, probes.table(results))
  for line in results['warnings']:
    terminal.say(args, f'warning: {line}')
