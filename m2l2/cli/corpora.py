"""prepare, encode-dataset: whole corpora, on all processors, devices and hosts."""

import contextlib
import logging

from m2l2.cli import extras, options, terminal
from m2l2.errors import UserError, printable


def add(command):
  parser = command('prepare', _prepare, summary='A folder of audio files -> a dataset of segments for training.',
                   example='  m2l2 prepare --input=MUSIC --output=data/music --processes=8\n'
                           "  m2l2 prepare --input='gs://bucket/**/*.flac' --output=gs://bucket/prepared \\\n"
                           '    --runner=DataflowRunner --project=... --region=... --temp_location=gs://bucket/tmp')
  parser.add_argument('--input', required=True, metavar='PLACE',
                      help='directory, glob or file; local, gs://, s3://, ...')
  parser.add_argument('--output', required=True, metavar='DIR',
                      help='a new directory, or that of an interrupted run to continue')
  parser.add_argument('--runner', metavar='NAME', help='a runner of Beam, such as DataflowRunner, which gets all '
                      'other options (default: this machine)')
  parser.add_argument('--processes', type=int, metavar='N', help='processes that decode (default: one per core; with '
                      '--runner one in each of its workers)')
  parser.add_argument('--segment-seconds', type=float, default=20., metavar='X',
                      help='length of the stored segments (default 20)')
  parser.add_argument('--overlap-seconds', type=float, default=2., metavar='X',
                      help='overlap of segments: the longest crop that is inside one segment, wherever it begins '
                      '(default 2)')
  parser.add_argument('--rates', default='44100,48000', metavar='HZ,...',
                      help='sample rates that are kept; audio at others is resampled to the first (default '
                           '44100,48000)')
  parser.add_argument('--validation-fraction', type=float, default=.05, metavar='X',
                      help='share of the files that is put aside as the split validation (default 0.05)')
  parser.add_argument('--silence-dbfs', type=float, default=-72., metavar='X',
                      help='segments with an RMS below this are left out (default -72; -inf keeps all)')
  parser.add_argument('--shard-minutes', type=float, default=30., metavar='X',
                      help='audio per shard, about (default 30)')
  parser.add_argument('--timeout', type=float, default=60., metavar='SECONDS',
                      help='seconds without audio after which a file is skipped (default 60)')
  parser.add_argument('--memory-mb', type=int, default=1024, metavar='N',
                      help='limit for decoding one file (default 1024)')
  options.quiet(parser, without='no progress bar, no last lines')
  parser = command('encode-dataset', _encode_dataset,
                   summary='A corpus -> shards of latents, on all devices of all hosts; continues an interrupted run.',
                   example='  m2l2 encode-dataset --source=data/music/train --checkpoint=tiny --output=latents\n'
                           '  for batch in grain.MapDataset.source(m2l2.data.latents.latent_source("latents", '
                           'window=64)).shuffle(0).batch(32)')
  parser.add_argument('--source', metavar='MUSIC', required=True,
                      help='directory, glob or file of audio, or a directory that m2l2 prepare wrote')
  options.checkpoint(parser)
  parser.add_argument('--output', metavar='DIR', required=True, help='directory to write; all hosts share it')
  parser.add_argument('--dtype', choices=('float16', 'bfloat16', 'float32'),
                      help='type of stored latents (default float16)')
  options.discrete(parser)
  parser.add_argument('--batch', type=int, metavar='N',
                      help='chunks per device and call (default: 8 on CPUs, else 64)')
  parser.add_argument('--shards', type=int, metavar='N',
                      help='files to write (default: one per 64 signals, at most 1024)')
  parser.add_argument('--threads', type=int, default=4, metavar='N', help='files read at once (default 4)')
  options.hosts(parser)
  options.quiet(parser)


def _prepare(args):
  extras.require('preparing', 'beam', 'apache_beam', 'array_record', 'fsspec', 'tensorflow_datasets')
  try:
    logging.disable(logging.WARNING)  # warnings of Beam about optional parts of itself
    from m2l2.data.prepare import Limits, Options, prepare
  finally:
    logging.disable(logging.NOTSET)
  try:
    rates = tuple(int(rate) for rate in args.rates.split(','))
  except ValueError as error:
    raise UserError(f'--rates={args.rates}: give numbers in Hz with commas between') from error
  manifest = prepare(
      args.input, args.output, runner=args.runner, processes=args.processes, beam_arguments=tuple(args.rest),
      quiet=args.quiet, limits=Limits(timeout=args.timeout, memory=args.memory_mb << 20),
      options=Options(
          segment_seconds=args.segment_seconds, overlap_seconds=args.overlap_seconds, rates=rates,
          validation_fraction=args.validation_fraction, silence_dbfs=args.silence_dbfs,
          shard_minutes=args.shard_minutes))
  for name, split in manifest['splits'].items():
    terminal.say(args, f'{printable(args.output)}: {name}: {split["sources"]:,} files, '
                 f'{split["seconds"] / 3600:,.2f} h, '
                 f'{split["records"]:,} segments, {split["bytes"] / 1e6:,.0f} MB, {len(split["shards"])} shards')
  if manifest['skipped']:
    terminal.say(args, f'{manifest["skipped"]:,} of {manifest["files"]:,} files skipped; '
                 f'{printable(args.output)}/report.json says why')


def _encode_dataset(args):
  extras.require('encode-dataset', 'train', 'array_record', 'optax', 'orbax.checkpoint', 'tensorflow_datasets')
  from m2l2.codec import bulk
  from m2l2.training import hosts
  if args.discrete and args.dtype:
    raise UserError('--discrete stores int32 tokens: leave --dtype out')
  with hosts.joined(args), contextlib.ExitStack() as stack:
    report = bulk.encode_dataset(
        options.load_codec(args), source=args.source, output=args.output, dtype=args.dtype or 'float16',
        discrete=args.discrete, batch=args.batch, shards=args.shards, threads=args.threads,
        progress=lambda total: stack.enter_context(terminal.corpus_progress(total, quiet=args.quiet)))
  if report:
    hours = report['seconds'] / 3600
    terminal.say(args, f'{printable(args.output)}: {report["encoded"]:,} of {report["signals"]:,} signals, '
                 f'{hours:.2f} h of audio, {report["chunks"]:,} chunks, {report["bytes"] / 2 ** 20:.1f} MiB; '
                 f'{len(report["skipped"])} skipped (report.json says why)')
