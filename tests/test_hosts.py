"""Several processes on this machine as one run: starting, losing one, going on with as many as there are.

All go through the real command. Where only the meeting and the ending matter, a stand-in for the
loop saves the seconds of compiling. Two of these are in every run of the suite; test_train.py trains
in two processes; the rest is soak.
"""

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import soak_resume

from m2l2.errors import UserError
from m2l2.training import hosts, main

LIMIT = 300  # seconds for any one wait: a test machine may be slow, but nothing may hang
AGAIN = 'run the same command on all hosts'


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


class Processes:
  """Processes that were started together; their output goes to files named after `log`."""

  def __init__(self, commands, environments, log):
    self.logs = [f'{log}.{i}.log' for i in range(len(commands))]
    self.all = []
    for command, environment, path in zip(commands, environments, self.logs):
      with open(path, 'w') as f:
        self.all.append(subprocess.Popen(
          command, env=environment, cwd=soak_resume.REPOSITORY, stdout=f, stderr=subprocess.STDOUT))

  def said(self, i):
    with open(self.logs[i]) as f:
      return f.read()

  def show(self):
    return '\n'.join(f'== process {i}, status {p.poll()}\n{self.said(i)}' for i, p in enumerate(self.all))

  def wait_for(self, true, *, seconds=LIMIT):
    """Waits until `true()`; fails with all output if a process ends before or time is up."""
    end = time.monotonic() + seconds
    while not true():
      assert time.monotonic() < end and all(p.poll() is None for p in self.all), self.show()
      time.sleep(0.02)

  def status(self, i, *, seconds=LIMIT):
    """The exit status of a process that is about to end."""
    try:
      return self.all[i].wait(seconds)
    except subprocess.TimeoutExpired:
      pytest.fail(f'process {i} has not ended after {seconds} s\n{self.show()}')

  def statuses(self):
    return [self.status(i) for i in range(len(self.all))]

  def last_line(self, i):
    """The last line of a process, which for words from beyond the grave comes a moment after its end."""
    end = time.monotonic() + 10
    while time.monotonic() < end and not self.said(i).splitlines()[-1:][0].startswith('m2l2: '):
      time.sleep(0.05)
    return self.said(i).splitlines()[-1]


@contextlib.contextmanager
def started(commands, environments, *, log):
  processes = Processes(commands, environments, log)
  try:
    yield processes
  finally:
    for p in processes.all:
      p.kill()
      p.wait(10)


def flags(count, *, peer_timeout=15):
  """For each of `count` processes its flags."""
  port = free_port()
  return [['--multihost', f'--coordinator=localhost:{port}', f'--num_processes={count}', f'--process_id={i}',
           f'--peer_timeout={peer_timeout}'] for i in range(count)]


# Meeting and ending, with a stand-in for the loop.

STAND_IN = """
import sys, time, types
import jax
from m2l2.training import hosts, main, watchdog
from m2l2.errors import UserError

def train(config, workdir):
  own = jax._src.distributed.global_state.process_id
  while workdir == 'words' and len(words := hosts.exchange('words', f'of {own}')) < 2 - own:
    time.sleep(.05)
  if workdir == 'words':
    print('words', words)
  print('process', own, 'trains', flush=True)
  if workdir == 'mistake':
    raise UserError('there is no music here')
  if workdir == 'bug':
    raise ZeroDivisionError('a bug')
  if workdir.endswith('asleep'):
    loop(workdir)
  time.sleep(0 if workdir == 'quick' else 200)
  return config.train.steps

def loop(workdir):
  hosts.Hosts.here._watchdog._limit = 4  # not STALLED times --peer_timeout: a test has little time
  first = jax._src.distributed.global_state.process_id == 0
  with hosts.watched(workdir) as progress:
    for step in range(100):
      progress(step, watchdog.WAITING)
      if step == 20 and not first:
        hang_in_the_loader()
      progress(step + 1, watchdog.COMPUTING)
      time.sleep(0.05 if step < 20 else 200)  # process 0 waits for the other one's part of the step

def hang_in_the_loader():
  time.sleep(200)

sys.modules['m2l2.training.loop'] = types.SimpleNamespace(train=train)
sys.exit(main.main(['m2l2 train', *sys.argv[1:]]))
"""


