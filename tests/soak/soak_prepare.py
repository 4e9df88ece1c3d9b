"""Hard use of `m2l2 prepare`: kills, damaged files, and how time and memory grow.

  python tests/soak/soak_prepare.py kills --kills=10                       # byte-identical after kill -9
  python tests/soak/soak_prepare.py fuzz --files=1000                      # mutated WAV, FLAC, OGG and MP3
  python tests/soak/soak_prepare.py measure --music=data/music/train       # time against input, processes, memory

Prints what was seen and PASS or FAIL; exits with 1 on FAIL. test_prepare.py runs small doses. Not collected
by pytest.
"""

import argparse
from concurrent import futures
import hashlib
import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
FORMATS = ('wav', 'flac', 'ogg', 'mp3')


# ---- running -------------------------------------------------------------------------------------


def start(source, output, *flags, log=None):
  return subprocess.Popen(
    [sys.executable, '-m', 'm2l2', 'prepare', f'--input={source}', f'--output={output}', *flags],
    cwd=REPOSITORY, stdout=log or subprocess.DEVNULL, stderr=subprocess.STDOUT)


def run(source, output, *flags):
  """A run from start to end: exit code, what it printed, seconds, of the processor, and peak MiB in all."""
  with tempfile.TemporaryFile('w+') as log:
    begun, before, peak = time.monotonic(), os.times(), 0
    popen = start(source, output, *flags, log=log)
    while popen.poll() is None:
      peak = max(peak, memory_of_tree(popen.pid))
      time.sleep(0.05)
    seconds, after = time.monotonic() - begun, os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    log.seek(0)
    return popen.returncode, log.read(), seconds, busy, peak


def memory_of_tree(pid):
  """MiB of a process and its children that no other process shares (Pss), now."""
  total = 0
  try:
    children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    for task in pathlib.Path(f'/proc/{pid}/task').iterdir():
      children += (task / 'children').read_text().split()
    for child in {str(pid), *children}:
      for line in pathlib.Path(f'/proc/{child}/smaps_rollup').read_text().splitlines():
        total += int(line.split()[1]) if line.startswith('Pss:') else 0
  except OSError:
    pass  # one of them has just ended
  return total / 1024


def contents(directory):
  """{name: sha256} of everything under a directory."""
  return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
          for path in sorted(pathlib.Path(directory).rglob('*')) if path.is_file()}


# ---- kills ---------------------------------------------------------------------------------------


def write_tones(directory, *, files, seconds=20, sample_rate=44100):
  """Tones in noise, each file its own: from fixed seeds."""
  directory.mkdir(parents=True, exist_ok=True)
  for number in range(files):
    rng = np.random.default_rng(number)
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    audio = 0.2 * np.sin(2 * np.pi * rng.uniform(100, 2000) * t) + 0.02 * rng.normal(size=t.size)
    soundfile.write(directory / f'{number:03d}.wav', audio, sample_rate)
  return directory


def killed_run(source, output, *flags, delay=0.0, after=None, number=signal.SIGKILL):
  """Starts a run and sends it a signal `delay` seconds after a file matching `after` is there (after the start).

  Returns the exit code: -9 of a killed one; 0 of one that was done before.
  """
  popen = start(source, output, *flags)
  while after and popen.poll() is None and not list(pathlib.Path(output).glob(after)):
    time.sleep(0.002)
  try:
    popen.wait(delay)
  except subprocess.TimeoutExpired:
    popen.send_signal(number)
  return popen.wait()


