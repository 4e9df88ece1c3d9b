"""Kills a small run at random moments, resumes it each time, compares it with an unharmed run.

  python tests/soak/soak_resume.py --kills=20

Prints both traces' comparison and PASS or FAIL; exits with 1 on FAIL. test_train.py does the same
with fewer kills. Not collected by pytest.
"""

import argparse
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

# The shipped config, small. All programs are the same, so they are compiled once and then found in
# the cache; optimising a program that runs for a second does not pay.
CONFIG = 'configs/nano.py:debug'
# For XLA: what is compiled soonest.
QUICK = ('--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
         '--xla_cpu_use_fusion_emitters=false --xla_cpu_collective_call_terminate_timeout_seconds=600')
SMALL = {
  'model.widths': '(8, 16)', 'model.strides': '((4, 4),)', 'model.blocks': '(1, 1)',
  'model.layers': 1, 'model.head_dim': 8, 'train.probe_every': 0, 'train.checkpoint_every': 3,
}

LOGGED = re.compile(r' step \d+/\d+ ')  # as the console says it


def write_music(directory, *, files=3, seconds=2, sample_rate=44100):
  """Decaying chords in noise: files that differ, from a fixed seed."""
  directory.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  t = np.arange(seconds * sample_rate) / sample_rate
  for i in range(files):
    tones = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(100, 2000, 4))
    audio = 0.1 * tones * np.exp(-2 * (t % 0.5)) + 0.02 * rng.normal(size=t.size)
    soundfile.write(directory / f'{i}.wav', audio, sample_rate)
  return directory


def command(workdir, *, music, fields=None, flags=()):
  """The command line of a run."""
  fields = {**SMALL, 'data.root': music, **(fields or {})}
  return [sys.executable, '-m', 'm2l2', 'train', f'--config={CONFIG}', f'--workdir={workdir}', *flags,
          *(f'--config.{name}={value}' for name, value in fields.items())]


def environment(cache, *, devices=1):
  """The environment of a run: CPU devices, a shared cache of compiled programs, quick compiling."""
  return {
    **os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(REPOSITORY),
    'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'XLA_FLAGS': QUICK}


def run(workdir, *, music, cache, fields=None, devices=1):
  """A run from start to end (or on from where it was): its exit code and what it printed."""
  done = subprocess.run(
    command(workdir, music=music, fields=fields), env=environment(cache, devices=devices),
    cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
  return done.returncode, done.stdout


def stopped_run(workdir, number, *, music, cache, fields=None, devices=1, after_lines=0, delay=0.0):
  """Starts the run and sends it a signal `delay` seconds after it has logged `after_lines` steps.

  Returns its exit code (negative: killed by that signal; 0 also if it was done before) and what it
  printed.
  """
  log = pathlib.Path(f'{workdir}.log')
  with open(log, 'w') as f:
    popen = subprocess.Popen(
      command(workdir, music=music, fields=fields), env=environment(cache, devices=devices),
      cwd=REPOSITORY, stdout=f, stderr=subprocess.STDOUT)
    while popen.poll() is None and len(LOGGED.findall(log.read_text())) < after_lines:
      time.sleep(0.005)
    time.sleep(delay)
    if popen.poll() is None:
      popen.send_signal(number)
    code = popen.wait()
  return code, log.read_text()


def killed_run(workdir, *, rng, starting=False, **shared):
  """Starts the run and kills it: a few steps on, or at any moment of starting up."""
  return stopped_run(
    workdir, signal.SIGKILL, after_lines=0 if starting else rng.randint(1, 12),
    delay=rng.uniform(0, 8) if starting else rng.uniform(0, 0.3), **shared)


def run_with_kills(workdir, *, kills, rng, **shared):
  """The same run, killed `kills` times and then left to finish: (exit code, printed).

  Every fifth kill or so falls into starting up, the others among the steps, where saves in the
  background are under way. A run that ends before all kills are spent counts as failed.
  """
  for i in range(kills):
    starting = rng.random() < 0.2
    code, text = killed_run(workdir, rng=rng, starting=starting, **shared)
    if code != -signal.SIGKILL:
      return code or 1, f'{text}\nended before kill {i + 1} of {kills}: take more steps'
    begun = re.search(r'going on from step (\d+)', text)
    steps = [line['step'] for line in trace(workdir)]
    print(f'kill {i + 1}/{kills} while {"starting" if starting else "training"}: began at step '
          f'{begun[1] if begun else 0}, the last line is of step {max(steps, default=0)}',
          flush=True)
  return run(workdir, **shared)


def trace(workdir):
  """The lines of metrics.jsonl, without what is timing."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True)
           if line.endswith('\n')]
  return [{k: v for k, v in line.items() if not k.startswith('time/')} for line in lines]


def fingerprint(workdir):
  """The fingerprint of the run's averaged weights."""
  return json.loads((pathlib.Path(workdir) / 'snapshot' / 'config.json').read_text())['fingerprint']


def differences(straight, other):
  """What differs between two workdirs, as lines; none if the runs are the same digit for digit."""
  a, b = trace(straight), trace(other)
  lines = []
  if [line['step'] for line in a] != [line['step'] for line in b]:
    lines.append(f'steps {[line["step"] for line in a]} against {[line["step"] for line in b]}')
  for x, y in zip(a, b):
    lines += [f'step {x["step"]} {name}: {x.get(name)!r} against {y.get(name)!r}'
              for name in x.keys() | y.keys() if x.get(name) != y.get(name)]
  if fingerprint(straight) != fingerprint(other):
    lines.append('the weights differ')
  return lines


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--steps', type=int, help='default: enough for the kills')
  parser.add_argument('--seed', type=int, default=0, help='of the moments of the kills')
  args = parser.parse_args()
  args.steps = args.steps or 20 + 12 * args.kills
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory)
    shared = {'music': write_music(directory / 'music'), 'cache': directory / 'cache',
              'fields': {'train.steps': args.steps}}
    straight, killed = directory / 'straight', directory / 'killed'
    print(f'{args.steps} steps without a stop')
    outcomes = [run(straight, **shared)]
    print(f'{args.steps} steps with {args.kills} kills at random moments (seed {args.seed})')
    outcomes.append(run_with_kills(
      killed, kills=args.kills, rng=random.Random(args.seed), **shared))
    for code, text in outcomes:
      if code:
        print(text, f'FAIL: a run ended with exit code {code}', sep='\n')
        return 1
    for x, y in zip(trace(straight), trace(killed)):
      print(f'step {x["step"]:3d}  loss {x["loss"]!r:>20} {y["loss"]!r:>20}  '
            f'{"equal" if x == y else "DIFFERENT"}')
    different = differences(straight, killed)
    print(*different, sep='\n')
    print(f'{"FAIL" if different else "PASS"}: {len(trace(killed))} steps, {args.kills} kills, '
          f'weights {fingerprint(straight)} against {fingerprint(killed)}')
    return 1 if different else 0


if __name__ == '__main__':
  sys.exit(main())
