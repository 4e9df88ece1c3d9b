"""Makes labelled music for `m2l2 probe` as a substitute for the real data sets: notes, keys and tags.

    apt install fluidsynth fluid-soundfont-gm timgm6mb-soundfont openttd-openmsx
    pip install -e '.[eval]'
    python launch/research/probe_data.py --output=data/probes --music=data/music/train

  notes  single notes of eight instruments: tasks instrument and pitch_class. One soundfont for training and
         validation, another for testing, so that knowing the soundfont does not help.
  keys   pieces of OpenMSX whose MIDI files state their key, in all twelve transpositions: task key. Split by piece;
         again another soundfont to test on.
  tags   tracks of the music in the folder, labelled with their folder (game or album): task tags. Split by
         track. Nothing is copied.

Each is a folder with a labels.csv, written atomically; an existing one is kept. They replace TinySOL, Beatport key and
MagnaTagATune; results on them are comparable only with each other.
"""

import argparse
from concurrent import futures
import glob
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile

import mido
import numpy as np

from m2l2 import files
from m2l2.data import audio_io, sources
from m2l2.errors import UserError
from m2l2.evaluation.studies import tasks

RATE = 44100
TICKS = 480  # a beat of half a second
SOUNDFONTS = ('/usr/share/sounds/sf2/FluidR3_GM.sf2', '/usr/share/sounds/sf2/TimGM6mb.sf2')
MIDI = '/usr/share/games/openttd/baseset/openmsx'
# General MIDI's numbers, from 0.
INSTRUMENTS = {'piano': 0, 'organ': 19, 'guitar': 24, 'violin': 40, 'trumpet': 56, 'saxophone': 65, 'oboe': 68,
               'flute': 73}
PITCHES, VELOCITIES = range(48, 84), (60, 100)
NOTE_SECONDS, KEY_SECONDS, KEY_PLACES = 2., 20., (.3, .6)
DRUMS = 9
TIMEOUT = 300  # seconds for one rendering


def main(argv):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--output', default='data/probes', metavar='DIR')
  parser.add_argument('--only', default='notes,keys,tags', metavar='A,B,...')
  parser.add_argument('--soundfonts', default=','.join(SOUNDFONTS), metavar='A,B', help='to train on, to test on')
  parser.add_argument('--midi', default=MIDI, metavar='DIR', help='MIDI files that state their key')
  parser.add_argument('--music', default='data/music/train', metavar='DIR', help='for tags: a folder of folders')
  parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, metavar='N')
  args = parser.parse_args(argv)
  makers = {'notes': make_notes, 'keys': make_keys, 'tags': make_tags}
  for name in args.only.split(','):
    if name not in makers:
      raise UserError(f'there is no {name!r}: pick from {", ".join(makers)}')
    folder = Path(args.output) / name
    if not folder.is_dir():
      folder.parent.mkdir(parents=True, exist_ok=True)
      with files.whole(folder) as aside:
        partial = Path(aside)
        partial.mkdir()
        tasks.write_table(partial, makers[name](partial, args))
    print(f'{folder}: {len(tasks.read(str(folder)).paths)} files')


# ---- notes ---------------------------------------------------------------------------------------


def make_notes(folder, args) -> list[dict]:
  fonts = find_fonts(args.soundfonts)
  jobs = [(fonts[side], name, side) for side in (0, 1) for name in INSTRUMENTS]
  with futures.ThreadPoolExecutor(args.workers) as pool:
    return [row for rows in pool.map(lambda job: notes_of(folder, *job), jobs) for row in rows]


def notes_of(folder, font, instrument, side) -> list[dict]:
  """All notes of an instrument in one rendering, then cut."""
  played = [(pitch, velocity) for pitch in PITCHES for velocity in VELOCITIES]
  audio = render(scale(INSTRUMENTS[instrument], played), font)
  size, rows = round(NOTE_SECONDS * RATE), []
  for number, (pitch, velocity) in enumerate(played):
    path = f'{"ab"[side]}-{instrument}-{pitch}-{velocity}.flac'
    piece = audio[:, number * size:(number + 1) * size]
    audio_io.write(folder / path, np.pad(piece, ((0, 0), (0, size - piece.shape[1]))), RATE)
    split = 'test' if side else 'valid' if number % 5 == 4 else 'train'
    rows.append({'path': path, 'split': split, 'instrument': instrument,
                 'pitch_class': tasks.PITCH_CLASSES[pitch % 12]})
  return rows


