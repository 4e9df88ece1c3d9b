"""The `m2l2` command: train, plan, prepare, encode, encode-dataset, decode, reconstruct, evaluate, info, ...

Whatever a command needs is imported when it runs, so that `m2l2 --help` answers at once.
"""

import argparse
from collections.abc import Iterator
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time

from m2l2 import __version__, extras
from m2l2.errors import OutputClosed, UserError, is_full, printable, told

_SECONDS = 10  # of audio read at once
_DESCRIPTION = """\
Music to a few summary embeddings, and back.

  m2l2 encode song.flac song.safetensors --checkpoint=tiny
  m2l2 decode song.safetensors song.wav --checkpoint=tiny

tiny is the model in the box; a training run's folder does too.
"""


def main(argv=None) -> int:
  """Runs one command; returns its exit status.

  0: the job is done. 1: a mistake of the user's, or a fault of the machine, told in one line. 2: a command line that is
  none. 129, 130, 143: stopped by SIGHUP, Ctrl-C or SIGTERM; nothing half-written is left. 141: who read its output has
  gone.
  """
  _open_streams()
  try:
    return _run_told(argv)
  finally:
    _settle()


def _run_told(argv) -> int:
  try:
    status = _run(list(sys.argv[1:] if argv is None else argv))
    _flush()
    return status
  except KeyboardInterrupt:
    _tell('stopped')
    return 130
  except SystemExit as stop:  # of a signal
    return stop.code
  except Exception as error:
    line = told(error)
    if line is None:
      raise
    _tell(line)
    return 141 if isinstance(line, OutputClosed) else 1


def _run(argv) -> int:
  if argv[:1] == ['train']:  # its flags are absl's, made from the config
    _leave_late_writes_untold()
    with _stopped_by_signals():
      return _train(argv[1:])
  if not argv:
    _parser().print_help()
    return 0
  try:
    args, rest = _parser().parse_known_args(argv)
    if rest and not (args.run is _plan or getattr(args, 'runner', None)):  # fields of the config; the runner's options
      _parser().error(f'unrecognized arguments: {" ".join(rest)}')
  except SystemExit as stop:  # argparse: 0 after --help, 2 after a wrong command line
    return stop.code
  args.rest = rest
  for name, value in vars(args).items():  # a shell leaves --name=~/x as it is
    if isinstance(value, list) and name != 'rest':
      setattr(args, name, [_at_home(one) for one in value])
    setattr(args, name, _at_home(getattr(args, name)))
  _quiet_libraries()
  waits = logging.getLogger('m2l2.compiling')
  waits.setLevel(logging.ERROR if getattr(args, 'quiet', False) else logging.NOTSET)
  try:
    with _stopped_by_signals():
      args.run(args)
  finally:
    waits.setLevel(logging.NOTSET)  # whoever goes on in this process did not ask for quiet
  return 0


def _at_home(value):
  return os.path.expanduser(value) if isinstance(value, str) and value.startswith('~') else value


def _open_streams():
  """Makes sure of the three standard streams: what is opened in the place of a closed one would get what is printed."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
  if sys.stderr is None:  # or print() would take standard output
    sys.stderr = open(os.devnull, 'w', encoding='utf-8')
  for stream in (sys.stdout, sys.stderr):  # in a locale without these letters, names are printed all the same
    if getattr(stream, 'errors', '') == 'strict' and hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')


def _tell(error):
  """A mistake or a fault, in one line whatever names it holds."""
  try:
    print('m2l2:', printable(' '.join(str(error).split())), file=sys.stderr)
  except (OSError, ValueError):  # nobody reads there any more
    _settle()


def _settle():
  """Where nobody reads standard error any more, the interpreter is not to find out at its end and to exit with 120."""
  with contextlib.suppress(OSError, ValueError):
    try:
      sys.stderr.flush()
    except (OSError, ValueError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _print(text):
  """On standard output. Raises UserError where it does not get there."""
  with _to_output():
    print(text, flush=True)


def _flush():
  """What is still to be printed, argparse's help for one."""
  if sys.stdout is not None:
    with _to_output():
      sys.stdout.flush()


@contextlib.contextmanager
def _to_output():
  try:
    yield
  except (OSError, ValueError) as error:
    from m2l2.jobs import output_fault
    raise output_fault(error) from error