def kills(args, directory):
  music = write_tones(directory / 'music', files=40)
  flags = ('--shard-minutes=0.7', '--validation-fraction=0.2', '--quiet', '--processes=2')
  code, text, seconds, *_ = run(music, directory / 'straight', *flags)
  straight = contents(directory / 'straight')
  print(f'undisturbed: exit code {code}, {seconds:.1f} s, {len(straight)} files', text)
  rng, done, rounds, good = random.Random(args.seed), 0, 0, code == 0
  while done < args.kills:
    rounds += 1
    output = directory / f'killed-{rounds}'
    while done < args.kills:
      delay = rng.uniform(0, seconds)
      if killed_run(music, output, *flags, delay=delay) != -signal.SIGKILL or (output / 'manifest.json').exists():
        break  # too late to do harm
      done += 1
      work = len(list(output.glob('.prepare/*.json')))
      print(f'kill {done}/{args.kills} after {delay:.2f} s: {work} files of work were there', flush=True)
    code, text, *_ = run(music, output, *flags)
    same = contents(output) == straight
    good &= same and code == 0
    print(f'round {rounds}: left to finish, exit code {code}, {"the same bytes" if same else "DIFFERENT"}', text)
  return good


# ---- fuzz ----------------------------------------------------------------------------------------


def write_originals(directory, *, music=None, seconds=3.0):
  """One file in each format; of `music` where given, of tones otherwise. {format: bytes}"""
  directory.mkdir(parents=True, exist_ok=True)
  ogg_files = sorted(path for path in pathlib.Path(music).rglob('*.ogg')) if music else []
  originals = {}
  for number, kind in enumerate(FORMATS):
    if ogg_files:
      path = ogg_files[number * len(ogg_files) // len(FORMATS)]
      rate = soundfile.info(path).samplerate
      audio = soundfile.read(path, start=10 * rate, frames=round(seconds * rate), always_2d=True)[0]
    else:
      rng, rate = np.random.default_rng(number), 44100
      t = np.arange(round(seconds * rate)) / rate
      audio = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 900, 2) * t[:, None]) + 0.02 * rng.normal(size=(t.size, 2))
    path = directory / f'0-good.{kind}'
    soundfile.write(path, np.clip(audio, -1, 1), rate)
    originals[kind] = path.read_bytes()
  return originals


def mutate(data, rng):
  """Damages the bytes of a file in one to three ways."""
  data = bytearray(data)
  for _ in range(rng.randint(1, 3)):
    size = max(1, len(data))
    way = rng.randrange(9)
    place = rng.randrange(min(size, 100)) if rng.random() < 0.5 else rng.randrange(size)  # half of it in the header
    if way == 0:  # one bit
      data[place:place + 1] = bytes([(data[place] if data else 0) ^ 1 << rng.randrange(8)])
    elif way == 1:  # random bytes
      count = rng.choice([1, 4, 16, 500])
      data[place:place + count] = rng.randbytes(count)
    elif way == 2:  # a number at its limit
      number = rng.choice([0, 1, 0xff, 0x7fffffff, 0x80000000, 0xffffffff, 4_000_000_000])
      data[place:place + 4] = struct.pack(rng.choice(['<I', '>I']), number)
    elif way == 3:  # truncated
      del data[place:]
    elif way == 4:  # a piece missing
      del data[place:place + rng.randint(1, 1000)]
    elif way == 5:  # a piece twice
      piece = data[place:place + rng.randint(1, 1000)]
      data[place:place] = piece * rng.choice([1, 2, 50])
    elif way == 6:  # zeros
      count = rng.randint(1, 5000)
      data[place:place + count] = bytes(min(count, max(0, len(data) - place)))
    elif way == 7:  # something in between
      data[place:place] = rng.randbytes(rng.randint(1, 300))
    else:  # two pieces change places
      other, count = rng.randrange(size), rng.randint(1, 400)
      data[place:place + count], data[other:other + count] = data[other:other + count], data[place:place + count]
  return bytes(data)


def write_fuzzed(directory, *, files, seed=0, music=None):
  """`files` damaged files beside one good file of each format; returns the good files' names."""
  originals = write_originals(directory, music=music)
  rng = random.Random(seed)
  for number in range(files):
    kind = rng.choice(FORMATS)
    ending = rng.choice(FORMATS) if rng.random() < 0.1 else kind
    (directory / f'1-bad-{number:04d}.{ending}').write_bytes(mutate(originals[kind], rng))
  return sorted(f'0-good.{kind}' for kind in FORMATS)


