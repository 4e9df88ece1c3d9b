#!/usr/bin/env python3
"""The training loader on prepared data where every read takes 50 ms longer, as on a network's file system.

  m2l2 prepare --input=MUSIC --output=data/prepared
  python tests/soak/soak_slow_reads.py data/prepared

JSON on stdout; exit 1 unless at least --rate crops a second came, at --cpu-ms of a core or less each, and the bytes
fetched were at most --excess times those of the crops (their share of their segments' FLAC). The reads are slowed and
counted beneath Python and the libraries (slow_reads.c, which takes a C compiler), so any way of reading is measured
alike. Threads and workers are as training chooses them for --rate; --threads and --workers fix them.
"""

import argparse
import ctypes
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time

from m2l2.data import order, transforms
from m2l2.data.pipeline import make_loader
from m2l2.data.sources import find_mixture

HERE = os.path.dirname(os.path.abspath(__file__))
CROP, BATCH = 67072, 16
RATES = (44100, 48000)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('prepared')
  parser.add_argument('--ms', type=int, default=50, help='of each read (default 50)')
  parser.add_argument('--seconds', type=float, default=10)
  parser.add_argument('--threads', type=int, default=-1)
  parser.add_argument('--workers', type=int, default=-1)
  parser.add_argument('--rate', type=float, default=200)
  parser.add_argument('--cpu-ms', type=float, default=8)
  parser.add_argument('--excess', type=float, default=2)
  args = parser.parse_args()
  if 'SLOW_COUNTS' not in os.environ:
    with tempfile.TemporaryDirectory() as folder:
      library, counts = os.path.join(folder, 'slow.so'), os.path.join(folder, 'counts')
      subprocess.run(['cc', '-shared', '-fPIC', '-O2', '-o', library, os.path.join(HERE, 'slow_reads.c'), '-ldl'],
                     check=True)
      with open(counts, 'wb') as file:
        file.write(bytes(16))
      environment = {**os.environ, 'LD_PRELOAD': library, 'SLOW_COUNTS': counts, 'SLOW_MS': str(args.ms),
                     'SLOW_PLACE': os.path.join(os.path.realpath(args.prepared), '')}
      return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
  result = measure(args)
  print(json.dumps(result, indent=2))
  return bool(result['problems'])


def measure(args) -> dict:
  with open(os.environ['SLOW_COUNTS'], 'r+b') as file:
    shared = mmap.mmap(file.fileno(), 16)
    counts = (ctypes.c_int64 * 2).from_buffer(shared)
  mixture = find_mixture(args.prepared)
  opened = list(counts)
  auto = {'demand': args.rate} if -1 in (args.threads, args.workers) else {}
  with make_loader(root=mixture, sample_rate=RATES[0], native_rates=RATES, channels=2, crop_samples=CROP,
                   batch_size=BATCH, seed=0, num_threads=args.threads, num_workers=args.workers, prefetch=8,
                   **auto) as batches:
    for _ in range(12):  # from here on as many are under way as at the end
      next(batches)
    before, cpu, began, taken = list(counts), core_seconds(), time.perf_counter(), 0
    while time.perf_counter() - began < args.seconds:
      next(batches)
      taken += BATCH
    wall, cpu = time.perf_counter() - began, core_seconds() - cpu
    reads, fetched = counts[0] - before[0], counts[1] - before[1]
  own = needed(mixture, range(12 * BATCH, 12 * BATCH + taken))
  figures = {'crops_per_second': taken / wall, 'cpu_ms_per_crop': 1e3 * cpu / taken, 'reads_per_crop': reads / taken,
             'bytes_fetched_over_crops': fetched / own}
  problems = [f'{name} is {figures[name]:.3g}, {word} {limit:g}' for name, word, limit, bad in (
      ('crops_per_second', 'below', args.rate, figures['crops_per_second'] < args.rate),
      ('cpu_ms_per_crop', 'above', args.cpu_ms, figures['cpu_ms_per_crop'] > args.cpu_ms),
      ('bytes_fetched_over_crops', 'above', args.excess, figures['bytes_fetched_over_crops'] > args.excess)) if bad]
  return {'crops': taken, 'ms_a_read': args.ms, 'reads_to_open': opened[0],
          **{name: round(value, 2) for name, value in figures.items()}, 'problems': problems}


def core_seconds() -> float:
  """Of this process and of its workers: those that run, too."""
  ticks = 0
  for pid in os.listdir('/proc'):
    if pid.isdecimal() and pid != str(os.getpid()):
      try:
        with open(f'/proc/{pid}/stat') as file:
          fields = file.read().rpartition(')')[2].split()
      except OSError:  # ended
        continue
      if int(fields[1]) == os.getpid():
        ticks += int(fields[11]) + int(fields[12])
  own = resource.getrusage(resource.RUSAGE_SELF)
  return own.ru_utime + own.ru_stime + ticks / os.sysconf('SC_CLK_TCK')


def needed(mixture, indices) -> float:
  """Bytes of FLAC of the crops of these samples: each a share of its segment's."""
  which, total = order.Order(counts=mixture.counts, weights=mixture.weights, seed=0), 0.
  sizes: dict = {}
  for index in indices:
    source, item = which(index)
    if (source, item) not in sizes:
      items = mixture.sources[source]
      with items.open(item) as audio:
        window = transforms.CropSpec(crop_samples=CROP, channels=2, native_rates=RATES, rms_floor=0)
        frames = transforms.crop_window(
            frames=audio.info.frames, rate=audio.info.sample_rate, spec=window, bits=0).frames
        sizes[source, item] = len(items.file_bytes(item)) * frames / audio.info.frames
    total += sizes[source, item]
  return total


if __name__ == '__main__':
  sys.exit(main())
