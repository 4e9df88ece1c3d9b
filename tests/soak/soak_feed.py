#!/usr/bin/env python3
"""Trains (but for the model) on a folder of fuzzed audio: every file is used or named, in bounded time and memory.

  python tests/soak/soak_feed.py --files=1000 --music=data/music/train

Cuts pieces out of real music, encodes them as WAV, FLAC, OGG, Opus and MP3, damages them (fuzz_audio.mutate), puts
undamaged ones between, and reads the folder with the training loader. JSON on stdout; exit 1 if anything of this
does not hold: no crash, finite batches, no read beyond --seconds, memory bound held, every damaged file either
gave a crop or is named with its reason, no good one ever named.
"""

import argparse
import io
import itertools
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time

from absl import logging as absl_logging
from fuzz_audio import mutate
import numpy as np
import soundfile

from m2l2.data import order, transforms
from m2l2.data.pipeline import make_loader
from m2l2.data.sources import find_audio_files, find_mixture
from m2l2.errors import UserError

FORMATS = {
    'wav': ('WAV', 'PCM_16'), 'f.wav': ('WAV', 'FLOAT'), '24.wav': ('WAV', 'PCM_24'), 'flac': ('FLAC', 'PCM_16'),
    'ogg': ('OGG', 'VORBIS'), 'opus': ('OGG', 'OPUS'), 'mp3': ('MP3', 'MPEG_LAYER_III'), 'aif': ('AIFF', 'PCM_16')}
CROP = 67072


def bodies(music, seed):
  """Endless (ending, bytes) of pieces of 2 to 5 s."""
  files, rng = find_audio_files(music), random.Random(seed)
  for ending, (format, subtype) in itertools.cycle(FORMATS.items()):
    with soundfile.SoundFile(files.path(rng.randrange(len(files)))) as file:
      length = int(rng.uniform(2, 5) * file.samplerate)
      file.seek(rng.randrange(max(1, file.frames - length)))
      audio, rate = file.read(length, always_2d=True), file.samplerate
    if format == 'OGG' and subtype == 'OPUS' and rate != 48000:
      rate = 48000  # its only rate of this kind: the piece plays a little faster
    out = io.BytesIO()
    with soundfile.SoundFile(out, 'w', rate, audio.shape[1], subtype, format=format) as file:
      for start in range(0, len(audio), 4096):
        file.write(audio[start:start + 4096])
    yield ending, out.getvalue()


class Lines(logging.Handler):

  def __init__(self):
    super().__init__()
    self.lines = []

  def emit(self, record):
    self.lines.append(record.getMessage())


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--files', type=int, default=1000)
  parser.add_argument('--music', default='data/music/train')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--seconds', type=float, default=2, help='longest time of one read (default 2)')
  parser.add_argument('--mib', type=float, default=512, help='growth of the resident memory (default 512)')
  args = parser.parse_args()
  log = Lines()
  absl_logging.get_absl_logger().addHandler(log)
  problems = []
  with tempfile.TemporaryDirectory() as folder:
    for number, (ending, body) in zip(range(args.files + args.files // 20), bodies(args.music, args.seed)):
      kind = 'good' if number >= args.files else 'bad'
      with open(os.path.join(folder, f'{kind}{number}.{ending}'), 'wb') as file:
        file.write(mutate(body, args.seed + number) if kind == 'bad' else body)
    mixture = find_mixture(folder)
    files = mixture.sources[0]
    spec = transforms.CropSpec(crop_samples=CROP, channels=2, native_rates=(44100, 48000), rms_floor=1e-3)

    # Each file by itself: how long, and with what end.
    before, slowest, ends = peak_mib(), (0, ''), {'used': 0, 'refused': 0}
    for number in range(len(files)):
      start = time.perf_counter()
      try:
        with files.open(number) as item:
          crop = transforms.read_crop(item, spec=spec, bits=order.draw_bits(seed=args.seed, index=number, attempt=0))
        ends['used'] += 1
        if crop.shape != (2, CROP) or not np.isfinite(crop).all():
          problems.append(f'{files.names[number]}: gave {crop.shape}')
      except UserError as error:
        ends['refused'] += 1
        if '\n' in str(error) or files.names[number] not in str(error):
          problems.append(f'{files.names[number]}: {error}')
        if files.names[number].startswith('good') and 'silent' not in str(error):
          problems.append(f'a good file was refused: {error}')
      slowest = max(slowest, (time.perf_counter() - start, files.names[number]))

    # And as training reads them, three epochs.
    start, rejected, count = time.perf_counter(), 0, 0
    with make_loader(root=folder, sample_rate=44100, native_rates=(44100, 48000), channels=2, crop_samples=CROP,
                     batch_size=16, seed=args.seed) as batches:
      while count < 3 * len(files):
        batch = next(batches)
        rejected, count = rejected + int(batch['rejected'].sum()), count + 16
        if not np.isfinite(batch['audio']).all():
          problems.append(f'batch up to {count} is not finite')
    elapsed, growth = time.perf_counter() - start, peak_mib() - before
  named = {line.split(folder + '/')[1].split(':')[0] for line in log.lines if folder in line}
  for name in named:
    if name.startswith('good') and not any('silent' in line for line in log.lines if f'/{name}:' in line):
      problems.append(f'{name} is good and was named')
  if len(named) < .5 * ends['refused']:
    problems.append(f'{ends["refused"]} files were refused and only {len(named)} named')
  if slowest[0] > args.seconds:
    problems.append(f'{slowest[1]} took {slowest[0]:.1f} s')
  if growth > args.mib:
    problems.append(f'memory grew by {growth:.0f} MiB')
  print(json.dumps({
      'files': len(files), **ends, 'slowest_read_seconds': round(slowest[0], 3), 'slowest': slowest[1],
      'samples': count, 'rejected_draws': rejected, 'named': len(named), 'loader_seconds': round(elapsed, 1),
      'memory_growth_mib': round(growth), 'problems': problems}, indent=2))
  return bool(problems)


def peak_mib() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == 'linux' else 2**20)


if __name__ == '__main__':
  sys.exit(main())
