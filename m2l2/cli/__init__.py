"""The `m2l2` command: train, plan, prepare, encode, encode-dataset, decode, reconstruct, evaluate, info, ...

Each group of commands is one module, whose `add` declares the options. What a command needs is imported when it runs,
so that `m2l2 --help` answers at once.
"""

import argparse
import logging
import os
import shlex
import sys

from m2l2 import __version__
from m2l2.cli import coding, corpora, listing, measuring, retrieval, runs, signals, terminal, weights
from m2l2.errors import OutputClosed, told

_GROUPS = (runs, corpora, coding, retrieval, measuring, weights, listing)
_DESCRIPTION = """\
Encodes music into a few summary embeddings, and decodes them.

  m2l2 encode song.flac song.safetensors --checkpoint=tiny
  m2l2 decode song.safetensors song.wav --checkpoint=tiny

tiny is a model in the box; --checkpoint also takes the workdir of a training run or a snapshot.
"""


def main(argv=None) -> int:
  """Runs one command; returns its exit status.

  0: done. 1: a mistake of the user or an error of the machine, reported in one line. 2: a wrong command line. 129, 130,
  143: stopped by SIGHUP, Ctrl-C or SIGTERM; no half-written file is left. 141: the reader of its output has closed it.
  """
  terminal.open_streams()
  try:
    return _run_told(argv)
  finally:
    terminal.settle()


def _run_told(argv) -> int:
  try:
    status = _run(list(sys.argv[1:] if argv is None else argv))
    terminal.flush()
    return status
  except KeyboardInterrupt:
    terminal.tell('stopped')
    return 130
  except SystemExit as stop:  # of a signal
    return _status(stop)
  except Exception as error:
    line = told(error)
    if line is None:
      raise
    terminal.tell(line)
    return 141 if isinstance(line, OutputClosed) else 1


def _run(argv) -> int:
  if argv[:1] == ['train']:  # its flags are those of absl and of the config
    signals.leave_late_writes_untold()
    with signals.stopped_by_signals():
      return runs.train(argv[1:])
  if not argv:
    _parser().print_help()
    return 0
  try:
    args, rest = _parser().parse_known_args(argv)
    # `plan` takes fields of the config, --runner options of the Beam runner.
    others = args.run is runs.plan or getattr(args, 'runner', None)
    if rest and not others:
      _parser().error(f'unrecognized arguments: {" ".join(rest)}')
  except SystemExit as stop:  # argparse: 0 after --help, 2 after a wrong command line
    return _status(stop)
  args.rest = rest
  for name, value in vars(args).items():  # the shell does not expand --name=~/x
    if isinstance(value, list) and name != 'rest':
      setattr(args, name, [_at_home(item) for item in value])
    setattr(args, name, _at_home(getattr(args, name)))
  args.command_line = shlex.join(['m2l2', *argv])
  terminal.quiet_libraries()
  waits = logging.getLogger('m2l2.compiling')
  waits.setLevel(logging.ERROR if getattr(args, 'quiet', False) else logging.NOTSET)
  try:
    with signals.stopped_by_signals():
      args.run(args)
  finally:
    waits.setLevel(logging.NOTSET)  # --quiet holds for this call alone
  return 0


def _status(stop: SystemExit) -> int:
  return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _at_home(value):
  return os.path.expanduser(value) if isinstance(value, str) and value.startswith('~') else value


def _parser() -> argparse.ArgumentParser:
  parser = terminal.Parser(prog='m2l2', description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--version', action='version', version=f'm2l2 {__version__}')
  commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True, parser_class=terminal.Parser)

  def command(name, run, *, summary, example):
    parser = commands.add_parser(name, help=summary, description=f'{summary}\n\n{example}',
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run)
    return parser

  for group in _GROUPS:
    group.add(command)
  return parser
