"""Faults at random moments of encode over a folder, prepare, encode-dataset and train; then the same command again.

  python tests/soak/soak_faults.py --moments=20
  python tests/soak/soak_faults.py --moments=8 --only=train --seed=3 --verbose

Each command is run undisturbed first, which gives its duration and what it makes. Then, at moments drawn uniformly over
that duration: kill -9; SIGHUP; a disk that is full from that moment on (a small tmpfs, filled up; without the right to
mount one a limit on the size of files, which gives EFBIG instead of ENOSPC); a reader that closes its end of the pipe
(of both streams, or of standard output alone). Asked is each time:

  the exit status  137; 129; 1; 141 (0 where nothing was left to write or to print); a train that is told by SIGHUP to
                   stop has saved and gives 0, and one whose log nobody reads goes on
  what it says     one line about the fault at most, no traceback
  what it leaves   no temporary or lock file, but for kill -9
  the same again   status 0, the bytes of the undisturbed run (train: its metrics, its weights, its last checkpoint),
                   nothing else

Prints a table and PASS or FAIL; exits with 1 on FAIL. Not collected by pytest.
"""

import argparse
import collections
from collections.abc import Callable
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import soak_prepare
import soak_resume

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CLIPS = REPOSITORY / 'm2l2' / 'assets' / 'clips' / 'train'
FAULTS = ('kill', 'hangup', 'full disk', 'closed pipe')
DISK = 64 << 20  # bytes
# What no run may leave: names of temporary files, folders and locks, of ours and of Orbax.
LEFT = re.compile(r'\.part$|\.partial$|\.tmp$|tmp-|\.new$|\.old$|(^|[./])lock(-\d+)?$|^\.prepare$')
WORK = re.compile(r'^\.prepare$')  # stays until prepare is done
LOGGED = re.compile(r'\d\d:\d\d:\d\d ')  # as training's log begins its lines
COMPILING = 'm2l2: compiling, about '


@dataclasses.dataclass(frozen=True)
class Command:
  """argv of an output's path; differences of (undisturbed output, other output), as lines."""
  argv: Callable
  differences: Callable


@dataclasses.dataclass
class Outcome:
  """A run: its status as a shell has it, what it said, seconds, and whether it was struck before its end."""
  status: int
  said: str
  errors: str
  seconds: float
  struck: bool


# ---- the commands --------------------------------------------------------------------------------


def m2l2(*argv):
  return [sys.executable, '-m', 'm2l2', *map(str, argv)]


def different_bytes(straight, other):
  a, b = soak_prepare.contents(straight), soak_prepare.contents(other)
  return [f'{name}: {"differs" if name in a and name in b else "missing" if name in a else "too many"}'
          for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def different_runs(straight, other):
  """Of two workdirs: metrics, weights and, number for number, the last checkpoint."""
  differences = soak_resume.differences(straight, other)
  try:
    (a, b), (first, second) = zip(*map(last_checkpoint, (straight, other)))
  except Exception as error:  # whatever Orbax makes of damage
    return [*differences, f'the checkpoints cannot be read: {error!r}']
  if a != b:
    differences.append(f'the last checkpoint is of step {b}, not {a}')
  elif first.keys() != second.keys() or any(first[name].tobytes() != second[name].tobytes() for name in first):
    differences.append(f'the arrays of checkpoint {a} differ')
  return differences


def last_checkpoint(workdir):
  """(step, {name: array}) of a workdir; all its checkpoints are read."""
  import numpy as np
  import orbax.checkpoint as ocp
  with ocp.CheckpointManager(workdir.resolve() / 'checkpoints') as manager:
    for step in sorted(manager.all_steps()):
      read = manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(), about=ocp.args.JsonRestore()))
      assert read['about']['format'] == 1
  return step, {name: np.asarray(leaf) for name, leaf in read['state'].items()}


COMMANDS = {
  'encode': Command(lambda out: m2l2('encode', CLIPS, out, '--checkpoint=tiny'), different_bytes),
  'prepare': Command(lambda out: m2l2(
    'prepare', f'--input={CLIPS}', f'--output={out}', '--shard-minutes=0.3', '--processes=2',
    '--validation-fraction=0.3'), different_bytes),
  'encode-dataset': Command(lambda out: m2l2(
    'encode-dataset', f'--source={CLIPS}', '--checkpoint=tiny', f'--output={out}', '--shards=6'), different_bytes),
  'train': Command(lambda out: m2l2('train', *soak_resume.command(
    out, music=CLIPS, fields={'train.steps': 40, 'train.checkpoint_every': 8})[4:]), different_runs),
}


def environment(name, base):
  """Programs are compiled once; those of training, which run for a moment, quickly."""
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or base / 'cache'
  left_out = {'PYTHONUNBUFFERED', *([] if name == 'train' else ['XLA_FLAGS'])}
  given = {**soak_resume.environment(cache), 'TMPDIR': str(base / 'tmp')}
  return {variable: value for variable, value in given.items() if variable not in left_out}


# ---- the faults ----------------------------------------------------------------------------------


