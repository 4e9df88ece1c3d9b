"""Trains a model; the same command goes on with a run that was stopped.

  m2l2 train --config=configs/tiny.py --config.data.root=MUSIC --workdir=runs/tiny
  python -m m2l2.main --config=configs/stereo.py --config.train.batch_size=512 \\
    --config.data.root=MUSIC --workdir=runs/stereo

  --config=FILE[:WORDS]     a file with get_config(); the presets' names work from any directory
  --config.FIELD=VALUE      changes one field; configs/base.py lists them all
  --workdir=DIR             gets config.json, metrics.jsonl, checkpoints/ and snapshot/
  --multihost               one of several processes: finds the others through the cluster (TPU pods,
                            Slurm, ...), or through the three flags below
  --coordinator=HOST:PORT --num_processes=N --process_id=I

Compiled programs are kept between runs in the directory that JAX_COMPILATION_CACHE_DIR names.
"""

import importlib.util
import logging as python_logging
import os
import sys

from absl import flags, logging
import jax
from ml_collections import config_flags

from m2l2.errors import UserError


def find_config(value: str) -> str:
  """'configs/tiny.py:debug' as it is if that file exists, else the installed preset of that name."""
  path, colon, words = value.partition(':')
  if os.path.exists(path):
    return value
  presets = next(iter(importlib.util.find_spec('m2l2.configs').submodule_search_locations))
  if os.path.exists(installed := os.path.join(presets, os.path.basename(path))):
    return installed + colon + words
  names = sorted(n for n in os.listdir(presets) if n.endswith('.py') and n != '__init__.py')
  raise UserError(f'--config={value}: there is no such file; the presets are {", ".join(names)}')


def parse(argv) -> flags.FlagValues:
  """The flags of a command line, argv[0] being the program. Raises UserError, one line."""
  argv = [argv[0]] + [f'--config={find_config(arg.split("=", 1)[1])}'
                      if arg.startswith(('--config=', '-config=')) else arg for arg in argv[1:]]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv, lock_config=True)
  flags.DEFINE_string('workdir', None, 'See above.', flag_values=values)
  flags.DEFINE_bool('multihost', False, 'See above.', flag_values=values)
  flags.DEFINE_string('coordinator', None, 'See above.', flag_values=values)
  flags.DEFINE_integer('num_processes', None, 'See above.', flag_values=values)
  flags.DEFINE_integer('process_id', None, 'See above.', flag_values=values)
  try:
    rest = values(argv)[1:]
  except Exception as error:  # absl, ml_collections and the config file itself: any error at all
    raise UserError(' '.join(str(error).split()) or repr(error)) from error
  if rest:
    raise UserError(f'{rest[0]!r} is not a flag (--help lists them)')
  for name in ('config', 'workdir'):
    if not values[name].value:
      raise UserError(f'--{name} is missing (--help shows an example)')
  return values


def main(argv=None) -> int:
  """The command: 0 when the run is done or was stopped and saved, 1 after one line for the user."""
  argv = list(sys.argv if argv is None else argv)
  if {'--help', '-help', '-h'} & set(argv):
    print(__doc__)
    return 0
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  handler.addFilter(lambda r: r.levelno > python_logging.INFO or f'{os.sep}m2l2{os.sep}' in r.pathname)
  try:
    values = parse(argv)
    if values.multihost:  # before anything touches a device
      jax.distributed.initialize(values.coordinator, values.num_processes, values.process_id)
    from m2l2.train import train  # pylint: disable=g-import-not-at-top
    train(values.config, values.workdir)
  except UserError as error:
    print(f'm2l2: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
