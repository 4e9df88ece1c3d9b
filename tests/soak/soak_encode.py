"""Kills encode-dataset at random moments, goes on each time, compares the bytes with an undisturbed run's.

  python tests/soak/soak_encode.py --kills=10
  python tests/soak/soak_encode.py --speed --music=data/music/heldout --checkpoint=runs/tiny

First with one process of eight devices, then as two real processes of four: killed (either of them, or both), and gone
on with. Prints PASS or FAIL; exits with 1 on FAIL. With --speed instead: seconds of audio a second, against `m2l2
encode` called for file after file and against one process that calls it for all, in turn. Not collected by pytest.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / 'tests'))

from test_codec import make_snapshot, music  # noqa: E402  (a script finds them by the line above)
from test_hosts import flags, started  # noqa: E402

SHARDS = 24


def write_songs(folder, *, count=72):
  """Files of different lengths, rates and channel counts, a damaged one in eight."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(count):
    rate, channels = int(rng.choice([22050, 44100, 48000])), int(rng.integers(1, 3))
    path = folder / f'{i:02d}.flac'
    soundfile.write(path, music(int(rng.integers(1, 400_000)), channels=channels, sample_rate=rate, seed=i).T, rate)
    if i % 8 == 7:
      path.write_bytes(path.read_bytes()[:-2000])
  return folder


def environment(cache, *, devices):
  return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(REPOSITORY), 'JAX_NUM_CPU_DEVICES': str(devices),
          'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}


def command(base, output, *more):
  return [sys.executable, '-m', 'm2l2', 'encode-dataset', f'--source={base / "songs"}',
          f'--checkpoint={base / "model"}', f'--output={output}', f'--shards={SHARDS}', *more]


def digest(output):
  return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob('*') if path.is_file()}


def done(output):
  return len(list((output / 'shards').glob('*.json')))


def run(base, output, *, processes, kill=None, devices=None):
  """One run; `kill` (processes) -> None is called once they were started. Returns the exit statuses."""
  # Of two of which one is killed before they met, the other waits this long.
  own = [(*more, '--start_timeout=120') for more in flags(processes)] if processes > 1 else [()]
  where = environment(base / 'cache', devices=devices or 8 // processes)
  with started([command(base, output, *more) for more in own], [where] * processes, log=base / output.name) as running:
    if kill:
      kill(running)
    return running.statuses(), running.show()


def killed(base, output, *, processes, kills, rng):
  """Kills so often, each time a little on; then lets it finish. The statuses of the last run."""
  for i in range(kills):
    target, pause = done(output) + int(rng.integers(0, 2)), rng.uniform(0, 0.3)
    early = rng.random() < 0.2
    victims = [0] if processes == 1 else [[0], [1], [0, 1]][rng.integers(3)]

    def kill(running):
      end = time.monotonic() + (rng.uniform(0, 4) if early else 300)
      while time.monotonic() < end and done(output) <= target and all(p.poll() is None for p in running.all):
        time.sleep(0.002)
      time.sleep(0 if early else pause)
      for victim in victims:
        running.all[victim].kill()

    statuses, text = run(base, output, processes=processes, kill=kill)
    print(f'kill {i + 1}/{kills} of process {" and ".join(map(str, victims))} of {processes}: {done(output)} of '
          f'{SHARDS} shards done, statuses {statuses}', flush=True)
    if not any(status == -signal.SIGKILL for status in statuses):
      if done(output) == SHARDS:
        print('  (it was done before the kill)')
        break
      return statuses, text
  return run(base, output, processes=processes)


def soak(base, *, kills, seed):
  rng = np.random.default_rng(seed)
  write_songs(base / 'songs')
  make_snapshot(base / 'model')
  passed = True
  for processes, count in ((1, kills), (2, max(1, kills // 3))):
    # By one process with as many devices as each of those: the CPU's products are divided among as many threads as a
    # process has devices, and a latent in ten thousand is rounded the other way where that number differs.
    straight = base / f'straight-{processes}'
    statuses, text = run(base, straight, processes=1, devices=8 // processes)
    assert statuses == [0], text
    expected = digest(straight)
    print(f'undisturbed: {sum(map(len, expected.values())):,} bytes in {len(expected)} files')
    output = base / f'killed-{processes}'
    statuses, text = killed(base, output, processes=processes, kills=count, rng=rng)
    digests = digest(output)
    differing = sorted(name for name in digests.keys() | expected.keys() if digests.get(name) != expected.get(name))
    good = statuses == [0] * processes and not differing
    print(f'{processes} process(es): {"equal, byte by byte" if good else f"differs: {differing}, {statuses} {text}"}')
    passed &= good
  return passed


# ---- speed ---------------------------------------------------------------------------------------

ALL_IN_ONE = """
import sys
from m2l2 import cli
checkpoint, folder, *paths = sys.argv[1:]
for i, path in enumerate(paths):
  assert cli.main(['encode', path, f'{folder}/{i}.safetensors', f'--checkpoint={checkpoint}', '--quiet']) == 0
"""


def timed(*argv):
  began = time.monotonic()
  subprocess.run(argv, check=True, cwd=REPOSITORY, env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
  return time.monotonic() - began


def speed(base, *, folder, checkpoint, count, rounds, more):
  """Wall seconds, start and compiling included, of the same files by the three ways, in turn."""
  names = sorted(path for path in pathlib.Path(folder).rglob('*') if path.suffix in ('.ogg', '.flac', '.wav', '.mp3'))
  names = [names[i] for i in np.linspace(0, len(names) - 1, count).astype(int)]
  (base / 'songs').mkdir()
  for i, name in enumerate(names):
    (base / 'songs' / f'{i}{name.suffix}').symlink_to(name.resolve())
  seconds = sum(soundfile.info(name).duration for name in names)
  print(f'{len(names)} files, {seconds:.0f} s of audio')
  m2l2 = (sys.executable, '-m', 'm2l2')
  for number in range(rounds):
    each = sum(timed(*m2l2, 'encode', name, base / f'{i}.safetensors', f'--checkpoint={checkpoint}', '--quiet')
               for i, name in enumerate(names))
    single = timed(sys.executable, '-c', ALL_IN_ONE, checkpoint, base, *names)
    bulk = timed(*m2l2, 'encode-dataset', f'--source={base / "songs"}', f'--checkpoint={checkpoint}',
                 f'--output={base / f"out-{number}"}', '--quiet', *more)
    print(f'round {number + 1}: encode, file by file {seconds / each:.1f}x real time; encode, one process '
          f'{seconds / single:.1f}x; encode-dataset {seconds / bulk:.1f}x: {each / bulk:.2f} and {single / bulk:.2f} '
          'times as fast', flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=10)
  parser.add_argument('--seed', type=int, default=random.SystemRandom().randrange(2 ** 31))
  parser.add_argument('--speed', action='store_true')
  parser.add_argument('--music', default='data/music/heldout')
  parser.add_argument('--checkpoint', help='of --speed')
  parser.add_argument('--count', type=int, default=6, help='files for --speed')
  parser.add_argument('--rounds', type=int, default=2)
  args, more = parser.parse_known_args()
  with tempfile.TemporaryDirectory() as folder:
    base = pathlib.Path(folder)
    if args.speed:
      speed(base, folder=args.music, checkpoint=os.path.abspath(args.checkpoint), count=args.count, rounds=args.rounds,
            more=more)
      return 0
    print('seed', args.seed)
    passed = soak(base, kills=args.kills, seed=args.seed)
  print('PASS' if passed else 'FAIL')
  return 0 if passed else 1


if __name__ == '__main__':
  sys.exit(main())