def stand_ins(workdirs, *, log, flags, more=None):
  environment = {**os.environ, 'PYTHONPATH': str(soak_resume.REPOSITORY)}
  commands = [[sys.executable, '-c', STAND_IN, '--config=configs/nano.py:debug', f'--workdir={workdir}', *own]
              for workdir, own in zip(workdirs, flags)]
  return started(commands, [{**environment, **own} for own in more or [{}] * len(commands)], log=log)


def train_all(processes):
  return lambda: all('trains' in processes.said(i) for i in range(len(processes.all)))


@pytest.mark.soak
def test_a_process_that_falls_silent_ends_the_others_by_name_and_in_time(tmp_path):
  with stand_ins(['w'] * 3, flags=flags(3, peer_timeout=8), log=tmp_path / 'silent') as processes:
    processes.wait_for(train_all(processes))
    time.sleep(2.5)  # it has beaten
    processes.all[1].send_signal(signal.SIGSTOP)  # as if its machine hung: no connection is closed
    began = time.monotonic()
    assert [processes.status(i) for i in (0, 2)] == [1, 1], processes.show()
    assert time.monotonic() - began < 30, processes.show()
    for i in (0, 2):
      line = processes.last_line(i)
      assert re.match(r'm2l2: (lost process 1 of 3|process [02] of 3 ended \(lost process 1\))', line), line
      assert AGAIN in line and 'stack trace' not in processes.said(i)


def stalled(processes, workdir, *, within):
  """Checks that both ended so soon, naming process 1, and left the stacks of all their threads."""
  began = time.monotonic()
  assert [processes.status(i, seconds=within) for i in range(2)] == [1, 1], processes.show()
  print(f'both ended {time.monotonic() - began:.1f} s after the last step')
  for i in range(2):
    line = processes.last_line(i)
    assert re.search(r'no progress for \d+ s: process 1 \(.+\), at step \d+, waiting for data, the furthest at step '
                     r'\d+, computing', line), processes.show()
    assert AGAIN in line and 'Traceback' not in processes.said(i), processes.show()
  assert sorted(os.listdir(workdir / 'stalled')) == ['process-00000.txt', 'process-00001.txt']
  return [(workdir / f'stalled/process-0000{i}.txt').read_text() for i in range(2)]


def test_a_loop_that_stands_still_in_a_process_that_lives_ends_all_with_their_stacks(tmp_path):
  workdir = tmp_path / 'asleep'
  with stand_ins([workdir] * 2, flags=flags(2, peer_timeout=60), log=tmp_path / 'asleep') as processes:
    processes.wait_for(train_all(processes))
    stacks = stalled(processes, workdir, within=40)
  assert 'hang_in_the_loader' in stacks[1] and 'hang_in_the_loader' not in stacks[0]
  for text in stacks:
    assert 'in loop' in text and 'in _watch' in text  # the main thread, and another


def test_when_the_first_process_is_killed_jax_aborts_the_others_and_their_last_words_say_why(tmp_path):
  with stand_ins(['words'] * 2, flags=flags(2), log=tmp_path / 'first') as processes:
    processes.wait_for(train_all(processes))
    assert "words {0: 'of 0', 1: 'of 1'}" in processes.said(0) and "words {1: 'of 1'}" in processes.said(1)
    processes.all[0].kill()
    assert processes.status(1, seconds=60) != 0
    line = processes.last_line(1)
    assert 'process 1 of 2' in line and 'another' in line and AGAIN in line, processes.show()


@pytest.mark.soak
@pytest.mark.parametrize('what, says', [('mistake', 'there is no music here'), ('bug', 'ZeroDivisionError: a bug')])
def test_a_process_that_fails_tells_the_others_why_at_once(what, says, tmp_path):
  with stand_ins(['w', what], flags=flags(2), log=tmp_path / what) as processes:
    assert processes.statuses() == [1, 1], processes.show()
    assert all(says in processes.last_line(i) for i in range(2)), processes.show()
    assert ('Traceback' in processes.said(1)) == (what == 'bug') and 'Traceback' not in processes.said(0)


