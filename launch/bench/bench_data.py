#!/usr/bin/env python3
"""Times the data pipeline against a bare loop of soundfile over the same crops: JSON on stdout.

  python launch/bench/bench_data.py data/music/train data/prepared
  python launch/bench/bench_data.py '3*data/music,1*data/speech' --crops=512 --rounds=5 --threads=4

A place is a value of data.root. Both sides cut the same stereo crops; the bare side only opens, seeks and decodes, in
one thread (segments of records are copied to temporary files for it). Ours makes batches: reading records, checks,
channel policy, resampling, batching. `ratio` is our crops per second over the bare ones, round by round:
`in_one_thread` reads in `next` (num_threads=0), `ratio` with --threads and reading ahead, as in training. Each round
has a new loader, timed from a steady state. Needs the
`train` extra.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import soundfile  # noqa: E402

from m2l2.data import order, records, transforms  # noqa: E402
from m2l2.data.pipeline import make_loader  # noqa: E402
from m2l2.data.sources import find_mixture  # noqa: E402
from m2l2.errors import UserError  # noqa: E402

RATES = (44100, 48000)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('places', nargs='+')
  parser.add_argument('--crop', type=int, default=67072, metavar='N', help='samples (default 67072)')
  parser.add_argument('--crops', type=int, default=256, metavar='N', help='crops a round (default 256)')
  parser.add_argument('--batch', type=int, default=16, metavar='B')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--threads', type=int, default=4)
  parser.add_argument('--prefetch', type=int, default=8)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  try:
    print(json.dumps({place: measure(place, args) for place in args.places}, indent=2))
  except UserError as error:
    print(f'bench_data: {error}', file=sys.stderr)
    return 1
  return 0


def measure(place, args) -> dict:
  mixture = find_mixture(place)
  spec = transforms.CropSpec(crop_samples=args.crop, channels=2, native_rates=RATES, rms_floor=1e-3)
  with tempfile.TemporaryDirectory() as folder:
    # Rounds cut different crops: what one round reads is not the next one's cache, on either side.
    rounds = [draws(mixture, spec, range(r * args.crops, (r + 1) * args.crops), args.seed, folder)
              for r in range(args.rounds + 1)]
    sides = {'bare': [], 'in_one_thread': [], 'ours': []}
    for r, crops in enumerate(rounds):
      first = r * args.crops
      seconds = {
          'bare': time_bare(crops) / len(crops),
          'in_one_thread': time_loader(mixture, args, first=first, num_threads=0, prefetch=0),
          'ours': time_loader(mixture, args, first=first, num_threads=args.threads, prefetch=args.prefetch)}
      if r:  # the first round warms caches
        for name, value in seconds.items():
          sides[name].append(value)
  result = {'items': sum(mixture.counts), 'crops_a_round': args.crops}
  for name, times in sides.items():
    result[name] = {'crops_per_second': 1 / statistics.median(times)}
    if name != 'bare':
      ratios = [bare / own for bare, own in zip(sides['bare'], times, strict=True)]
      result[name]['ratio'] = {'median': statistics.median(ratios), 'min': min(ratios), 'max': max(ratios)}
  return result


def draws(mixture, spec, indices, seed, folder) -> list:
  """(path, start, frames) of the first draw of each sample that has one; drawn anew, it would be another's crop."""
  which, crops = order.Order(counts=mixture.counts, weights=mixture.weights, seed=seed), []
  for index in indices:
    source, number = which(index)
    items = mixture.sources[source]
    try:
      with items.open(number) as item:
        window = transforms.crop_window(
            frames=item.info.frames, rate=item.info.sample_rate, spec=spec, starts=item.starts,
            bits=order.draw_bits(seed=seed, index=index, attempt=0).offset)
    except UserError:
      continue
    path = item.info.path
    if isinstance(items, records.Records):
      path = os.path.join(folder, f'{source}-{number}')
      if not os.path.exists(path):
        with open(path, 'wb') as file:
          file.write(items.file_bytes(number))
    crops.append((path, window.start, window.frames))
  if not crops:
    raise UserError('no crop can be read there')
  return crops


def time_bare(crops) -> float:
  start = time.perf_counter()
  for path, first, frames in crops:
    soundfile.read(path, start=first, frames=frames, dtype='float32', always_2d=True)
  return time.perf_counter() - start


def time_loader(mixture, args, *, first, num_threads, prefetch) -> float:
  """Seconds a crop, from sample `first` on."""
  ahead = min(prefetch, first // args.batch)  # batches taken before
  with make_loader(root=mixture, sample_rate=RATES[0], native_rates=RATES, channels=2, crop_samples=args.crop,
                   batch_size=args.batch, seed=args.seed, start_index=first - ahead * args.batch,
                   num_threads=num_threads, prefetch=prefetch) as batches:
    for _ in range(ahead):
      next(batches)
    start, count = time.perf_counter(), max(1, args.crops // args.batch)
    for _ in range(count):
      next(batches)
    return (time.perf_counter() - start) / (count * args.batch)


if __name__ == '__main__':
  sys.exit(main())