def unaccounted(directory, output, good):
  """Lines about files that are neither used nor named in the report, or good and not used."""
  import tensorflow_datasets as tfds
  data = tfds.builder_from_directory(output).as_data_source()
  used = {record['source'].decode() for split in data.values() for record in split}
  report = json.loads((pathlib.Path(output) / 'report.json').read_text())
  named = {row['file'] for row in report['skipped'] + report['silent_segments']}
  there = {path.name for path in pathlib.Path(directory).iterdir()}
  return ([f'{name}: neither used nor named' for name in sorted(there - used - named)]
          + [f'{name}: good, but not used' for name in good if name not in used])


def fuzz(args, directory):
  good = write_fuzzed(directory / 'music', files=args.files, seed=args.seed, music=args.music)
  code, text, seconds, _, peak = run(directory / 'music', directory / 'out', '--timeout=20', '--processes=2')
  print(text.strip(), f'exit code {code}, {seconds:.1f} s, peak {peak:.0f} MiB', sep='\n')
  if code:
    return False
  report = json.loads((directory / 'out' / 'report.json').read_text())
  reasons = {}
  for row in report['skipped']:
    kind = ' '.join(word for word in row['reason'].split() if not any(c.isdigit() for c in word))[:70]
    reasons[kind] = reasons.get(kind, 0) + 1
  for kind, count in sorted(reasons.items(), key=lambda item: -item[1])[:25]:
    print(f'{count:5d}  {kind}')
  lost = unaccounted(directory / 'music', directory / 'out', good)
  print(*lost, f'{args.files} damaged files: {len(report["skipped"])} skipped, {report["used"]} used of '
        f'{report["files"]}, {len(lost)} unaccounted', sep='\n')
  crashed = sum('crashes' in row['reason'] or 'hangs' in row['reason'] for row in report['skipped'])
  print(f'{crashed} of them crashed or hung the decoder')
  return not lost and 'Traceback' not in text and peak < 1500


# ---- measure -------------------------------------------------------------------------------------


def bare(paths):
  """Decodes and encodes files, writes what comes of it, and nothing else."""
  import io
  for path in paths:
    with soundfile.SoundFile(path) as file, tempfile.TemporaryFile(dir=path.parent) as out:
      for block in file.blocks(blocksize=20 * file.samplerate, dtype='float32', always_2d=True):
        data = io.BytesIO()
        soundfile.write(data, np.clip(np.rint(block * 32768), -32768, 32767).astype(np.int16),
                        file.samplerate, format='FLAC', subtype='PCM_16')
        out.write(data.getbuffer())


def bare_seconds(paths, processes):
  """Time and processor time of `processes` independent loops over equal shares of the files (and no peak)."""
  before = os.times()
  with futures.ProcessPoolExecutor(processes) as pool:
    list(pool.map(len, [()] * processes))  # started
    begun = time.monotonic()
    list(pool.map(bare, shares(paths, processes)))
    wall = time.monotonic() - begun
  after = os.times()
  return wall, after.children_user + after.children_system - before.children_user - before.children_system, 0


def shares(paths, count):
  """The files in `count` parts of about equal length."""
  parts, lengths = [[] for _ in range(count)], [0.] * count
  for path in sorted(paths, key=lambda path: -soundfile.info(path).duration):
    least = lengths.index(min(lengths))
    parts[least].append(path)
    lengths[least] += soundfile.info(path).duration
  return parts