def scale(program, played) -> mido.MidiFile:
  """Each (pitch, velocity) for three quarters of NOTE_SECONDS, one after the other."""
  ticks = round(NOTE_SECONDS * 2 * TICKS)
  track = mido.MidiTrack([mido.Message('program_change', program=program)])
  for number, (pitch, velocity) in enumerate(played):
    track.append(mido.Message('note_on', note=pitch, velocity=velocity, time=ticks // 4 if number else 0))
    track.append(mido.Message('note_off', note=pitch, time=3 * ticks // 4))
  return mido.MidiFile(ticks_per_beat=TICKS, tracks=[track])


# ---- keys ----------------------------------------------------------------------------------------


def make_keys(folder, args) -> list[dict]:
  fonts = find_fonts(args.soundfonts)
  pieces = [(path, key) for path in sorted(glob.glob(os.path.join(args.midi, '**', '*.mid'), recursive=True))
            if (key := stated_key(path))]
  if len(pieces) < 3:
    raise UserError(f'{args.midi}: {len(pieces)} MIDI files there state one key: apt install openttd-openmsx, or name '
                    'a folder with --midi')
  jobs = []
  for number, (path, key) in enumerate(pieces):
    split = ('train', 'train', 'valid', 'train', 'test')[(number * 5 // len(pieces) + number) % 5]
    jobs += [(path, key, split, semitones, place) for semitones in range(-6, 6) for place in KEY_PLACES]
  with futures.ThreadPoolExecutor(args.workers) as pool:
    return list(pool.map(lambda job: transposed(folder, fonts, *job), jobs))


def transposed(folder, fonts, path, key, split, semitones, place) -> dict:
  song = mido.MidiFile(path, clip=True)
  audio = render(excerpt(song, start=place * song.length, seconds=KEY_SECONDS, semitones=semitones),
                 fonts[int(split == 'test')])
  name = f'{Path(path).stem.replace(" ", "-")}{semitones:+d}-{place}.flac'
  audio_io.write(folder / name, audio[:, :round(KEY_SECONDS * RATE)], RATE)
  tonic, mode = key.split()
  moved = tasks.PITCH_CLASSES[(tasks.PITCH_CLASSES.index(tonic) + semitones) % 12]
  return {'path': name, 'split': split, 'key': f'{moved} {mode}'}


def stated_key(path) -> str:
  """The key that a MIDI file states, where it states just one; else ''."""
  try:
    keys = {message.key for track in mido.MidiFile(path, clip=True).tracks for message in track
            if message.type == 'key_signature'}
  except (OSError, ValueError, EOFError, mido.KeySignatureError):
    return ''
  return tasks.key_of(keys.pop()) if len(keys) == 1 else ''


def excerpt(song, *, start, seconds, semitones) -> mido.MidiFile:
  """Seconds of a song from `start` on, drums as they are and all else moved by semitones, at 120 beats a minute.

  What sets the sound (programs, controllers) before `start` counts; notes that began before do not sound.
  """
  track, now, last = mido.MidiTrack(), 0., start
  for message in song:  # in seconds, all tracks merged, tempo changes counted
    now += message.time
    is_note = message.type in ('note_on', 'note_off')
    if now >= start + seconds:
      break
    if message.is_meta or message.type == 'sysex' or (is_note and now < start):
      continue
    at = max(now, start)
    message = message.copy(time=round((at - last) * 2 * TICKS))
    if is_note and message.channel != DRUMS:
      message = message.copy(note=min(max(message.note + semitones, 0), 127))
    track.append(message)
    last += message.time / (2 * TICKS)
  # All sound off: fluidsynth plays on for as long as a note is held.
  track += [mido.Message('control_change', channel=channel, control=120,
                         time=0 if channel else max(0, round((start + seconds - last) * 2 * TICKS)))
            for channel in range(16)]
  return mido.MidiFile(ticks_per_beat=TICKS, tracks=[track])


# ---- tags ----------------------------------------------------------------------------------------


def make_tags(folder, args) -> list[dict]:
  audio_files = sources.find_audio_files(args.music)
  rows = []
  for number, name in enumerate(audio_files.names):
    tag, _, rest = name.partition('/')
    if rest:
      path = os.path.relpath(os.path.abspath(audio_files.path(number)), os.path.abspath(Path(args.output) / 'tags'))
      rows.append({'path': path, 'split': tasks.split_of(name), 'tags': tag})
  if len({row['tags'] for row in rows}) < 2:
    raise UserError(f'{args.music}: tags are the names of the folders in it, and there are not two: '
                    './launch/get_music.sh fetches music')
  return rows


# ---- fluidsynth ----------------------------------------------------------------------------------


def find_fonts(text) -> list[str]:
  fonts = text.split(',')
  missing = [font for font in fonts if not os.path.isfile(font)]
  if len(fonts) != 2 or missing or not shutil.which('fluidsynth'):
    what = missing[0] if missing else 'fluidsynth' if len(fonts) == 2 else 'one of two soundfonts'
    raise UserError(f'{what}: not found; apt install fluidsynth fluid-soundfont-gm timgm6mb-soundfont, or name two '
                    'soundfonts with --soundfonts=A,B')
  return fonts


def render(midi, font) -> np.ndarray:
  """float32 [1, samples] at RATE, at most a peak of 1."""
  with tempfile.TemporaryDirectory() as place:
    song, sound = os.path.join(place, 'song.mid'), os.path.join(place, 'song.wav')
    midi.save(song)
    try:
      done = subprocess.run(['fluidsynth', '-ni', '-q', '-F', sound, '-r', str(RATE), '-g', '0.5', font, song],
                            capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
      raise UserError(f'fluidsynth did not end within {TIMEOUT} s with {font}') from error
    if done.returncode or not os.path.isfile(sound):
      raise UserError(f'fluidsynth failed with {font}: {(done.stderr.strip() or "no message").splitlines()[-1]}')
    audio = audio_io.read(sound)[0].mean(axis=0, keepdims=True)
  return audio / max(1., np.abs(audio).max())


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except UserError as error:
    sys.exit(f'probe_data: {error}')
