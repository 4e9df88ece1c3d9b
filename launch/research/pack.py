#!/usr/bin/env python3
"""Packs hours of music into megabytes: an excerpt of each file as mono Opus, for machines without network.

  python launch/research/pack.py --input=data/music/train --output=data/pack

  --hours=H        of music in total (default 2.5), equally from all folders and from all files of a folder, as far as
                   they last; from the middle of each file
  --megabytes=M    limit of the pack's size (default 39); it determines the bit rate, at most 64 kbit/s
  --shares=A=W,... weight of a folder's time (default 1), such as warzone2100-music=0.5
  --leave-out=F    fraction of the files to leave out (default 0.08): those that `m2l2 prepare` with
                   --validation-fraction=F puts aside, so that no model is trained on files that recipes are chosen by

Files are OUTPUT/FOLDER/NAME.opus, 48 kHz, the mean of the channels; pack.json names sources, places and seconds.
Written whole or not at all. What cannot be read is named and left out. `--config.data.root=OUTPUT` trains on it. Opus
keeps the music's licence: pass on data/music/licences with it.
"""

import argparse
import json
import os
from pathlib import Path
import shutil
import sys
import tempfile

import numpy as np
import soundfile
import tqdm

from m2l2.data import audio_io, sources
from m2l2.data.order import SPLITS, split_of
from m2l2.errors import UserError

RATE = 48000
LEAST, MOST = 6.0, 256.0  # kbit/s that libsndfile's compression levels 1 and 0 stand for, a channel
SAFETY = 0.93             # of the size: Opus holds its rate on average only, and files have headers
BEST = 64.0               # kbit/s; more would be spent on nothing
SHORTEST = 5.0            # seconds that a file must have


def main(argv):
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--input', required=True)
  flags.add_argument('--output', required=True)
  flags.add_argument('--hours', type=float, default=2.5)
  flags.add_argument('--megabytes', type=float, default=39)
  flags.add_argument('--shares', default='')
  flags.add_argument('--leave-out', type=float, default=0.08)
  args = flags.parse_args(argv)
  if not args.hours > 0:
    raise UserError(f'--hours={args.hours:g}: it must be more than 0')
  if not 0 <= args.leave_out < 1:
    raise UserError(f'--leave-out={args.leave_out:g}: it must be 0 or more and less than 1')
  output = Path(args.output)
  if output.exists():
    raise UserError(f'{output} is there already: move it away, or name another --output')
  files = find(Path(args.input), args.leave_out)
  plan = share_out(files, 3600 * args.hours, read_shares(args.shares, files))
  seconds = sum(sum(of.values()) for of in plan.values())
  kbps = min(BEST, 8e-3 * SAFETY * 1e6 * args.megabytes / seconds)
  if kbps < LEAST:
    raise UserError(f'{seconds / 3600:.1f} h in --megabytes={args.megabytes:g} would be {kbps:.1f} kbit/s, and Opus '
                    f'needs {LEAST:g}: take fewer --hours or more --megabytes')
  output.parent.mkdir(parents=True, exist_ok=True)
  part = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', dir=output.parent))
  try:
    rows = [row for folder, of in plan.items() for row in write(part, args.input, folder, of, kbps)]
    (part / 'pack.json').write_text(json.dumps({'kbps': round(kbps, 1), 'files': rows}, indent=1) + '\n')
    part.chmod(0o755)
    os.rename(part, output)
  except BaseException:
    shutil.rmtree(part)
    raise
  size = sum(file.stat().st_size for file in output.rglob('*') if file.is_file())
  print(f'{output}: {len(rows)} files, {seconds / 3600:.2f} h, {kbps:.0f} kbit/s, {size / 1e6:.1f} MB')


def find(place: Path, leave_out: float) -> dict[str, dict[str, float]]:
  """-> {folder: {file below the place: seconds}}, in order; without what is left out, too short or unreadable."""
  if not place.is_dir():
    raise UserError(f'--input={place} is not a folder')
  tracks = {}
  for path in sorted(place.rglob('*')):
    name = path.relative_to(place).as_posix()
    if path.suffix.lower() not in sources.EXTENSIONS or not path.is_file() or split_of(name, leave_out) != SPLITS[0]:
      continue
    try:
      info = audio_io.info(path)
    except UserError as error:
      print(f'pack: left out: {error}', file=sys.stderr)
      continue
    if info.frames >= SHORTEST * info.sample_rate:
      tracks.setdefault(name.rpartition('/')[0].partition('/')[0], {})[name] = info.frames / info.sample_rate
  if not tracks:
    raise UserError(f'--input={place}: no readable music of {SHORTEST:g} s or more there')
  return tracks


def read_shares(text: str, folders) -> dict[str, float]:
  shares = dict.fromkeys(folders, 1.0)
  for word in filter(None, text.split(',')):
    name, _, value = word.partition('=')
    if name not in shares:
      raise UserError(f'--shares: there is no folder {name!r} of music: it is one of {", ".join(shares)}')
    try:
      shares[name] = float(value)
    except ValueError:
      shares[name] = -1.0
    if not 0 <= shares[name] < float('inf'):
      raise UserError(f'--shares: {word!r} must be FOLDER=WEIGHT, with a weight of 0 or more')
  return shares


def share_out(files, seconds: float, shares) -> dict[str, dict[str, float]]:
  """Seconds of each file, so that folders get time by their shares and the files of one alike, as far as they last."""
  folders = level({name: sum(of.values()) for name, of in files.items()}, seconds, shares)
  plan = {name: level(of, folders[name], dict.fromkeys(of, 1.0)) for name, of in files.items()}
  return {name: {file: time for file, time in of.items() if time > 0} for name, of in plan.items()}


def level(limits: dict[str, float], total: float, weights: dict[str, float]) -> dict[str, float]:
  """Shares out a total by weights; what goes over one's limit goes to the others."""
  given, left = {}, dict(limits)
  while left:
    each = (total - sum(given.values())) / max(sum(weights[name] for name in left), 1e-9)
    full = {name: limit for name, limit in left.items() if limit <= each * weights[name]}
    if not full:
      return given | {name: each * weights[name] for name in left}
    given |= full
    left = {name: limit for name, limit in left.items() if name not in full}
  return given


def write(part: Path, place, folder: str, of: dict[str, float], kbps: float):
  """Encodes a folder's excerpts; yields what pack.json says of each."""
  compression = float(np.clip((MOST - kbps) / (MOST - LEAST), 0, 1))
  for name, seconds in tqdm.tqdm(of.items(), desc=folder or 'music', unit='file', disable=not sys.stderr.isatty()):
    source = Path(place) / name
    try:
      info = audio_io.info(source)
      frames = min(round(seconds * info.sample_rate), info.frames)
      start = (info.frames - frames) // 2
      audio, _ = audio_io.read(source, start=start, frames=frames)
    except UserError as error:
      print(f'pack: left out: {error}', file=sys.stderr)
      continue
    mono = audio.mean(axis=0, keepdims=True)
    mono = audio_io.resample(mono, from_rate=info.sample_rate, to_rate=RATE)
    target = part / f'{name}.opus'  # after the whole name: a.ogg and a.mp3 are two pieces
    target.parent.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(target, 'w', RATE, 1, 'OPUS', format='OGG', compression_level=compression) as file:
      for begin in range(0, mono.shape[1], RATE):
        file.write(mono[0, begin:begin + RATE])
    yield {'source': name, 'start': start / info.sample_rate, 'seconds': mono.shape[1] / RATE}


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except UserError as error:
    sys.exit(f'pack: {error}')