class Disk:
  """A folder whose disk can be filled up: a tmpfs of its own, or a limit on what a process may write."""

  def __init__(self, folder):
    self.folder, self._filler = folder, None
    folder.mkdir()
    options = ['-t', 'tmpfs', '-o', f'size={DISK}', 'none', folder]
    self.mounted = hasattr(os, 'geteuid') and os.geteuid() == 0 and not subprocess.run(
      ['mount', *options], check=False, capture_output=True).returncode

  def fill(self, popen):
    """From here on nothing can be written there; `top` keeps it so."""
    if not self.mounted:
      resource.prlimit(popen.pid, resource.RLIMIT_FSIZE, (0, 0))  # Python ignores SIGXFSZ
      return
    self._filler = open(self.folder / 'filler', 'ab', buffering=0)
    self.top()

  def top(self):
    if self._filler:
      for size in (1 << 20, 1 << 12):
        with contextlib.suppress(OSError):
          while self._filler.write(bytes(size)):
            pass

  def free(self):
    if self._filler:
      self._filler.close()
      os.unlink(self._filler.name)
      self._filler = None

  def close(self):
    self.free()
    if self.mounted:
      subprocess.run(['umount', self.folder], check=False)


def run(name, place, *, env, disk, fault=None, delay=0.0, merged=False):
  """Runs a command; after `delay` seconds the fault strikes. merged: standard error goes where standard output does.

  In what it says its place is called OUT.
  """
  argv = COMMANDS[name].argv(place)
  began, texts = time.monotonic(), collections.defaultdict(bytes)
  popen = subprocess.Popen(argv, cwd=REPOSITORY, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT if merged else subprocess.PIPE, bufsize=0)
  struck = False
  with selectors.DefaultSelector() as pipes, contextlib.ExitStack() as stack:
    stack.callback(popen.kill)  # where this script is stopped
    for stream in filter(None, (popen.stdout, popen.stderr)):
      pipes.register(stream, selectors.EVENT_READ)

    def read(seconds):
      for key, _ in pipes.select(seconds) if pipes.get_map() else ():
        data = os.read(key.fd, 1 << 16)
        texts[key.fileobj] += data
        if not data:
          pipes.unregister(key.fileobj)
      if not pipes.get_map():
        time.sleep(seconds)

    while popen.poll() is None or pipes.get_map():
      read(0.005)
      if fault and not struck and time.monotonic() - began >= delay and popen.poll() is None:
        struck = True
        if fault == 'kill':
          popen.kill()
        elif fault == 'hangup':
          popen.send_signal(signal.SIGHUP)
        elif fault == 'full disk':
          disk.fill(popen)
        else:
          read(0)  # what was said before
          pipes.unregister(popen.stdout)
          popen.stdout.close()
      disk.top()
  for stream in filter(None, (popen.stdout, popen.stderr)):
    stream.close()
  disk.free()
  status = popen.returncode
  said, errors = (texts[stream].decode().replace(str(place), 'OUT') for stream in (popen.stdout, popen.stderr))
  return Outcome(128 - status if status < 0 else status, said, errors, time.monotonic() - began, struck)


# ---- what is asked -------------------------------------------------------------------------------


def wrong_status(name, fault, outcome, straight):
  if not outcome.struck:
    return [] if outcome.status == 0 else [f'status {outcome.status} without a fault']
  expected = {'kill': [137], 'hangup': [129], 'full disk': [1, 0], 'closed pipe': [141]}[fault]
  if name == 'train':
    saved = 'all saved: run the same command' in outcome.errors
    expected = {'hangup': [0] if saved else [129], 'closed pipe': [0]}.get(fault, expected)
  elif fault == 'closed pipe' and outcome.said.count('\n') >= straight.said.count('\n'):
    expected = [0]
  if ' done: ' in outcome.errors:  # of training, before the fault
    expected = [*expected, 0]
  if outcome.status not in expected:
    return [f'status {outcome.status}, not {" or ".join(map(str, expected))}']
  return []


def wrong_words(fault, outcome, straight):
  """More than one line about the fault; a traceback; a status that nothing explains."""
  text = outcome.said + outcome.errors
  usual = set(plain_lines(straight.said + straight.errors))
  lines = [line for line in plain_lines(text) if line not in usual]
  odd = [line for line in lines if not line.startswith('m2l2: ') and not LOGGED.match(line)]
  ours = [line for line in lines if line.startswith('m2l2: ')]
  complaints = [f'it said: {line[:300]}' for line in odd[:5]]
  if 'Traceback' in text:
    complaints.append('a traceback')
  if len(ours) > 1:
    complaints += [f'{len(ours)} lines: {ours[0]} ... {ours[-1]}']
  if outcome.status == 1 and not ours:
    complaints.append('status 1 without a word')
  return complaints


def plain_lines(text):
  """Lines as two runs may share them: without speed, and without what is said of what was there or in the cache."""
  return [re.sub(r'[\d.e+]+x real time', 'x', line) for line in text.splitlines()
          if line.strip() and not line.startswith(COMPILING) and not line.endswith(': is there already')]


def leftovers(folder, *, allowed=None):
  return [f'left: {path.relative_to(folder)}' for path in sorted(folder.rglob('*'))
          if LEFT.search(path.name) and not (allowed and allowed.search(path.name))]


