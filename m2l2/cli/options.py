"""Options that several commands share, each declared once, and loading of the model that they name."""

import argparse
import os

from m2l2.errors import UserError, in_one_line


def checkpoint(parser, **given):
  """--checkpoint=DIR; `given` are arguments of add_argument that replace the defaults."""
  parser.add_argument('--checkpoint', metavar='DIR', **{
      'required': True, 'help': 'snapshot, workdir of a training run, or name of a model in the box', **given})


def quiet(parser, *, without='no progress bar, no last line'):
  parser.add_argument('--quiet', action='store_true', help=without)


def overwrite(parser, told='replace existing files (default: refuse)'):
  parser.add_argument('--overwrite', action='store_true', help=told)


def files(parser, source, target):
  """IN... OUT of a command over files, --checkpoint, --device and --quiet."""
  parser.add_argument('source', metavar='IN', nargs='+', help=f'{source}; several, a directory, a glob; - is a pipe')
  parser.add_argument('target', metavar='OUT', help=f'{target}; for several a directory; - is a pipe')
  checkpoint(parser)
  parser.add_argument('--device', metavar='KIND[:N]',
                      help='cpu, gpu or tpu, and which of them, from 0 (default: the fastest)')
  quiet(parser)


def discrete(parser):
  parser.add_argument('--discrete', action='store_true', help='store int32 tokens (models with an FSQ bottleneck)')


def embeddings(parser):
  parser.add_argument('--embeddings', type=int, metavar='K',
                      help='keep only the first K of each chunk, for a lower rate (of models of variants.nested)')


def features(parser):
  parser.add_argument('--features', action='store_true',
                      help='write *.npz: features float32 [time, dim], a row a chunk, and times [time] in seconds')


def sound(parser):
  """Options for audio files that are written."""
  parser.add_argument('--format', choices=('wav', 'flac', 'ogg'), default='wav',
                      help='format for several files or for a pipe (default wav)')
  overwrite(parser)
  parser.add_argument('--normalize', action='store_true',
                      help='scale the whole file down if it would exceed full scale (default: clip, with a warning)')
  parser.add_argument('--batch', type=int, metavar='N',
                      help='files to decode at once (default: 1 on CPUs, else 8)')


def seed(parser):
  parser.add_argument('--seed', type=int, default=0, metavar='N',
                      help='seed of the noise that decoding starts from (default 0)')


def decoding(parser):
  """The options of decoding: the seed, and those that `decoding_of` passes to the codec."""
  seed(parser)
  parser.add_argument('--mode', choices=('autoregressive', 'parallel'), default='autoregressive',
                      help='one chunk after another (default), or all chunks at once, paired differently in each step')
  parser.add_argument('--steps', type=int, metavar='N',
                      help="denoisings of a chunk from pure noise (default: the model's own)")
  parser.add_argument('--sigma-cond', type=float, metavar='X',
                      help="noise added to each chunk before the next is decoded (default: the "
                      "model's own; autoregressive only)")
  parser.add_argument('--refine', action=argparse.BooleanOptionalAction,
                      help="denoise each chunk once more, as the next one's left neighbour (default: the "
                      "model's own; autoregressive only)")


def decoding_of(args) -> dict:
  return dict(mode=args.mode, steps=args.steps, sigma_cond=args.sigma_cond, refine=args.refine)


def report(parser):
  parser.add_argument('--output', required=True, metavar='*.json', help='the report, as JSON')


def workers(parser):
  parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, metavar='N',
                      help='processes for the signal metrics (default: all cores)')


def hosts(parser):
  """Options of a command that several processes run together."""
  parser.add_argument('--multihost', action='store_true',
                      help='this is one of several processes; JAX finds the others on TPU pods, GKE and Slurm')
  parser.add_argument('--coordinator', metavar='HOST:PORT', help='of process 0, if JAX does not find the others')
  parser.add_argument('--num_processes', type=int, metavar='N', help='the number of processes, likewise')
  parser.add_argument('--process_id', type=int, metavar='I', help='the number of this process, likewise')
  parser.add_argument('--start_timeout', type=int, default=300, metavar='S',
                      help='seconds within which all processes must have started (default 300)')
  parser.add_argument('--peer_timeout', type=int, default=100, metavar='S',
                      help='seconds without a sign of life after which a process counts as lost and the others end')


def load_codec(args):
  """Loads the Codec on the device of --device."""
  import jax

  from m2l2.codec import codec, loading
  path = loading.locate(args.checkpoint)
  kind, _, number = (getattr(args, 'device', None) or '').partition(':')
  if number and not number.isdecimal():
    raise UserError(f'--device={args.device}: give KIND or KIND:N, as gpu:1')
  if kind == 'cpu':
    jax.config.update('jax_platforms', 'cpu')  # so that JAX does not reserve memory on a GPU
  try:
    devices = jax.devices(kind or None)
  except RuntimeError as error:
    raise UserError(f'JAX finds no {kind or "device"}: {in_one_line(error)}') from error
  if kind:
    if int(number or 0) >= len(devices):
      raise UserError(f'--device={args.device}: there are {len(devices)}, counted from 0')
    jax.config.update('jax_default_device', devices[int(number or 0)])
  return codec.load(path)
