"""train, plan: training, and an estimate of what it needs."""

import os

from m2l2.cli import extras


def add(command):
  command('train', None, summary='Trains a model, or resumes a run that was stopped.',
          example='  m2l2 train --config=configs/nano.py --config.data.root=MUSIC '
                  '--workdir=runs/nano')
  parser = command('plan', plan,
                   summary="Memory and time of a run on a TPU pod, estimated by the TPU compiler; needs no TPU.",
                   example='  m2l2 plan --config=configs/base.py --topology=v5e:16x16 > plan.json\n'
                           '  m2l2 plan --config=configs/xl.py --topology=v5p:4x8x8 --max-batch --config.mesh.fsdp=8')
  parser.add_argument('--topology', required=True, metavar='KIND:SHAPE', help='v5e:16x16, v5p:4x8x8, v6e:16x16, ...')
  parser.add_argument('--preset', metavar='NAME', help="dp, fsdp, hsdp or tp instead of the config's")
  parser.add_argument('--batch', type=int, metavar='N', help="crops per step, instead of the config's")
  parser.add_argument('--max-batch', action='store_true', help='search the largest batch that fits')


def train(argv) -> int:
  extras.require('training', 'train', 'absl', 'array_record', 'clu', 'grain', 'ml_collections', 'optax',
                 'orbax.checkpoint', 'scipy')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's log, read when jax is imported: errors
  from m2l2.training import main as training
  return training.main(['m2l2 train', *argv])


def plan(args):
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # the machine here is not the one that is planned for
  extras.require('planning', 'train,tpu', 'ml_collections', 'optax')
  from m2l2.planning import plan as planning
  from m2l2.training import main as training
  values = training.parse(['m2l2 plan', *args.rest], required=('config',))
  planning.main(values.config, topology=args.topology, preset=args.preset, batch=args.batch, max_batch=args.max_batch)
