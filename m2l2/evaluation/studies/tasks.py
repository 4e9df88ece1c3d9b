"""Labelled music for probes: any folder with a labels.csv, and the data sets of the paper's section 5.5.

labels.csv has a header and a row per file: `path` (relative to the folder), `split` (train, valid, test), and a column
for each task, empty if a file has no label. A column called `tags` holds several labels with semicolons between, one
called `key` 'C major' ... 'B minor'; any other column is one class per file.

The user downloads the data sets. TinySOL and Beatport key are read through mirdata (pip install 'm2l2[mir]').
"""

import collections
from collections.abc import Sequence
import csv
import dataclasses
import hashlib
import os
import re

import numpy as np

from m2l2 import files
from m2l2.data import audio_io
from m2l2.errors import UserError

SPLITS = ('train', 'valid', 'test')
PITCH_CLASSES = ('C', 'C#', 'D', 'D#', 'E', 'F', 'F#', 'G', 'G#', 'A', 'A#', 'B')
KEYS = tuple(f'{tonic} {mode}' for mode in ('major', 'minor') for tonic in PITCH_CLASSES)
TOP_TAGS = 50  # of MagnaTagATune


@dataclasses.dataclass(frozen=True)
class Music:
  """Files with labels: `labels[task]` has a string per file, '' if unlabelled; `splits` one of SPLITS per file."""
  name: str
  paths: tuple[str, ...]
  splits: tuple[str, ...]
  labels: dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Task:
  """One task's targets.

  Attributes:
    kind: 'class', 'key' or 'tags'. classes: their names, which the targets index.
    files: int [n], the files that have a label. splits: str [n].
    targets: int32 [n], or for tags float32 [n, classes] of 0 and 1.
  """
  kind: str
  classes: tuple[str, ...]
  files: np.ndarray
  splits: np.ndarray
  targets: np.ndarray


def read(place: str) -> Music:
  """'DIR' with a labels.csv, 'tinysol:DIR', 'beatport:DIR' or 'magnatagatune:DIR'.

  Raises UserError: no such data, damaged, or mirdata is not installed.
  """
  kind, colon, folder = place.partition(':')
  if colon and kind in DATASETS:
    return DATASETS[kind](os.path.expanduser(folder))
  return read_table(place)


def read_table(folder) -> Music:
  path = os.path.join(folder, 'labels.csv')
  if not os.path.isfile(path):
    raise UserError(f'{audio_io.shown(folder)}: no labels.csv there; give a folder that has one, or '
                    f'{", ".join(f"{name}:DIR" for name in DATASETS)}')
  with open(path, encoding='utf-8', newline='') as file:
    table = csv.DictReader(file)
    tasks = [name for name in table.fieldnames or () if name not in ('path', 'split')]
    rows = list(table)
  if not rows or not tasks or not {'path', 'split'} <= set(rows[0]):
    raise UserError(f'{audio_io.shown(path)}: needs the columns path and split, one a task, and rows')
  for number, row in enumerate(rows, start=2):
    if row['split'] not in SPLITS or None in row.values():
      raise UserError(f'{audio_io.shown(path)}, line {number}: split must be one of {", ".join(SPLITS)}, and no column '
                      'may be missing')
  return Music(name=os.path.basename(os.path.normpath(folder)), splits=tuple(row['split'] for row in rows),
               paths=tuple(os.path.normpath(os.path.join(folder, row['path'])) for row in rows),
               labels={name: tuple(row[name] for row in rows) for name in tasks})


def tinysol(folder) -> Music:
  """Single notes of 14 instruments: tasks `instrument` and `pitch_class`; of its five folds 0 tests and 1 validates."""
  tracks = _mirdata('tinysol', folder)
  splits = {0: 'test', 1: 'valid'}
  return Music(
      name='tinysol', paths=tuple(track.audio_path for track in tracks),
      splits=tuple(splits.get(track.split, 'train') for track in tracks),
      labels={'instrument': tuple(track.instrument_full for track in tracks),
              'pitch_class': tuple(PITCH_CLASSES[track.pitch_id % 12] for track in tracks)})


def beatport(folder) -> Music:
  """Electronic dance music: task `key`, for files of one major or minor key; split 70 : 15 : 15 by the file's name."""
  tracks = _mirdata('beatport_key', folder)
  return Music(name='beatport', paths=tuple(track.audio_path for track in tracks),
               splits=tuple(split_of(os.path.basename(track.audio_path)) for track in tracks),
               labels={'key': tuple(key_of(track.key[0]) if len(track.key) == 1 else '' for track in tracks)})