def slurm(workdirs, *, log):
  """Two tasks of a Slurm step, which are told nothing by flags."""
  port = free_port()
  more = [{'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '1',
           'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i), 'JAX_COORDINATOR_PORT': str(port)} for i in range(2)]
  return stand_ins(workdirs, flags=[['--multihost']] * 2, more=more, log=log)


@pytest.mark.soak
def test_slurm_is_found_without_flags_and_all_end_well(tmp_path):
  with slurm(['quick'] * 2, log=tmp_path / 'slurm') as processes:
    assert processes.statuses() == [0, 0], processes.show()
    for i in range(2):
      assert f'process {i} trains' in processes.said(i) and 'm2l2: ' not in processes.said(i)


def test_slurm_is_found_without_flags_and_a_mistake_of_one_is_told_to_both(tmp_path):
  with slurm(['w', 'mistake'], log=tmp_path / 'slurm') as processes:
    assert processes.statuses() == [1, 1], processes.show()
    for i in range(2):
      assert f'process {i} trains' in processes.said(i) and 'Traceback' not in processes.said(i)
      assert 'there is no music here' in processes.last_line(i), processes.show()


@pytest.mark.soak
def test_a_process_whose_peers_never_come_ends_with_a_line(tmp_path):
  own = [[*flags(2)[0], '--start_timeout=5']]
  with stand_ins(['w'], flags=own, log=tmp_path / 'alone') as processes:
    assert processes.status(0) != 0
    assert 'within --start_timeout=5 s' in processes.last_line(0), processes.show()


@pytest.mark.parametrize('given, says', [
  (['--coordinator=localhost:1234'], '--coordinator is for runs of several processes: add --multihost'),
  (['--num_processes=2'], '--num_processes is for runs of several'),
  (['--process_id=0'], '--process_id is for runs of several'),
  (['--multihost', '--coordinator=localhost'], 'must be HOST:PORT'),
  (['--multihost', '--coordinator=localhost:1', '--num_processes=0'], '--num_processes=0'),
  (['--multihost', '--coordinator=localhost:1', '--num_processes=2', '--process_id=2'], 'it is 0 to 1'),
  (['--multihost', '--coordinator=localhost:1', '--num_processes=2', '--process_id=-1'], '--process_id=-1'),
  (['--peer_timeout=0'], '--peer_timeout=0'),
  (['--start_timeout=0'], '--start_timeout=0'),
])
def test_flags_that_do_not_go_together_are_one_line(given, says, capsys):
  assert main.main(['m2l2', '--config=configs/nano.py:debug', '--workdir=w', *given]) == 1
  assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('number, name', [(129, 'SIGHUP'), (143, 'SIGTERM')])
def test_a_signal_that_ends_one_is_told_to_the_others(number, name):
  this = mock.Mock(_end=mock.Mock(side_effect=RuntimeError('does not return')))
  with pytest.raises(RuntimeError):
    hosts.Hosts.fail(this, SystemExit(number))
  this._end.assert_called_once_with(f'stopped by {name}: {hosts.AGAIN}', reason=f'stopped by {name}')


def test_last_words_after_their_end_are_no_error():
  words = hosts.LastWords()
  words.close()
  words.set('too late')
  words.close()


def test_a_coordinator_that_does_not_answer_is_one_line():
  with pytest.raises(UserError, match='no answer after --start_timeout=1 s') as error:
    hosts.join(coordinator=f'localhost:{free_port()}', num_processes=2, process_id=1, start_timeout=1)
  assert '\n' not in str(error.value)


@pytest.mark.soak
def test_no_cluster_and_no_flags_is_one_line(tmp_path):
  with stand_ins(['w'], flags=[['--multihost']], log=tmp_path / 'none') as processes:
    assert processes.statuses() == [1] and 'found no cluster' in processes.last_line(0), processes.show()


# The shipped config, small: killed, restarted, moved to other numbers of processes.

STEPS = 22
FIELDS = {
  'train.steps': STEPS, 'variants.head_start.share': 0, 'train.batch_size': 8, 'mesh.preset': 'fsdp', 'mesh.fsdp': 2}
ONE_MESH = 4  # devices: data 2 x fsdp 2, however many processes have them

# What each step was fed, exactly: every bit of the global batch, weighed by its place in it.
# And on CPUs, JAX looks for a program under another name in each process, but keeps only that of
# process 0; they are the same, so with one name for all each layout is compiled once.
WITH_DIGEST = """
import dataclasses, sys
import jax, jax.numpy as jnp
from jax._src import cache_key
from m2l2 import build
from m2l2.training import main
cache_key._hash_accelerator_config = lambda *unused: None
make = build.step_functions

def step_functions(config, **options):
  functions = make(config, **options)
  def train_step(state, batch, **options):
    state, metrics = functions.train_step(state, batch, **options)
    bits = jax.lax.bitcast_convert_type(batch['audio'], jnp.uint32).reshape(-1)
    places = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
    return state, metrics | {'audio/digest': jnp.sum(bits * places)}
  return dataclasses.replace(functions, train_step=train_step)

build.step_functions = step_functions
sys.exit(main.main(['m2l2 train', *sys.argv[1:]]))
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """`run(workdir, processes=, devices=, **fields)` starts a run of that many processes."""
  base = tmp_path_factory.mktemp('hosts')
  music = soak_resume.write_music(base / 'music')

  def start(workdir, *, processes, devices, fields=FIELDS, first_argument=None):
    environment = {**soak_resume.environment(base / 'cache', devices=devices),
                   'JAX_SHARE_BINARY_BETWEEN_HOSTS': '1'}  # process 0 compiles for all
    own = flags(processes) if processes > 1 else [()]
    commands = []
    for i in range(processes):
      _, _, _, _, *arguments = soak_resume.command(workdir, music=music, fields=fields, flags=own[i])
      commands.append([sys.executable, '-c', WITH_DIGEST, *filter(None, [first_argument]), *arguments])
    return started(commands, [environment] * processes, log=f'{workdir}.{processes}x{devices}')

  return start


def column(workdir, name):
  return [line[name] for line in soak_resume.trace(workdir)]


def steps_of(workdir):
  return column(workdir, 'step')


def checkpoints_in(workdir):
  folder = workdir / 'checkpoints'
  return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if folder.exists() else []


@pytest.mark.soak
def test_kill_9_of_one_of_two_then_on_in_two_in_one_and_in_four(run, tmp_path):
  rng = random.Random(os.getpid())
  # Nothing happens to this one.
  straight = tmp_path / 'straight'
  with run(straight, processes=2, devices=ONE_MESH // 2) as processes:
    assert processes.statuses() == [0, 0], processes.show()
  assert steps_of(straight) == list(range(1, STEPS + 1))
  assert len(set(column(straight, 'audio/digest'))) == STEPS  # each step has samples of its own

  # Two processes, one of them killed while training.
  moved = tmp_path / 'moved'
  with run(moved, processes=2, devices=ONE_MESH // 2) as processes:
    least = rng.randint(4, 6)
    processes.wait_for(lambda: checkpoints_in(moved) and len(soak_resume.trace(moved)) >= least)
    processes.all[1].kill()
    began = time.monotonic()
    assert processes.status(0) == 1, processes.show()
    assert time.monotonic() - began < 40, processes.show()  # --peer_timeout is 15
    line = processes.last_line(0)
    assert 'another process' in line or 'lost process 1 of 2' in line, processes.show()
    assert AGAIN in line and 'Traceback' not in processes.said(0) and 'stack trace' not in processes.said(0)
  killed_at = steps_of(moved)[-1]
  assert least <= killed_at < STEPS

  # Both again; then one of them is told to stop.
  with run(moved, processes=2, devices=ONE_MESH // 2) as processes:
    processes.wait_for(lambda: 'going on from step' in processes.said(0))
    first = int(re.search(r'going on from step (\d+)', processes.said(0))[1])
    assert 0 < first <= killed_at
    processes.wait_for(lambda: soak_resume.LOGGED.search(processes.said(0)))
    processes.all[1].send_signal(signal.SIGTERM)
    assert processes.statuses() == [0, 0], processes.show()
    assert not soak_resume.LOGGED.search(processes.said(1)), processes.said(1)  # process 0 alone logs
  done = steps_of(moved)[-1]
  assert first < done < STEPS and checkpoints_in(moved)[-1] == done  # complete, or it has another name
  assert sorted(os.listdir(moved)) == ['checkpoints', 'config.json', 'goodput.json', 'metrics.jsonl', 'snapshot']

  # From there to the end with other processes, on the same mesh and on another.
  ends = {'four': (4, 1, 1e-6), 'one': (1, 1, 1e-5)}
  for name, (count, devices, _) in ends.items():
    shutil.copytree(moved, tmp_path / name)
    other = {**FIELDS, 'mesh.fsdp': 1} if count * devices == 1 else FIELDS
    with run(tmp_path / name, processes=count, devices=devices, fields=other) as processes:
      assert not any(processes.statuses()), processes.show()
      assert f'going on from step {done} ' in processes.said(0)
  for name, (_, _, tolerance) in ends.items():
    workdir = tmp_path / name
    assert steps_of(workdir) == list(range(1, STEPS + 1))
    assert column(workdir, 'audio/digest') == column(straight, 'audio/digest')
    losses, wanted = (np.array(column(w, 'loss')[:20]) for w in (workdir, straight))
    print(name, 'largest relative difference', np.max(np.abs(losses / wanted - 1)))
    np.testing.assert_allclose(losses, wanted, rtol=tolerance)
    np.testing.assert_allclose(losses[:done], wanted[:done], rtol=1e-6)


# A real run in which the loader of process 1 hangs, or is slow.

LOADER = """
import sys, time
from jax._src import cache_key
from m2l2.training import main
from m2l2.data import pipeline
cache_key._hash_accelerator_config = lambda *unused: None  # as above

prepare, first, wait = pipeline.Ahead.__next__, '--process_id=0' in sys.argv, int(sys.argv.pop(1))
count = 0

def hang_in_the_loader(self):
  global count
  count += 1
  if not first:
    time.sleep(wait if count > 5 else 0)
  return prepare(self)

pipeline.Ahead.__next__ = hang_in_the_loader
sys.exit(main.main(['m2l2 train', *sys.argv[1:]]))
"""


@pytest.fixture
def with_loader(run, tmp_path, monkeypatch):
  """`with_loader(seconds, peer_timeout=)`: both processes of a run in which process 1 waits so long for each batch."""
  def start(seconds, *, peer_timeout, steps=1000):
    monkeypatch.setattr(sys.modules[__name__], 'WITH_DIGEST', LOADER)
    monkeypatch.setattr(sys.modules[__name__], 'flags', functools.partial(flags, peer_timeout=peer_timeout))
    fields = {**FIELDS, 'train.steps': steps, 'train.checkpoint_every': 1000}
    return run(tmp_path / 'run', processes=2, devices=1, fields=fields, first_argument=str(seconds))
  return start


@pytest.mark.soak
def test_a_real_loop_that_stands_still_ends_both(with_loader, tmp_path):
  with with_loader(1000, peer_timeout=5) as processes:
    processes.wait_for(lambda: len(soak_resume.trace(tmp_path / 'run')) >= 3)
    stacks = stalled(processes, tmp_path / 'run', within=6 * 5 + 20)
  assert 'hang_in_the_loader' in stacks[1] and 'hang_in_the_loader' not in stacks[0]


@pytest.mark.soak
def test_a_slow_loader_is_named_in_the_log(with_loader):
  with with_loader(1, peer_timeout=8) as processes:
    named = re.compile(r'process 1 \(.+\), at step \d+, .*, holds the others up: (\d+)% of its last \d+ s went into '
                       r'waiting for data, of theirs (\d+)%')
    processes.wait_for(lambda: named.search(processes.said(0)))
    match = named.search(processes.said(0))
    print(match[0])
    assert int(match[1]) > 50 > 30 > int(match[2])
    assert 'holds the others up' not in processes.said(1)