class _Parser(argparse.ArgumentParser):
  """Tells a mistake in one line."""

  def error(self, message):
    self.exit(2, f'{self.prog}: {message} ({self.prog} --help shows an example)\n')

  def _print_message(self, message, file=None):
    """argparse passes over what cannot be written."""
    if file is None or file is not sys.stdout:
      return super()._print_message(message, file)
    with _to_output():
      file.write(message)
      file.flush()


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog='m2l2', description=_DESCRIPTION,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--version', action='version', version=f'm2l2 {__version__}')
  commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True,
                                   parser_class=_Parser)

  def command(name, run, *, summary, example):
    made = commands.add_parser(name, help=summary, description=f'{summary}\n\n{example}',
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    made.set_defaults(run=run)
    return made

  def files(made, source, target):
    made.add_argument('source', metavar='IN', nargs='+', help=f'{source}; several, a directory, a glob; - is a pipe')
    made.add_argument('target', metavar='OUT', help=f'{target}; for several a directory; - is a pipe')
    made.add_argument('--checkpoint', metavar='DIR', required=True,
                      help='snapshot, workdir of a training run, or name of a model in the box')
    made.add_argument('--device', metavar='KIND[:N]', help='cpu, gpu or tpu, the N-th of them (default: the best)')
    made.add_argument('--quiet', action='store_true', help='no progress bar, no last line')

  def overwrite(made):
    made.add_argument('--overwrite', action='store_true', help='replace files that are there (default: refuse)')

  def sound(made):
    made.add_argument('--format', choices=('wav', 'flac', 'ogg'), default='wav',
                      help='of several files, or of what goes to a pipe (default wav)')
    overwrite(made)
    made.add_argument('--normalize', action='store_true',
                      help='scale the whole file down where it would pass full scale (default: clip, and say so)')
    made.add_argument('--batch', type=int, metavar='N',
                      help='files to decode at once (default: 1 on CPUs, else 8)')

  def rate(made):
    made.add_argument('--embeddings', type=int, metavar='K',
                      help='keep but the first K of each chunk, a lower rate (models trained with train.nested)')

  def decoding(made):
    made.add_argument('--seed', type=int, default=0, metavar='N',
                      help='of the noise that decoding starts from (default 0)')
    made.add_argument('--mode', choices=('autoregressive', 'parallel'), default='autoregressive',
                      help='chunk after chunk (default), or all chunks at once, each step in other pairs')
    made.add_argument('--steps', type=int, metavar='N',
                      help="denoisings of a chunk from pure noise (default: the model's own)")
    made.add_argument('--sigma-cond', type=float, metavar='X',
                      help="noise put back on each chunk before the next is decoded (default: the "
                      "model's own; autoregressive only)")
    made.add_argument('--refine', action=argparse.BooleanOptionalAction,
                      help="denoise each chunk once more, as the next one's left neighbour (default: the "
                      "model's own; autoregressive only)")

  audio_in, audio_out = 'WAV, FLAC, OGG, Opus, MP3, AIFF file (M4A, AAC: extra av)', '*.wav, *.flac or *.ogg'
  latents = '*.safetensors'
  command('train', None, summary='Trains a model, or goes on with a run that was stopped.',
          example='  m2l2 train --config=configs/tiny.py --config.data.root=MUSIC '
                  '--workdir=runs/tiny')
  made = command('plan', _plan, summary="What a run needs on a TPU pod, by the TPU's own compiler; no TPU needed.",
                 example='  m2l2 plan --config=configs/base.py --topology=v5e:16x16 > plan.json\n'
                         '  m2l2 plan --config=configs/xl.py --topology=v5p:4x8x8 --max-batch --config.mesh.fsdp=8')
  made.add_argument('--topology', required=True, metavar='KIND:SHAPE', help='v5e:16x16, v5p:4x8x8, v6e:16x16, ...')
  made.add_argument('--preset', metavar='NAME', help="dp, fsdp, hsdp or tp instead of the config's")
  made.add_argument('--batch', type=int, metavar='N', help="crops a step instead of the config's")
  made.add_argument('--max-batch', action='store_true', help='look for the largest batch that fits')
  made = command('prepare', _prepare, summary='A folder of audio files -> a dataset of segments, to train on.',
                 example='  m2l2 prepare --input=MUSIC --output=data/music --processes=8\n'
                         "  m2l2 prepare --input='gs://bucket/**/*.flac' --output=gs://bucket/prepared \\\n"
                         '    --runner=DataflowRunner --project=... --region=... --temp_location=gs://bucket/tmp')
  made.add_argument('--input', required=True, metavar='PLACE', help='directory, glob or file; local, gs://, s3://, ...')
  made.add_argument('--output', required=True, metavar='DIR', help='new, or of a run to go on with')
  made.add_argument('--runner', metavar='NAME', help="Beam's, as DataflowRunner (default: here); gets other options")
  made.add_argument('--processes', type=int, metavar='N', help='that decode at once (default: one a core; with '
                    '--runner one in each of its workers)')
  made.add_argument('--segment-seconds', type=float, default=20., metavar='X', help='(default 20)')
  made.add_argument('--overlap-seconds', type=float, default=2., metavar='X',
                    help='longest crop that lies in one segment wherever it begins (default 2)')
  made.add_argument('--rates', default='44100,48000', metavar='HZ,...',
                    help='stored as they are; others are resampled to the first (default 44100,48000)')
  made.add_argument('--validation-fraction', type=float, default=.05, metavar='X', help='of the files (default 0.05)')
  made.add_argument('--silence-dbfs', type=float, default=-72., metavar='X',
                    help='segments of a lower RMS are left out (default -72; -inf keeps all)')
  made.add_argument('--shard-minutes', type=float, default=30., metavar='X', help='of audio, about (default 30)')
  made.add_argument('--timeout', type=float, default=60., metavar='SECONDS',
                    help='a file that gives no audio for so long is passed over (default 60)')
  made.add_argument('--memory-mb', type=int, default=1024, metavar='N', help='for decoding one file (default 1024)')
  made.add_argument('--quiet', action='store_true', help='no progress bar, no last lines')
  made = command('encode', _encode, summary='Audio file -> file of latents.',
                 example='  m2l2 encode song.flac song.safetensors --checkpoint=tiny\n'
                         '  m2l2 encode albums/ latents/ --checkpoint=tiny')
  files(made, audio_in, latents)
  overwrite(made)
  made.add_argument('--discrete', action='store_true',
                    help='store int32 tokens (models with an FSQ bottleneck)')
  rate(made)
  made = command('encode-dataset', _encode_dataset,
                 summary='A corpus -> shards of latents, on all devices of all hosts; goes on where it was stopped.',
                 example='  m2l2 encode-dataset --source=data/music/train --checkpoint=tiny --output=latents\n'
                         '  for batch in grain.MapDataset.source(m2l2.data.latents.latent_source("latents", window=64))'
                         '.shuffle(0).batch(32)')
  made.add_argument('--source', metavar='MUSIC', required=True,
                    help='directory, glob or file of audio, or a directory that m2l2 prepare wrote')
  made.add_argument('--checkpoint', metavar='DIR', required=True,
                    help='snapshot, workdir of a training run, or name of a model in the box')
  made.add_argument('--output', metavar='DIR', required=True, help='directory to make; all hosts share it')
  made.add_argument('--dtype', choices=('float16', 'bfloat16', 'float32'), help='of what is stored (default float16)')
  made.add_argument('--discrete', action='store_true', help='store int32 tokens (models with an FSQ bottleneck)')
  made.add_argument('--batch', type=int, metavar='N',
                    help='chunks that a device takes at once (default: 8 on CPUs, else 64)')
  made.add_argument('--shards', type=int, metavar='N',
                    help='files to write (default: one for 64 signals, at most 1024)')
  made.add_argument('--threads', type=int, default=4, metavar='N', help='files read at once (default 4)')
  made.add_argument('--multihost', action='store_true',
                    help='this is one of several processes; JAX finds the others on TPU pods, GKE and Slurm')
  made.add_argument('--coordinator', metavar='HOST:PORT', help='of process 0, where JAX does not find the others')
  made.add_argument('--num_processes', type=int, metavar='N', help='likewise')
  made.add_argument('--process_id', type=int, metavar='I', help='likewise')
  made.add_argument('--start_timeout', type=int, default=300, metavar='S', help='seconds in which all must have come')
  made.add_argument('--peer_timeout', type=int, default=100, metavar='S',
                    help='seconds of silence after which a process counts as lost, which ends the others')
  made.add_argument('--quiet', action='store_true', help='no progress bar, no last line')
  made = command('decode', _decode, summary='File of latents -> audio file as long as the source.',
                 example='  m2l2 decode song.safetensors song.wav --checkpoint=tiny --seed=1\n'
                         '  m2l2 decode song.safetensors - --checkpoint=tiny | aplay')
  files(made, latents, audio_out)
  sound(made)
  decoding(made)
  made = command('reconstruct', _reconstruct, summary='Audio file -> latents -> audio file.',
                 example='  m2l2 reconstruct song.flac again.wav --checkpoint=tiny\n'
                         "  m2l2 reconstruct 'albums/**/*.mp3' again/ --checkpoint=tiny --format=flac")
  files(made, audio_in, audio_out)
  rate(made)
  sound(made)
  decoding(made)
  made = command('evaluate', _evaluate,
                 summary='Metrics of reconstructions against their originals, in pairs by file name.',
                 example='  m2l2 evaluate --reference=DIR --estimate=DIR --output=report.json --html=report.html\n'
                         '  m2l2 evaluate --reference=DIR --checkpoint=tiny --output=report.json '
                         '--metrics=si_sdr,musicnn_mtt')
  made.add_argument('--reference', required=True, metavar='DIR', help='the originals (a folder, or one file)')
  made.add_argument('--estimate', metavar='DIR', help='their reconstructions; with --checkpoint, where to keep them')
  made.add_argument('--checkpoint', metavar='DIR',
                    help='reconstruct first, with this snapshot, workdir or model in the box')
  made.add_argument('--output', required=True, metavar='*.json', help='the report')
  made.add_argument('--csv', metavar='*.csv', help='one row a file')
  made.add_argument('--html', metavar='*.html', help='one page with tables, plots, spectrograms and players')
  made.add_argument('--metrics', metavar='A,B,...',
                    help='some of si_sdr, mel_l1_db, lsd_db, mrstft, ratio, si_sdr_left, si_sdr_right, side_mid_db, '
                    'seam_db, visqol, and Frechet distances over musicnn_mtt, musicnn_msd, vggish, clap '
                    '(default: all that need no file; visqol if it is installed)')
  made.add_argument('--vggish', metavar='FILE',
                    help='weights of VGGish: vggish-10086976.pth of torchvggish, or its tensors as *.safetensors')
  made.add_argument('--clap', metavar='FILE',
                    help='weights of LAION-CLAP: 630k-audioset-best.pt, or its tensors as *.safetensors')
  made.add_argument('--workers', type=int, default=os.cpu_count() or 1, metavar='N',
                    help='processes for the signal metrics (default: all cores)')
  made.add_argument('--chunk-seconds', type=float, metavar='X',
                    help="length of the model's chunks, for seam_db (default: the checkpoint's, else 0.743)")
  made.add_argument('--quiet', action='store_true', help='no progress bar, no table')
  decoding(made)
  made = command('sweep-sigma-cond', _sweep,
                 summary="Quality against sigma_cond, the noise put back on a chunk before the next is decoded.",
                 example='  m2l2 sweep-sigma-cond --reference=DIR --checkpoint=tiny --output=sweep.json '
                         '--png=sweep.png')
  made.add_argument('--reference', required=True, metavar='DIR', help='music to reconstruct (a folder, or one file)')
  made.add_argument('--checkpoint', metavar='DIR', required=True,
                    help='snapshot, workdir of a training run, or name of a model in the box')
  made.add_argument('--output', required=True, metavar='*.json', help='the report')
  made.add_argument('--png', metavar='*.png', help='its curves')
  made.add_argument('--values', metavar='X,Y,...', help='of sigma_cond (default 0.05,0.1,0.2,0.4,0.7,1,2,4)')
  made.add_argument('--metrics', metavar='A,B,...', help='as for evaluate (default: si_sdr, mel_l1_db, mrstft, ratio, '
                    'seam_db, musicnn_mtt, musicnn_msd)')
  made.add_argument('--by', metavar='NAME', help='which of them tells the best (default: the first Frechet distance)')
  made.add_argument('--clips', type=int, default=36, metavar='N', help='files to take, evenly over all (default 36)')
  made.add_argument('--seconds', type=float, default=10., metavar='X', help='from the middle of each (default 10)')
  made.add_argument('--write-best', action='store_true',
                    help="make the best setting the default of the snapshot's decoding")
  made.add_argument('--workers', type=int, default=os.cpu_count() or 1, metavar='N',
                    help='processes for the signal metrics (default: all cores)')
  made.add_argument('--seed', type=int, default=0, metavar='N',
                    help='of the noise that decoding starts from (default 0)')
  made.add_argument('--quiet', action='store_true', help='no progress bar, no table')
  made = command('probe', _probe,
                 summary='What the latents know: classifiers on frozen features, beside baselines.',
                 example='  m2l2 probe --checkpoint=tiny --music=data/probes/notes --output=probe.json '
                         '--png=probe.png\n'
                         '  m2l2 probe --checkpoint=tiny --music=tinysol:DIR --music=beatport:DIR '
                         '--output=probe.json')
  made.add_argument('--checkpoint', metavar='DIR', required=True,
                    help='snapshot, workdir of a training run, or name of a model in the box')
  made.add_argument('--music', metavar='PLACE', required=True, action='append',
                    help='a folder with a labels.csv (launch/probe_data.py makes some), tinysol:DIR, beatport:DIR or '
                    'magnatagatune:DIR; again for more')
  made.add_argument('--output', required=True, metavar='*.json', help='the report')
  made.add_argument('--png', metavar='*.png', help='its bars')
  made.add_argument('--baselines', action=argparse.BooleanOptionalAction, default=True,
                    help='log-mel statistics, musicnn and random weights in the same table (default)')
  made.add_argument('--seconds', type=float, default=30., metavar='X', help='from the middle of each file (default 30)')
  made.add_argument('--seeds', type=int, default=3, metavar='N', help='beginnings of each probe (default 3)')
  made.add_argument('--quiet', action='store_true', help='no progress bar, no table')
  made = command('info', _info, summary='What audio, latents, a snapshot or a workdir hold.',
                 example='  m2l2 info song.safetensors\n  m2l2 info tiny --json')
  made.add_argument('path', metavar='FILE_OR_CHECKPOINT', help='- is a pipe')
  made.add_argument('--json', action='store_true', help='one JSON object')
  made = command('export', _export, summary='Checkpoint -> programs and weights that JAX runs without m2l2.',
                 example='  m2l2 export tiny --format=stablehlo --output=exported\n'
                         '  cd exported && python -c "import load; print(load.Model(\'.\').about)"')
  made.add_argument('checkpoint', metavar='DIR',
                    help='snapshot, workdir of a training run, or name of a model in the box')
  made.add_argument('--format', choices=('stablehlo',), default='stablehlo', help='the only one there is')
  made.add_argument('--output', metavar='DIR', required=True, help='the folder to write; it must not be there yet')
  made.add_argument('--quiet', action='store_true', help='no last line')
  made = command('import-codicodec', _import_codicodec,
                 summary="CoDiCodec's published weights -> snapshot.",
                 example='  m2l2 import-codicodec codicodec.pt runs/codicodec\n'
                         '  m2l2 encode song.flac song.safetensors --checkpoint=runs/codicodec')
  made.add_argument('source', metavar='FILE',
                    help='codicodec.pt (reading it needs torch), or its tensors as .safetensors')
  made.add_argument('target', metavar='DIR', help='the snapshot to write')
  made.add_argument('--verify', action='store_true',
                    help='first run one input through the original too (needs torch and codicodec)')
  made.add_argument('--quiet', action='store_true', help='no last lines')
  return parser


# ---- commands ------------------------------------------------------------------------------------


def _train(argv) -> int:
  extras.require('training', 'train', 'absl', 'array_record', 'clu', 'grain', 'ml_collections', 'optax',
                 'orbax.checkpoint', 'scipy')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's log, read when jax is imported: errors
  from m2l2 import main as training
  return training.main(['m2l2 train', *argv])


def _plan(args):
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # whatever is here is not what is planned for
  extras.require('planning', 'train,tpu', 'ml_collections', 'optax')
  from m2l2 import main as training, plan
  values = training.parse(['m2l2 plan', *args.rest], required=('config',))
  plan.main(values.config, topology=args.topology, preset=args.preset, batch=args.batch, max_batch=args.max_batch)


def _prepare(args):
  extras.require('preparing', 'beam', 'apache_beam', 'array_record', 'fsspec', 'tensorflow_datasets')
  try:
    logging.disable(logging.WARNING)  # Beam's, about parts of itself that nobody asked for
    from m2l2.data import prepare
  finally:
    logging.disable(logging.NOTSET)
  try:
    rates = tuple(int(rate) for rate in args.rates.split(','))
  except ValueError as error:
    raise UserError(f'--rates={args.rates}: give numbers in Hz with commas between') from error
  manifest = prepare.prepare(
      args.input, args.output, runner=args.runner, processes=args.processes, beam_arguments=tuple(args.rest),
      quiet=args.quiet, limits=prepare.Limits(timeout=args.timeout, memory=args.memory_mb << 20),
      options=prepare.Options(
          segment_seconds=args.segment_seconds, overlap_seconds=args.overlap_seconds, rates=rates,
          validation_fraction=args.validation_fraction, silence_dbfs=args.silence_dbfs,
          shard_minutes=args.shard_minutes))
  for name, split in manifest['splits'].items():
    _say(args, f'{printable(args.output)}: {name}: {split["sources"]:,} files, {split["seconds"] / 3600:,.2f} h, '
         f'{split["records"]:,} segments, {split["bytes"] / 1e6:,.0f} MB, {len(split["shards"])} shards')
  if manifest['skipped']:
    _say(args, f'{manifest["skipped"]:,} of {manifest["files"]:,} files skipped; '
         f'{printable(args.output)}/report.json says why')


def _encode(args):
  from m2l2 import jobs
  from m2l2.data import audio_io
  planned = jobs.plan(args.source, args.target, inputs=jobs.AUDIO, output='.safetensors')
  with _over(planned, 'encode', args) as (done, passing):
    many = len(planned) > 1
    codec = _encoder(args) if many else None  # what is wrong for all files is told once
    for job in planned:
      with passing(job), jobs.reading(job) as path:
        info = audio_io.probe(path)
        if many and not args.overwrite and _are_there(job.target, codec, args):
          _say(args, f'{audio_io.shown(job.target)}: is there already')
          done(1)
          continue
        check = _new_file(job.source, overwrite=args.overwrite, extensions=('.safetensors',))
        with jobs.writing(job, output='.safetensors', check=check) as target:
          codec = codec or _encoder(args)
          began = time.monotonic()
          latents = _encode_file(codec, info, discrete=args.discrete, embeddings=args.embeddings, quiet=args.quiet)
          speed = latents.seconds / (time.monotonic() - began)
          latents.save(target)
        _say(args, f'{audio_io.shown(job.target)}: {latents.words()}; {_speed(speed)}')
      done(1)


def _are_there(path, codec, args) -> bool:
  """Whether what is to be made is what an earlier run over the same files made."""
  from m2l2.latents import Latents
  try:
    latents = Latents.load(path)
  except UserError:
    return False
  return (latents.model == codec.fingerprint and (latents.z.ndim == 3) == args.discrete
          and args.embeddings in (None, latents.z.shape[2]))


@contextlib.contextmanager
def _over(planned, name, args):
  """Gives (a bar's function, passing). `passing(job)` tells of a fault, then goes on; that of a lone file ends all."""
  from m2l2.data.audio_io import shown
  faults = 0

  @contextlib.contextmanager
  def passing(job):
    nonlocal faults
    try:
      yield
    except Exception as error:
      line = told(error)
      if line is None or isinstance(line, OutputClosed):
        raise
      text = ' '.join(str(line).split())
      if is_full(text):  # for all others, too
        again = '; make room and run the same command again'
        raise UserError(text.removesuffix(again) + again) from error
      if job.name not in text and shown(job.target) not in text:  # as what a codec says of channels
        text = f'{job.name}: {text}'
      if len(planned) == 1:
        raise UserError(text) from error
      faults += 1
      _tell(text)

  with _bar(f'{name} files', len(planned), quiet=args.quiet or len(planned) == 1) as done:
    yield done, passing
  if faults:
    raise UserError(f'{faults} of {len(planned)} files were passed over; the others are done')


def _encode_dataset(args):
  extras.require('encode-dataset', 'train', 'array_record', 'optax', 'orbax.checkpoint', 'tensorflow_datasets')
  from m2l2 import bulk, hosts
  if args.discrete and args.dtype:
    raise UserError('--discrete stores int32 tokens: leave --dtype out')
  place = dict(coordinator=args.coordinator, num_processes=args.num_processes, process_id=args.process_id)
  hosts.check(multihost=args.multihost, **place)
  # Before anything touches a device.
  several = args.multihost and hosts.join(
      **place, start_timeout=args.start_timeout, peer_timeout=args.peer_timeout)
  try:
    with contextlib.ExitStack() as stack:
      report = bulk.encode_dataset(
          _load(args), source=args.source, output=args.output, dtype=args.dtype or 'float16',
          discrete=args.discrete, batch=args.batch, shards=args.shards, threads=args.threads,
          progress=lambda total: stack.enter_context(_corpus_progress(total, quiet=args.quiet)))
  except (Exception, KeyboardInterrupt, SystemExit) as error:
    if several:  # `fail` does not return
      several.fail(error)
    raise
  if several:
    several.leave()
  if report:
    hours = report['seconds'] / 3600
    _say(args, f'{printable(args.output)}: {report["encoded"]:,} of {report["signals"]:,} signals, '
         f'{hours:.2f} h of audio, {report["chunks"]:,} chunks, {report["bytes"] / 2 ** 20:.1f} MiB; '
         f'{len(report["skipped"])} skipped (report.json says why)')


def _decode(args):
  from m2l2 import jobs
  from m2l2.latents import Latents

  def opened(path):
    latents = Latents.load(path)
    return latents, lambda codec: latents
  _decode_jobs(args, jobs.plan(args.source, args.target, inputs=jobs.LATENTS, output=f'.{args.format}'), opened)


def _reconstruct(args):
  from m2l2 import jobs
  from m2l2.data import audio_io

  def opened(path):
    info = audio_io.probe(path)
    return info, lambda codec: _encode_file(codec, info, embeddings=args.embeddings, quiet=args.quiet)
  _decode_jobs(args, jobs.plan(args.source, args.target, inputs=jobs.AUDIO, output=f'.{args.format}'), opened)


def _decode_jobs(args, planned, opened):
  """Decodes `--batch` files at a time. opened(path) -> (what has rate, channels and tags; codec -> latents)."""
  from m2l2 import jobs
  from m2l2.data import audio_io
  if args.batch is not None and args.batch < 1:
    raise UserError(f'--batch={args.batch}: decode at least one file at once')
  codec = _decoder(args) if len(planned) > 1 else None  # what is wrong for all files is told once
  with _over(planned, 'decode', args) as (done, passing):
    waiting = list(planned)
    while waiting:
      began = codec and time.monotonic()
      size = 1 if len(planned) == 1 else args.batch or _batch()
      group, waiting = waiting[:size], waiting[size:]
      with contextlib.ExitStack() as all_files:
        ready = []
        for job in group:
          with passing(job), contextlib.ExitStack() as files:
            source, latents_by = opened(files.enter_context(jobs.reading(job)))
            check = _new_file(job.source, overwrite=args.overwrite)
            target = files.enter_context(jobs.writing(job, output=f'.{args.format}', check=check))
            codec = codec or _decoder(args)
            began = began or time.monotonic()  # to load a model is not its speed
            # Opened first: that the format does not take these channels is told before the work.
            writer = files.enter_context(audio_io.AudioWriter(
                target, source.sample_rate, source.channels, tags=source.tags, normalize=args.normalize))
            latents = latents_by(codec)
            codec.check_latents(latents)
            ready.append((job, latents, writer))
            all_files.enter_context(files.pop_all())
        if ready:
          _decode_files(codec, [latents for _, latents, _ in ready], [writer for *_, writer in ready], args)
      speed = sum(latents.seconds for _, latents, _ in ready) / (time.monotonic() - began)
      for job, latents, _ in ready:
        _say(args, f'{audio_io.shown(job.target)}: {latents.words()}; {_speed(speed)}')
      done(len(group))


def _batch():
  import jax
  return 1 if jax.default_backend() == 'cpu' else 8


def _encoder(args):
  """The Codec, for which the options of encoding have been checked."""
  codec = _load(args)
  codec.check_source(channels=1, discrete=getattr(args, 'discrete', False))
  if getattr(args, 'embeddings', None) is not None:
    codec.check_first(args.embeddings)
  return codec


def _decoder(args):
  codec = _encoder(args)
  codec.check_decoding(args.seed, mode=args.mode, steps=args.steps, sigma_cond=args.sigma_cond)
  return codec


def _new_file(source, *, overwrite, extensions=None):
  """A check of where a result (audio by default) is to be written: what lies there may be somebody's only copy."""
  from m2l2.data import audio_io

  def check(path):
    audio_io.check_writable(path, extensions=extensions or tuple(audio_io.WRITE_FORMATS))
    if not os.path.exists(path):
      return
    if os.path.exists(source) and os.path.samefile(source, path):
      raise UserError(f'{audio_io.shown(path)}: is the input too; name another output')
    if not overwrite:
      raise UserError(f'{audio_io.shown(path)}: is there already; name another output, or add --overwrite')
  return check


def _evaluate(args):
  extras.require('evaluation', 'eval', 'scipy', *['matplotlib'] * bool(args.html))
  from m2l2.evaluation import embeddings, evaluate, report, seams
  from m2l2 import compilation_cache
  from m2l2.data import audio_io
  if not (args.estimate or args.checkpoint):
    raise UserError('give --estimate=DIR, or --checkpoint=DIR to reconstruct first')
  if args.workers < 0 or (args.chunk_seconds is not None and not args.chunk_seconds > 0):
    raise UserError('--workers must not be negative, and --chunk-seconds must be positive')
  for path, extension in ((args.output, '.json'), (args.csv, '.csv'), (args.html, '.html')):
    if path:
      audio_io.check_writable(path, extensions=(extension,))
  files = {name: path for name, path in (('vggish', args.vggish), ('clap', args.clap)) if path}
  compilation_cache.use()  # of the networks that judge; --checkpoint is not always given
  metrics, names = evaluate.split_names(args.metrics, with_files=files)
  embedders = {name: embeddings.make_embedder(name, files.get(name)) for name in names}
  with contextlib.ExitStack() as stack:
    chunks = seams.Chunks()
    if args.checkpoint:
      codec = _load(args)
      chunks = seams.of_model(codec.representation, sample_rate=codec.native_rates[0])
      folder = args.estimate or stack.enter_context(tempfile.TemporaryDirectory())
      items, warnings = _reconstruct_all(codec, folder, args)
    else:
      items, warnings = evaluate.find_pairs(args.reference, args.estimate)
    if args.chunk_seconds:
      chunks = seams.Chunks(period=args.chunk_seconds)
    with _bar('evaluate', evaluate.steps_of(items, embedders), quiet=args.quiet) as progress:
      made = evaluate.evaluate(items, metrics=metrics, embedders=embedders, workers=args.workers, chunks=chunks,
                               seed=args.seed, progress=progress)
    made['warnings'] = warnings + made['warnings']
    report.write_json(args.output, made)
    if args.csv:
      report.write_csv(args.csv, made)
    if args.html:
      report.write_html(args.html, made, items)
  for name, value, count in report.table(made):
    _say(args, f'{name:20} {value:22} n={count}')
  for line in made['warnings']:
    _say(args, f'warning: {line}')


def _reconstruct_all(codec, folder, args):
  """Reconstructs every reference into `folder`, as WAV under its own name: (pairs, warnings)."""
  from m2l2.data import audio_io, sources
  from m2l2.evaluation.evaluate import Pair
  codec.check_decoding(args.seed, mode=args.mode, steps=args.steps, sigma_cond=args.sigma_cond)
  found, items, warnings = sources.find_audio_files(args.reference), [], []
  quiet = argparse.Namespace(**{**vars(args), 'quiet': True})
  with _bar('reconstruct', len(found), quiet=args.quiet) as progress:
    for number, name in enumerate(found.names):
      target = os.path.join(folder, f'{os.path.splitext(name)[0]}.wav')
      if any(item.estimate == target for item in items):
        raise UserError(f'{name}: another reference has that name with another extension; give it a name of its own')
      if os.path.exists(target) and os.path.samefile(target, found.path(number)):
        raise UserError(f'{audio_io.shown(target)}: is a reference; name another folder with --estimate')
      try:
        info = audio_io.probe(found.path(number))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with audio_io.AudioWriter(target, info.sample_rate, info.channels) as writer:
          _decode_files(codec, [_encode_file(codec, info, quiet=True)], [writer], quiet)
        items.append(Pair(name, found.path(number), target))
      except UserError as error:
        warnings.append(f'{name}: unreadable: {error}; left out')
      progress(1)
  if not items:
    raise UserError(f'nothing could be reconstructed; the first: {warnings[0]}')
  return items, warnings


def _sweep(args):
  extras.require('evaluation', 'eval', 'scipy', 'matplotlib')
  from m2l2.evaluation import clips as folder_clips, embeddings, pictures, report, sweep
  from m2l2.data import audio_io
  for path, extension in ((args.output, '.json'), (args.png, '.png')):
    if path:
      audio_io.check_writable(path, extensions=(extension,))
  if args.write_best and not os.path.exists(args.checkpoint):
    raise UserError(f'--write-best changes a snapshot, and {args.checkpoint} is none of yours: copy it out of the box')
  values = sweep.values_of(args.values)
  metrics, names = sweep.names_of(args.metrics)
  embedders = {name: embeddings.make_embedder(name) for name in names}
  codec = _load(args)
  clips, warnings = folder_clips.take_excerpts(args.reference, seconds=args.seconds, most=args.clips)
  with _bar('sweep', sweep.steps_of(clips, values), quiet=args.quiet) as progress:
    made = sweep.sweep(codec, clips, values=values, metrics=metrics, embedders=embedders, by=args.by,
                       workers=args.workers, seed=args.seed, progress=progress)
  made = {'checkpoint': args.checkpoint, 'fingerprint': codec.fingerprint, 'reference': args.reference,
          'seconds': args.seconds, **made, 'warnings': warnings + made['warnings']}
  report.write_json(args.output, made)
  if args.png:
    pictures.save(pictures.sweep_curves(made), args.png)
  best = made['best']
  for setting in made['settings']:
    cells = '  '.join(f'{name} {value["mean"]:.4g}' for name, value in setting['values'].items())
    _say(args, f'{setting["sigma_cond"]:6g} {setting["steps"].replace("_", "-")}  {cells}')
  for line in made['warnings']:
    _say(args, f'warning: {line}')
  _say(args, f'best by {best["by"]}: sigma_cond {best["sigma_cond"]:g}, {best["steps"].replace("_", "-")}')
  if args.write_best:
    _say(args, f'{sweep.write_best(args.checkpoint, best)}: decodes so by default')


def _probe(args):
  extras.require('probing', 'eval', 'scipy', 'optax', 'matplotlib')
  from m2l2.evaluation import pictures, probes, report, tasks
  from m2l2.data import audio_io
  for path, extension in ((args.output, '.json'), (args.png, '.png')):
    if path:
      audio_io.check_writable(path, extensions=(extension,))
  if args.seeds < 1 or not args.seconds > 0:
    raise UserError('--seeds must be at least 1, and --seconds positive')
  music = [tasks.read(place) for place in args.music]
  codec = _load(args)
  functions = probes.extractors(codec, baselines=args.baselines)
  with _bar('probe', sum(len(one.paths) for one in music), quiet=args.quiet) as progress:
    made = probes.probe(music, functions, seconds=args.seconds, seeds=args.seeds, progress=progress)
  made = {'checkpoint': args.checkpoint, 'fingerprint': codec.fingerprint, **made}
  report.write_json(args.output, made)
  if args.png:
    pictures.save(pictures.bars(probes.bars(made)), args.png)
  _say(args, probes.table(made))
  for line in made['warnings']:
    _say(args, f'warning: {line}')


def _load(args):
  """The Codec, on the device that is asked for."""
  import jax
  from m2l2 import codec
  path = codec.locate(args.checkpoint)
  kind, _, number = (getattr(args, 'device', None) or '').partition(':')
  if number and not number.isdecimal():
    raise UserError(f'--device={args.device}: give KIND or KIND:N, as gpu:1')
  if kind == 'cpu':
    jax.config.update('jax_platforms', 'cpu')  # nothing of a GPU is touched, its memory least of all
  try:
    devices = jax.devices(kind or None)
  except RuntimeError as error:
    raise UserError(f'JAX finds no {kind or "device"}: {" ".join(str(error).split())}') from error
  if kind:
    if int(number or 0) >= len(devices):
      raise UserError(f'--device={args.device}: there are {len(devices)}, counted from 0')
    jax.config.update('jax_default_device', devices[int(number or 0)])
  return codec.load(path)


def _encode_file(codec, info, *, discrete=False, embeddings=None, quiet):
  """The latents of an audio file, read block by block."""
  import dataclasses
  from m2l2.data import audio_io
  codec.check_source(channels=info.channels, discrete=discrete)
  blocks = audio_io.read_blocks(
      info.path, block_samples=_SECONDS * info.sample_rate, check_finite=True)
  with _progress('encode', info, quiet=quiet) as done:
    latents = codec.encode_blocks(
        _counted(blocks, done), sample_rate=info.sample_rate, channels=info.channels,
        discrete=discrete)
  latents = codec.first(latents, embeddings) if embeddings is not None else latents
  return dataclasses.replace(latents, tags=dict(info.tags))


def _decode_files(codec, many, writers, args):
  """Writes the audio of several files' latents block by block; `_counted` goes by the longest."""
  longest = max(range(len(many)), key=lambda i: many[i].num_samples / many[i].sample_rate)
  pieces = codec.decode_together(many, args.seed, clip=False, **_decoding_options(args))
  with _progress('decode', many[longest], quiet=args.quiet) as done:
    for blocks in pieces:
      for writer, block in zip(writers, blocks):
        writer.write(block)
      done(blocks[longest])


def _decoding_options(args):
  return dict(mode=args.mode, steps=args.steps, sigma_cond=args.sigma_cond, refine=args.refine)


def _export(args):
  extras.require('exporting', 'export', 'flatbuffers')  # jax.export writes with it
  from m2l2 import codec, export
  export.check_target(args.output)
  snapshot = codec.load_snapshot(codec.locate(args.checkpoint))
  portable = codec.Codec(config=export.portable(snapshot.config), params=snapshot.params,
                         fingerprint=snapshot.fingerprint)
  export.export_stablehlo(portable, args.output)
  _say(args, f'{printable(args.output)}: encode, start, step and finish for {", ".join(export.PLATFORMS)}; load.py '
       'runs them')


def _import_codicodec(args):
  from m2l2.interop import codicodec
  report = codicodec.import_codicodec(args.source, args.target, verify=args.verify)
  if 'errors' in report:
    errors = ', '.join(f'{name} {error:.1e}' for name, error in report['errors'].items())
    _say(args, f'verified against the original, relative errors: {errors}')
  _say(args, f'{len(report["unused"])} tensors that the original stores and never uses were left out')
  _say(args, f'{printable(args.target)}: snapshot of CoDiCodec, {report["parameters"]:,} parameters, fingerprint '
       f'{report["fingerprint"]}')


def _info(args):
  if sys.stdout is None:
    raise UserError('standard output is closed: there is nowhere to say it')
  from m2l2 import info, jobs
  job = jobs.Job(jobs.PIPE if args.path in ('-', '/dev/stdin') else args.path, jobs.PIPE)
  with jobs.reading(job) as path:
    facts = info.facts(path)
  if path != job.source:  # what came through a pipe
    facts['path'] = job.name
  if args.json:
    _print(json.dumps(facts, indent=2))
    return
  width = max(map(len, facts))
  for name, value in facts.items():
    _print(f'{name.replace("_", " "):{width}}  {_readable(value)}')


# ---- what the user sees --------------------------------------------------------------------------


def _readable(value) -> str:
  if isinstance(value, list):
    return ', '.join(map(_readable, value)) or 'none'
  if isinstance(value, float):
    return f'{value:,.4g}' if abs(value) < 1e4 else f'{value:,.0f}'
  if value is None:
    return 'none'
  return f'{value:,}' if isinstance(value, int) and value >= 10 ** 5 else str(value)


def _speed(times: float) -> str:
  return f'{times:.3g}x real time'


def _say(args, line):
  """On standard output, unless that is where the result goes."""
  if args.quiet:
    return
  if getattr(args, 'target', None) in ('-', '/dev/stdout'):
    print(line, file=sys.stderr)
  else:
    _print(line)


@contextlib.contextmanager
def _progress(name, signal_info, *, quiet):
  """A bar in seconds of audio on stderr, on a terminal only; gives a function to advance it."""
  import tqdm
  samples = getattr(signal_info, 'num_samples', None) or signal_info.frames
  with tqdm.tqdm(
      total=round(samples / signal_info.sample_rate, 1), desc=name, unit='s', leave=False,
      disable=True if quiet else None,  # None: unless stderr is a terminal
      bar_format='{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s, {remaining} left',
  ) as bar:
    yield lambda block: bar.update(block.shape[1] / signal_info.sample_rate)


@contextlib.contextmanager
def _corpus_progress(total, *, quiet):
  """A bar in signals, with the speed, on a terminal only; gives a function of each one's seconds of audio."""
  import tqdm
  began, done = time.monotonic(), 0.0
  with tqdm.tqdm(total=total, desc='encode', unit='file', leave=False, disable=True if quiet else None) as bar:
    def advance(seconds):
      nonlocal done
      done += seconds
      bar.set_postfix_str(f'{done / 3600:.2f} h of audio, {done / (time.monotonic() - began):.0f}x real time',
                          refresh=False)
      bar.update()
    yield advance


@contextlib.contextmanager
def _bar(name, steps, *, quiet):
  """A bar in steps on stderr, on a terminal only; gives a function to advance it."""
  import tqdm
  with tqdm.tqdm(total=steps, desc=name, leave=False, disable=True if quiet else None) as bar:
    yield bar.update


def _counted(blocks, done) -> Iterator:
  for block in blocks:
    yield block
    done(block)


def _quiet_libraries():
  """What jax and XLA say to developers is not for users; warnings of our own are."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # XLA's log, read when jax is imported
  logging.getLogger('jax').setLevel(logging.ERROR)
  from absl import flags, logging as absl_logging
  flags.FLAGS.mark_as_parsed()  # there are none, but absl's log would say that nobody parsed them
  absl_logging.use_absl_handler()
  absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.get_absl_handler().setFormatter(logging.Formatter('m2l2: %(message)s'))


@contextlib.contextmanager
def _stopped_by_signals():
  """SIGTERM, and SIGHUP of a terminal that is closed, unwind like Ctrl-C does, so that temporary files are removed.

  All three wait where an exception would do harm or be lost: while a module is imported, of which the C code of numpy
  and JAX may crash; in what the garbage collector calls, as JAX has it do.
  """
  def stop(number, frame):
    if _is_importing(frame):
      _send_again(number)
    else:
      raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

  def lost(unraisable):
    error = unraisable.exc_value
    if isinstance(error, KeyboardInterrupt):
      _send_again(signal.SIGINT)
    elif isinstance(error, SystemExit) and error.code in [128 + number for number in before]:
      _send_again(error.code - 128)
    else:
      hook(unraisable)

  before, hook = {}, sys.unraisablehook
  try:
    for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, 'SIGHUP') else [])):
      usual = signal.default_int_handler if number == signal.SIGINT else signal.getsignal(number)
      if signal.getsignal(number) is usual is not signal.SIG_IGN:  # nohup; a SIGINT that somebody else sees to
        before[number] = signal.signal(number, stop)
  except ValueError:  # not the main thread: signals are somebody else's
    yield
    return
  sys.unraisablehook = lost
  try:
    yield
  finally:
    sys.unraisablehook = hook
    for number, handler in before.items():
      signal.signal(number, handler)


def _leave_late_writes_untold():
  """Until the process ends: TensorStore has a traceback for each write that outlives its save, even after the run's last
  line. What ended the save, a full disk, ends the run too and is that line."""
  def lost(unraisable):
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == 'Event loop is closed'):
      hook(unraisable)

  hook, sys.unraisablehook = sys.unraisablehook, lost


def _is_importing(frame) -> bool:
  while frame is not None and not frame.f_code.co_filename.startswith('<frozen importlib'):
    frame = frame.f_back
  return frame is not None


def _send_again(number):
  again = threading.Timer(0.05, os.kill, [os.getpid(), number])
  again.daemon = True
  again.start()
