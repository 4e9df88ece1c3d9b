"""Trains a model; the same command resumes a run that was stopped.

  m2l2 train --config=configs/nano.py --config.data.root=MUSIC --workdir=runs/nano
  python -m m2l2 train --config=configs/stereo.py --config.train.batch_size=512 \\
    --config.data.root=MUSIC --workdir=runs/stereo

  --config=FILE[:WORDS]  a file with get_config(); presets by name, tiny or configs/tiny.py, from any directory
  --config.FIELD=VALUE   changes one field; configs/base.py lists them all
  --workdir=DIR          gets config.json, metrics.jsonl, checkpoints/ and snapshot/
  --check                prints what would run, or what is wrong, and ends: nothing is compiled or written
  --check=config         the same without checking data, workdir and weights, for those on another machine
  --replay=STEP          runs one update of the run in WORKDIR again, from the nearest checkpoint before it, and says
                         which item, noise level and tensor was not finite; writes nothing. Status 3
                         if any was, 0 if all was finite
  --multihost            this is one of several processes: the others are found through the cluster
                         (TPU pods, Slurm, ...) or through the three flags below
  --coordinator=HOST:PORT --num_processes=N --process_id=I
  --start_timeout=300    seconds within which all processes must have started
  --peer_timeout=100     seconds without a sign of life after which a process counts as lost: the others
                         then end with status 1, and the same command on all hosts resumes the run. Six
                         times that without progress in a training loop, though all processes live,
                         ends the run likewise, with the stacks of all threads in WORKDIR/stalled
  --stopped_exit_code=N  the exit code of a run that was stopped and saved before its last step
                         (default 0, as for a completed run), for scripts that need to tell them apart

Compiled programs are cached, so that a restart does not compile again: in JAX_COMPILATION_CACHE_DIR or, without it, in
~/.cache/m2l2; for several processes on accelerators in WORKDIR/compiled.
"""

import logging as python_logging
import os
import re
import sys

from absl import flags, logging
from ml_collections import config_flags

from m2l2.errors import UserError, first_line, in_one_line, printable, told
from m2l2.training import config_file, hosts, scaling

NOT_FINITE = 3  # the exit status of a replay that found something


def parse(argv, *, required=('config', 'workdir')) -> flags.FlagValues:
  """The flags of a command line, argv[0] being the program. Raises UserError, one line."""
  places = _places(argv)
  overrides = [match[1] for arg in argv[1:] if (match := re.match(r'--?(?:no)?config\.([\w.]*)', arg))]
  values = flags.FlagValues()
  if places:
    config = config_file.load(places[0])
    logging.info('config: %s', places[0])
    config_file.check(config, overrides)
    # --config=FILE is handled above; config_flags handles --config.FIELD=VALUE.
    argv = [arg for arg in argv if not re.match('--?config=', arg)]
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
  elif 'config' in required or overrides:
    raise UserError('--config=... is missing (--help shows an example)')
  for name in ('workdir', 'coordinator'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  for name, value in (('num_processes', None), ('process_id', None), ('start_timeout', 300), ('peer_timeout', 100)):
    flags.DEFINE_integer(name, value, '', flag_values=values)
  flags.DEFINE_integer('stopped_exit_code', 0, '', lower_bound=0, upper_bound=255, flag_values=values)
  flags.DEFINE_integer('replay', None, '', flag_values=values)
  flags.DEFINE_bool('multihost', False, '', flag_values=values)
  flags.DEFINE_enum('check', None, ['all', 'config'], '', flag_values=values)
  argv = ['--check=all' if re.fullmatch('--?check', arg) else arg for arg in argv]
  try:
    rest = values(argv)[1:]
  except Exception as error:  # absl and ml_collections raise errors of many types
    raise UserError(in_one_line(error)) from error
  config_file.check_given(values.config)
  if values.config is not None and 'scaling' in values.config:
    values.config.update_from_flattened_dict(scaling.follow_batch(values.config, given=overrides))
  for missing in (name for name in required if not values[name].value):
    raise UserError(f'--{missing}=... is missing (--help shows an example)')
  if rest:
    raise UserError(f'{rest[0]!r} is not a flag (--help lists them)')
  for name in ('start_timeout', 'peer_timeout'):
    if (values[name].value or 0) < 5:
      raise UserError(f'--{name}={values[name].value}: it must be 5 seconds or more')
  return values


def _places(argv) -> list[str]:
  """The path of --config, if given."""
  asked = [arg.partition('=')[2] for arg in argv[1:] if re.match('--?config=', arg)]
  for arg in argv[1:]:
    if arg in ('--config', '-config'):
      raise UserError('--config and its file are one word: write --config=FILE')
    if re.match('--?flagfile(=|$)', arg):
      raise UserError('--flagfile is not read here: write the flags out, or the fields in a config file of your own')
  if len(asked) > 1:
    raise UserError(f'--config is given {len(asked)} times; which of {", ".join(asked)} is meant?')
  return [config_file.find(value) for value in asked]


def _is_for_users(record: python_logging.LogRecord) -> bool:
  """A log filter: passes warnings, and all messages of m2l2 (by path: a parent folder may be called m2l2, too).

  An error that a library logs with its traceback (Orbax, of writes in the background) becomes one line: an error that
  ends the run is reported at its end.
  """
  own = os.path.dirname(os.path.dirname(os.path.abspath(hosts.__file__))) + os.sep
  if os.path.abspath(record.pathname).startswith(own):
    return True
  if record.exc_info and record.exc_info[1]:
    record.msg, record.args = f'{record.module}: {first_line(record.exc_info[1])}', ()
    record.exc_info = record.exc_text = None
  return record.levelno > python_logging.INFO


def main(argv=None) -> int:
  """The command. Returns 0 when the run is done (see --stopped_exit_code), 1 after a line of error, 3 see --replay."""
  argv = list(sys.argv if argv is None else argv)
  if {'--help', '-h'} & set(argv):
    print(__doc__)
    return 0
  flags.FLAGS(argv[:1])  # absl's own flags keep their defaults; logging and grain need them parsed
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  handler.addFilter(_is_for_users)
  logging.use_absl_handler()
  try:
    values = parse(argv)
    if values.check and values.multihost:
      raise UserError('--check is for one process: leave --multihost out')
    if values.check and values.replay is not None:
      raise UserError('--check tells of a run and --replay of a step: give one of them')
    if values.check:
      from m2l2.training import preflight
      lines = preflight.report(values.config, values.workdir, places=values.check == 'all')
      print('\n'.join([f'config      {_places(argv)[0]}', *lines]))
      return 0
    with hosts.joined(values):
      if values.replay is not None:
        from m2l2.training.replay import replay
        finite, lines = replay(values.config, values.workdir, values.replay)
        print('\n'.join(lines), flush=True)
        return 0 if finite else NOT_FINITE
      from m2l2.training.loop import train
      done = train(values.config, values.workdir)
      return values.stopped_exit_code if done < values.config.train.steps else 0
  except KeyboardInterrupt:
    print('m2l2: stopped', file=sys.stderr)
    return 130
  except Exception as error:
    line = told(error)
    if line is None:
      raise
    print('m2l2:', printable(in_one_line(line)), file=sys.stderr)
    return 1