def magnatagatune(folder) -> Music:
  """The 50 most frequent tags; folders 0-b train, c validates, d-f test, clips with none of the tags left out.

  `folder` holds annotations_final.csv and the mp3 files in their folders 0/, 1/, ... f/.
  """
  path = os.path.join(folder, 'annotations_final.csv')
  if not os.path.isfile(path):
    raise UserError(f'{audio_io.shown(path)}: not there; MagnaTagATune comes with it')
  with open(path, encoding='utf-8', newline='') as file:
    table = csv.DictReader(file, delimiter='\t')
    names = [name for name in table.fieldnames or () if name not in ('clip_id', 'mp3_path')]
    rows = [(row['mp3_path'], [name for name in names if row[name] == '1']) for row in table]
  counts = collections.Counter(name for _, tags in rows for name in tags)
  top = sorted(names, key=lambda name: (-counts[name], name))[:TOP_TAGS]
  rows = [(mp3, [name for name in top if name in tags]) for mp3, tags in rows]
  rows = [(mp3, tags) for mp3, tags in rows if tags]
  split = lambda mp3: 'train' if mp3[0] in '0123456789ab' else 'valid' if mp3[0] == 'c' else 'test'
  return Music(name='magnatagatune', paths=tuple(os.path.join(folder, mp3) for mp3, _ in rows),
               splits=tuple(split(mp3) for mp3, _ in rows), labels={'tags': tuple(';'.join(tags) for _, tags in rows)})


DATASETS = {'tinysol': tinysol, 'beatport': beatport, 'magnatagatune': magnatagatune}


def _mirdata(name, folder):
  """The tracks of a data set of mirdata's, in the order of their ids."""
  try:
    import mirdata
  except ModuleNotFoundError as error:
    raise UserError(f"{name} is read by mirdata, and {error.name} is not installed: pip install 'm2l2[mir]'") from error
  try:
    tracks = mirdata.initialize(name, data_home=folder).load_tracks()
    return [tracks[key] for key in sorted(tracks) if os.path.isfile(tracks[key].audio_path)]
  except (OSError, KeyError) as error:
    raise UserError(f'{audio_io.shown(folder)}: not {name} as mirdata lays it out ({error}): '
                    f"mirdata.initialize('{name}', data_home=...).download() makes it") from error


def key_of(text: str) -> str:
  """'Bb minor', 'A# Minor', 'Bbm' -> 'A# minor'; '' for other text."""
  match = re.fullmatch(r'([A-G])([#b]?)(m| minor| major|)', text.strip(), re.IGNORECASE)
  if not match:
    return ''
  tonic, accidental, mode = match.groups()  # a bare letter is major, an m minor, as MIDI files say it
  number = PITCH_CLASSES.index(tonic.upper()) + {'': 0, '#': 1, 'b': -1}[accidental.lower()]
  return f'{PITCH_CLASSES[number % 12]} {"minor" if mode.strip().lower() in ("m", "minor") else "major"}'


def split_of(name: str) -> str:
  """train, valid or test, 70 : 15 : 15, by the hash of a name."""
  share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2 ** 32
  return 'train' if share < .7 else 'valid' if share < .85 else 'test'


def task(music: Music, name: str) -> tuple[Task, list[str]]:
  """A task's targets, and warnings for labels that are left out because no training file has them.

  Raises UserError: a split has no file, or there are fewer than two classes.
  """
  strings = music.labels[name]
  kind = name if name in ('key', 'tags') else 'class'
  several = [set(filter(None, text.split(';'))) if kind == 'tags' else {text} - {''} for text in strings]
  known = {label for labels, split in zip(several, music.splits) if split == 'train' for label in labels}
  if kind == 'key' and (wrong := sorted(set().union(*several) - set(KEYS))):
    raise UserError(f'{music.name}/{name}: {wrong[0]!r} is no key: they are written {KEYS[0]!r} ... {KEYS[-1]!r}')
  classes = KEYS if kind == 'key' else tuple(sorted(known))
  unseen = sorted(set().union(*several) - set(classes))
  warnings = [f'{music.name}/{name}: {label}: no file to train on; left out' for label in unseen]
  files = np.array([i for i, labels in enumerate(several) if labels & set(classes)], np.int64)
  splits = np.array([music.splits[i] for i in files])
  for split in SPLITS:
    if not (splits == split).any():
      raise UserError(f'{music.name}/{name}: no labelled file is for {split}: labels.csv needs train, valid and test')
  if len(classes) < 2:
    raise UserError(f'{music.name}/{name}: {len(classes)} class to train on: there is nothing to tell apart')
  if kind == 'tags':
    targets = np.array([[label in several[i] for label in classes] for i in files], np.float32)
  else:
    targets = np.array([classes.index(next(iter(several[i]))) for i in files], np.int32)
  return Task(kind, classes, files, splits, targets), warnings


def only(task: Task, read: np.ndarray) -> tuple[Task, np.ndarray]:
  """The task over those of its files that are in `read` (numbers, rising), and their places in `read`.

  Raises UserError: a split is left without a file.
  """
  kept = np.isin(task.files, read)
  less = dataclasses.replace(task, files=task.files[kept], splits=task.splits[kept], targets=task.targets[kept])
  for split in SPLITS:
    if not (less.splits == split).any():
      raise UserError(f'no file for {split} can be read')
  return less, np.searchsorted(read, less.files)


def write_table(folder, rows: Sequence[dict]):
  """Writes labels.csv of `rows`, dicts with path, split and the tasks, atomically."""
  path = os.path.join(folder, 'labels.csv')
  with files.whole(path) as aside, open(aside, 'w', encoding='utf-8', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