def sparse_wav(path, gigabytes):
  """A WAV (RF64) of silence that takes no room on the disk."""
  size = int(gigabytes * 2**30) // 4 * 4
  with open(path, 'wb') as file:
    file.write(b'RF64\xff\xff\xff\xffWAVE' + b'ds64' + struct.pack('<IQQQI', 28, size + 72, size, size // 4, 0)
               + b'fmt ' + struct.pack('<IHHIIHH', 16, 1, 2, 44100, 176400, 4, 16) + b'data\xff\xff\xff\xff')
    file.truncate(file.tell() + size)


def measure(args, directory):
  every = sorted(pathlib.Path(args.music).resolve().rglob('*.ogg'), key=lambda p: hashlib.md5(bytes(p)).digest())
  chosen, seconds = [], {}
  for path in every:
    if sum(seconds.values()) < args.minutes * 60:
      seconds[path] = soundfile.info(path).duration
      chosen.append(path)
  halves = {'half': shares(chosen, 2)[0], 'whole': chosen}
  for name, paths in halves.items():
    (directory / name).mkdir()
    for number, path in enumerate(paths):
      (directory / name / f'{number:04d}.ogg').symlink_to(path)
  length = {name: sum(seconds[path] for path in paths) for name, paths in halves.items()}
  share = length['half'] / length['whole']
  print(f'{len(chosen)} files, {length["whole"] / 60:.1f} min; the half has {share:.3f} of it')

  number = iter(range(10**6))

  def once(name, *flags):
    code, text, *figures = run(directory / name, directory / f'out-{next(number)}', '--shard-minutes=6', *flags)
    assert code == 0, text
    return figures

  linked = sorted((directory / 'whole').iterdir())
  measurements = {
    'bare x 1': lambda: bare_seconds(linked, 1), 'bare x 2': lambda: bare_seconds(linked, 2),
    'prepare x 1': lambda: once('whole', '--processes=1'), 'prepare x 2': lambda: once('whole', '--processes=2'),
    'prepare half x 2': lambda: once('half', '--processes=2')}
  best = {}
  for _ in range(args.repeats):  # in turn, so that other load meets all alike
    for name, do in measurements.items():
      wall, busy, peak = do()
      print(f'{name}: {wall:.1f} s, {busy:.1f} s of processors', f'peak {peak:.0f} MiB' if peak else '', flush=True)
      best[name] = [min(pair) for pair in zip(best.get(name, (wall, busy, peak)), (wall, busy, peak))]
  growth, busy_growth = ((best['prepare x 2'][kind] / best['prepare half x 2'][kind]) * share for kind in (0, 1))
  ours, theirs = (best[f'{what} x 1'][0] / best[f'{what} x 2'][0] for what in ('prepare', 'bare'))
  print(f'twice the input: {2 * growth:.2f} times the time, {2 * busy_growth:.2f} that of processors (2 within 15 %)')
  print(f'speed-up by 2 processes {ours:.2f}, of bare loops {theirs:.2f}: {ours / theirs:.2f} of it (aim 0.9)')
  print(f'processor time against the bare loop: {best["prepare x 1"][1] / best["bare x 1"][1]:.2f}')
  (directory / 'long').mkdir()
  sparse_wav(directory / 'long' / 'long.wav', args.gigabytes)
  wall, _, peak = once('long', '--processes=1', '--silence-dbfs=-inf')
  small = best['prepare x 1'][2]
  print(f'one file of {args.gigabytes:g} GiB: {wall:.1f} s, peak {peak:.0f} MiB against {small:.0f} MiB for songs')
  return abs(growth - 1) < 0.15 and ours / theirs >= 0.9 and peak < small + 100


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('what', choices=('kills', 'fuzz', 'measure'))
  parser.add_argument('--kills', type=int, default=10)
  parser.add_argument('--files', type=int, default=1000, help='to damage')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--music', help='to take the audio from (fuzz: else tones)')
  parser.add_argument('--minutes', type=float, default=180, help='of music to measure with')
  parser.add_argument('--repeats', type=int, default=1, help='of the measurements, of which the best counts')
  parser.add_argument('--gigabytes', type=float, default=4.5, help='of the longest file')
  parser.add_argument('--scratch', help='where to work (default: the temporary directory)')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.scratch) as directory:
    good = globals()[args.what](args, pathlib.Path(directory))
  print('PASS' if good else 'FAIL')
  return 0 if good else 1


if __name__ == '__main__':
  sys.exit(main())
