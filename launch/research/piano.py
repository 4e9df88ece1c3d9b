#!/usr/bin/env python3
"""Renders any amount of piano music from generated scores, for training and evaluation.

  python launch/research/piano.py --output=data/piano     # 80 pieces of 3 minutes to train on, 12 held out: 4.6 h
  python launch/research/piano.py --output=DIR --pieces=8 --held=2 --seconds=30 --rate=22050

Needs fluidsynth and its General MIDI soundfont (Debian, Ubuntu: apt install fluidsynth fluid-soundfont-gm) and mido.
Each piece has its own score (key, mode, tempo, accompaniment, melody), so held-out pieces are unknown to the model.
Writes DIR/train and DIR/heldout as mono FLAC with a peak of .9; existing files are kept.
"""

import argparse
from concurrent import futures
import os
from pathlib import Path
import shutil
import sys

import mido
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.research import probe_data  # noqa: E402  (the checkout's own)
from m2l2.data import audio_io  # noqa: E402
from m2l2.errors import UserError  # noqa: E402

MODES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 3, 5, 7, 8, 11))
FIGURES = ((0, 1, 2), (0, 2, 1, 2), (0, 1, 2, 1))  # in which order an accompaniment plays its chord
HELD_SEED = 1_000_000
PEAK = 0.9


def score(seed: int, seconds: float) -> mido.MidiFile:
  """A piece: chords of a key with a figure or as blocks, and a melody that wanders through its scale."""
  rng = np.random.default_rng(seed)
  tempo, key, mode = rng.uniform(60, 140), int(rng.integers(12)), MODES[rng.integers(len(MODES))]
  blocks, pedal = rng.random() < 0.4, rng.random() < 0.5
  figure, pace = FIGURES[rng.integers(len(FIGURES))], rng.choice([0.25, 0.5, 1.0])
  degree = lambda n: key + mode[n % 7] + 12 * (n // 7)
  notes, pedals, beat, step = [], [], 0.0, 14
  while beat < seconds * tempo / 60:
    length, root = rng.choice([2.0, 4.0]), int(rng.choice([0, 1, 2, 3, 4, 5], p=[.3, .1, .1, .2, .2, .1]))
    chord = [36 + 12 * rng.integers(2) + degree(root + third) for third in (0, 2, 4)]
    loud = int(rng.integers(35, 100))
    if pedal:
      pedals += [(beat, 127), (beat + length - 0.05, 0)]
    if blocks:
      notes += [(beat, beat + 0.95 * length, note, loud) for note in chord]
    else:
      notes += [(beat + k * pace, beat + (k + 0.9) * pace, chord[figure[k % len(figure)]], max(20, loud - 10))
                for k in range(int(length / pace))]
    at = 0.0
    while at < length:
      lasts = rng.choice([0.25, 0.5, 0.5, 1.0, 1.0, 2.0])
      step = int(np.clip(step + rng.integers(-3, 4), 7, 28))
      if rng.random() < 0.85:
        notes.append((beat + at, beat + at + lasts * rng.uniform(0.5, 1), 48 + degree(step),
                      min(120, loud + int(rng.integers(20)))))
      at += lasts
    beat += length
  return midi(notes, pedals, tempo)


def midi(notes, pedals, tempo) -> mido.MidiFile:
  """notes: (start, end, pitch, velocity), pedals: (start, value), in beats."""
  events = [(end, 0, mido.Message('note_off', note=int(np.clip(pitch, 21, 108)))) for _, end, pitch, _ in notes]
  events += [(at, 1, mido.Message('control_change', control=64, value=value)) for at, value in pedals]
  events += [(start, 2, mido.Message('note_on', note=int(np.clip(pitch, 21, 108)), velocity=loud))
             for start, _, pitch, loud in notes]
  track = mido.MidiTrack([mido.MetaMessage('set_tempo', tempo=round(6e7 / tempo))])
  ticks = 0
  for beat, _, message in sorted(events, key=lambda event: event[:2]):
    track.append(message.copy(time=round(480 * beat) - ticks))
    ticks = round(480 * beat)
  return mido.MidiFile(ticks_per_beat=480, tracks=[track])


def render(piece: mido.MidiFile, path: Path, *, rate: int):
  """Writes the piece as the soundfont's piano plays it, mono; `audio_io` leaves no half file."""
  audio = probe_data.render(piece, probe_data.SOUNDFONTS[0])
  # The soundfont's own level gives spectrograms of RMS .03, where music has .2 and sigma_data expects .5.
  audio *= PEAK / max(np.abs(audio).max(), 1e-9)
  audio_io.write(path, audio_io.resample(audio, from_rate=probe_data.RATE, to_rate=rate), rate)


def require_fluidsynth():
  """Raises UserError: fluidsynth or the soundfont is not installed."""
  if not shutil.which('fluidsynth') or not os.path.isfile(probe_data.SOUNDFONTS[0]):
    raise UserError('fluidsynth or its soundfont is missing: apt install fluidsynth fluid-soundfont-gm')


def main(argv=None):
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--output', type=Path, default=Path('data/piano'))
  for name, default in (('pieces', 80), ('held', 12), ('rate', 11025)):
    flags.add_argument(f'--{name}', type=int, default=default)
  flags.add_argument('--seconds', type=float, default=180.0)
  args = flags.parse_args(argv)
  require_fluidsynth()
  work = [(seed, args.output / 'train' / f'{seed:04d}.flac') for seed in range(args.pieces)]
  work += [(HELD_SEED + seed, args.output / 'heldout' / f'{seed:04d}.flac') for seed in range(args.held)]
  for _, path in work:
    path.parent.mkdir(parents=True, exist_ok=True)
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(lambda item: render(score(item[0], args.seconds), item[1], rate=args.rate),
                  [item for item in work if not item[1].exists()]))
  print(f'{args.output}: {args.pieces} pieces to train on, {args.held} held out, of {args.seconds:g} s and more')


if __name__ == '__main__':
  try:
    main()
  except UserError as error:
    sys.exit(f'piano: {error}')
