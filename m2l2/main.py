"""Trains a model; the same command goes on with a run that was stopped.

  m2l2 train --config=configs/tiny.py --config.data.root=MUSIC --workdir=runs/tiny
  python -m m2l2.main --config=configs/stereo.py --config.train.batch_size=512 \\
    --config.data.root=MUSIC --workdir=runs/stereo

  --config=FILE[:WORDS]  a file with get_config(); the presets' names work from any directory
  --config.FIELD=VALUE   changes one field; configs/base.py lists them all
  --workdir=DIR          gets config.json, metrics.jsonl, checkpoints/ and snapshot/
  --multihost            this is one of several processes: the others are found through the cluster
                         (TPU pods, Slurm, ...) or through the three flags below
  --coordinator=HOST:PORT --num_processes=N --process_id=I
  --start_timeout=300    seconds within which all processes must have come
  --peer_timeout=100     seconds of silence after which a process counts as lost: the others then end
                         with status 1, and the same command on all hosts goes on with the run
  --stopped_exit_code=N  the exit code of a run that was told to stop and saved before its last step;
                         0, as for one that is done, unless a script wants to tell them apart

Compiled programs are kept, so that a restart does not compile again: where JAX_COMPILATION_CACHE_DIR says, without it
in ~/.cache/m2l2 or, of several processes on accelerators, in WORKDIR/compiled.
"""

import importlib.util
import logging as python_logging
import os
import re
import sys

from absl import flags, logging
from ml_collections import config_flags

from m2l2 import hosts
from m2l2.errors import UserError


def find_config(value: str) -> str:
  """'configs/tiny.py:debug' as it is if there is such a file, else the installed preset's path."""
  path, colon, words = value.partition(':')
  presets = next(iter(importlib.util.find_spec('m2l2.configs').submodule_search_locations))
  for candidate in (path, os.path.join(presets, os.path.basename(path))):
    if os.path.isfile(candidate):
      return candidate + colon + words
  names = sorted(set(os.listdir(presets)) - {'__init__.py', '__pycache__'})
  raise UserError(f'--config={value}: there is no such file; the presets are {", ".join(names)}')


def parse(argv, *, required=('config', 'workdir')) -> flags.FlagValues:
  """The flags of a command line, argv[0] being the program. Raises UserError, one line."""
  argv = [f'--config={find_config(arg.partition("=")[2])}' if arg.startswith('--config=') else arg
          for arg in argv]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  for name in ('workdir', 'coordinator'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  for name, value in (('num_processes', None), ('process_id', None), ('start_timeout', 300), ('peer_timeout', 100)):
    flags.DEFINE_integer(name, value, '', flag_values=values)
  flags.DEFINE_integer('stopped_exit_code', 0, '', lower_bound=0, upper_bound=255, flag_values=values)
  flags.DEFINE_bool('multihost', False, '', flag_values=values)
  try:
    rest = values(argv)[1:]
  except (AttributeError, KeyError) as error:
    # ml_collections says 'stepz', or, where it has a guess, '"\'stepz\'\\nDid you mean ..."'.
    name = re.search(r'\w+', str(error.args[0]))[0]
    raise UserError(f'the config has no field {name!r} (configs/base.py lists them)') from error
  except Exception as error:  # of absl, of ml_collections or of the config file: any at all
    text = str(error).strip() or repr(error)  # one inside get_config() comes as a whole traceback
    line = text.splitlines()[-1] if 'Traceback' in text else ' '.join(text.split())
    raise UserError(line) from error
  for missing in (name for name in required if not values[name].value):
    raise UserError(f'--{missing}=... is missing (--help shows an example)')
  if rest:
    raise UserError(f'{rest[0]!r} is not a flag (--help lists them)')
  for name in ('start_timeout', 'peer_timeout'):
    if values[name].value < 5:
      raise UserError(f'--{name}={values[name].value}: it must be 5 seconds or more')
  return values


def main(argv=None) -> int:
  """The command: 0 when the run is done (see --stopped_exit_code), 1 after one line for the user."""
  argv = list(sys.argv if argv is None else argv)
  if {'--help', '-h'} & set(argv):
    print(__doc__)
    return 0
  flags.FLAGS(argv[:1])  # absl's own flags keep their defaults; logging and grain want them read
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  ours = f'{os.sep}m2l2{os.sep}'
  handler.addFilter(lambda record: record.levelno > python_logging.INFO or ours in record.pathname)
  logging.use_absl_handler()
  several = None
  try:
    values = parse(argv)
    hosts.check(multihost=values.multihost, coordinator=values.coordinator,
                num_processes=values.num_processes, process_id=values.process_id)
    if values.multihost:  # before anything touches a device
      several = hosts.join(
        coordinator=values.coordinator, num_processes=values.num_processes, process_id=values.process_id,
        start_timeout=values.start_timeout, peer_timeout=values.peer_timeout)
    from m2l2.train import train
    done = train(values.config, values.workdir)
    if several:
      several.leave()
  except (Exception, KeyboardInterrupt) as error:
    if several:
      several.fail(error)  # does not return
    if not isinstance(error, UserError):
      raise
    print(f'm2l2: {error}', file=sys.stderr)
    return 1
  return values.stopped_exit_code if done < values.config.train.steps else 0


if __name__ == '__main__':
  sys.exit(main())