def moment(name, fault, place, *, straight, delay, merged, env, disk):
  """One fault and the same command again: (outcome, what is wrong, as lines)."""
  command, temporary = COMMANDS[name], pathlib.Path(env['TMPDIR'])
  before = set(os.listdir(temporary))
  outcome = run(name, place, env=env, disk=disk, fault=fault, delay=delay, merged=merged)
  if not outcome.struck and not outcome.status:
    return outcome, []
  wrong = wrong_status(name, fault, outcome, straight) + wrong_words(fault, outcome, straight)
  if outcome.struck and fault != 'kill':
    wrong += leftovers(disk.folder, allowed=WORK)
    wrong += [f'left in TMPDIR: {path}' for path in sorted(set(os.listdir(temporary)) - before)]
  again = run(name, place, env=env, disk=disk)
  if again.status:
    wrong += [f'again: status {again.status}: {(again.said + again.errors)[-600:]}']
  else:
    wrong += [f'again: {line}' for line in leftovers(disk.folder)]
    wrong += [f'again: {line}' for line in command.differences(disk.folder / f'{name}-straight', place)[:5]]
    wrong += [f'again: {line}' for line in wrong_words(None, again, straight) if name != 'train']
  return outcome, wrong


def soak(name, base, *, moments, seed, disk, warm, verbose):
  """{fault: [moments, of them struck, of them failed]} of a command."""
  env, reference = environment(name, base), disk.folder / f'{name}-straight'
  for _ in range(1 if warm else 2):  # the first compiles
    shutil.rmtree(reference, ignore_errors=True)
    straight = run(name, reference, env=env, disk=disk)
    assert straight.status == 0, straight
  print(f'{name}: {straight.seconds:.1f} s undisturbed, {len(soak_prepare.contents(reference))} files', flush=True)
  rng, table = random.Random(f'{seed} {name}'), {fault: [0, 0, 0] for fault in FAULTS}
  assert not leftovers(disk.folder), leftovers(disk.folder)
  number, tries, longest = 0, 0, straight.seconds
  while number < moments:
    fault, delay, merged = FAULTS[number % len(FAULTS)], rng.uniform(0, longest), rng.random() < 0.5
    merged &= fault == 'closed pipe'
    if name == 'train' and fault == 'closed pipe':
      merged = True  # it says nothing on standard output
    place = disk.folder / f'{name}-{number}-{tries}'
    outcome, wrong = moment(name, fault, place, straight=straight, delay=delay, merged=merged, env=env, disk=disk)
    if not outcome.struck and tries < 5 and not wrong:  # the machine has become faster
      longest, tries = outcome.seconds, tries + 1
      shutil.rmtree(place)
      continue
    number, tries = number + 1, 0
    print(f'{name} {number}/{moments}: {fault}{" of both streams" if merged else ""} after {delay:.2f} s'
          f'{"" if outcome.struck else " (it was done before)"}: status {outcome.status}, '
          f'{"FAIL" if wrong else "ok"}', *wrong, sep='\n  ', flush=True)
    if verbose:
      print(outcome.said, outcome.errors, sep='\n--\n', flush=True)
    table[fault][0] += 1
    table[fault][1] += outcome.struck
    table[fault][2] += bool(wrong)
    shutil.rmtree(place, ignore_errors=True)
  shutil.rmtree(reference)
  return table


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--moments', type=int, default=20, help='of each command, the faults in turn (default 20)')
  parser.add_argument('--only', choices=COMMANDS, action='append', help='this command; again for more')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--warm', action='store_true', help='JAX_COMPILATION_CACHE_DIR has the programs already')
  parser.add_argument('--verbose', action='store_true', help='all that disturbed runs say')
  args = parser.parse_args()
  signal.signal(signal.SIGHUP, lambda *unused: None)  # under nohup children would inherit that it is ignored
  signal.signal(signal.SIGTERM, lambda *unused: sys.exit(143))  # or the tmpfs would stay mounted
  os.environ['JAX_PLATFORMS'] = 'cpu'  # of the checkpoints that are read here
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    base = pathlib.Path(folder)
    disk = Disk(base / 'disk')
    stack.callback(disk.close)
    (base / 'tmp').mkdir()
    print(f'seed {args.seed}; the full disk is {"a tmpfs" if disk.mounted else "RLIMIT_FSIZE: EFBIG, not ENOSPC"}')
    tables = {name: soak(name, base, moments=args.moments, seed=args.seed, disk=disk, warm=args.warm,
                          verbose=args.verbose)
              for name in args.only or COMMANDS}
  print(f'{"command":15} {"fault":12} {"moments":>7} {"struck":>7} {"failures":>8}')
  for name, table in tables.items():
    for fault, (count, struck, failed) in table.items():
      print(f'{name:15} {fault:12} {count:7} {struck:7} {failed:8}')
  good = not any(failed for table in tables.values() for *_, failed in table.values())
  print('PASS' if good else 'FAIL')
  return 0 if good else 1


if __name__ == '__main__':
  sys.exit(main())
