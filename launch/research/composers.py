#!/usr/bin/env python3
"""Renders pieces of composers as `piano.py` renders its own: music that the model `piano` has never met.

  pip install music21                                      # which has the scores
  python launch/research/composers.py --output=data/composers
  python launch/research/composers.py --prelude=m2l2/assets/models/piano/prelude.ogg     # the clip in the box alone

Needs what piano.py needs, and music21, whose corpus holds the scores (the clip's four bars stand below). The works are
out of copyright; the encodings have licences of their own, so the renderings are for measuring. Every voice is played
on the piano. Writes OUTPUT/NAME.flac: mono, 11.025 kHz, a peak of .9, at most 100 s of each. excerpts/composers.txt
lists three excerpts of each.
"""

import argparse
from concurrent import futures
import os
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.research import piano  # noqa: E402  (the checkout's own)
from m2l2.errors import UserError  # noqa: E402

SECONDS = 100.0
RATE = 11025
LOUD, QUIET = 78, 64  # velocities of the highest voice of a beat and of the others
# Scores of music21's corpus, with quarter notes a minute: the encodings have few tempi.
PIECES = {
    'bach/bwv846': 66, 'bach/bwv66.6': 72, 'bach/bwv269': 80, 'bach/bwv347': 76,
    'beach/prayer_of_a_tired_child': 60, 'beethoven/opus18no1/movement2.mxl': 70, 'beethoven/opus59no1/movement3': 60,
    'chopin/mazurka06-2': 150, 'corelli/opus3no1/1grave.xml': 60, 'cpebach/h186': 90,
    'handel/rinaldo/lascia_chio_pianga': 80, 'haydn/opus74no1/movement2': 90, 'joplin/maple_leaf_rag': 90,
    'monteverdi/madrigal.3.1.mxl': 110, 'mozart/k545': 120, 'mozart/k458/movement3': 50, 'palestrina/Agnus_0': 110,
    'schubert/Lindenbaum': 80, 'schumann_clara/polonaise_op1n1': 90, 'schumann_robert/dichterliebe_no2': 56}

# The first bars of the prelude in C of Bach's Well-Tempered Clavier: two notes that are held, three that return.
PRELUDE = ((60, 64, 67, 72, 76), (60, 62, 69, 74, 77), (59, 62, 67, 74, 77), (60, 64, 67, 72, 76))


def names() -> dict[str, str]:
  """{piece: the name of its file}."""
  return {piece: piece.removesuffix('.mxl').removesuffix('.xml').replace('/', '_') for piece in PIECES}


def notes_of(piece: str) -> list[tuple[float, float, int, int]]:
  """(start, end, pitch, velocity) in beats, of all voices."""
  from music21 import corpus  # here: it takes seconds to import
  score = corpus.parse(piece)
  score = score.scores[0] if hasattr(score, 'scores') and score.scores else score
  sounds = [(float(note.offset), float(note.quarterLength), pitch.midi)
            for note in score.stripTies().flatten().notes for pitch in note.pitches]
  sounds = [(start, length, pitch) for start, length, pitch in sounds if length > 0]  # without grace notes
  highest = {}
  for start, _, pitch in sounds:
    highest[start] = max(pitch, highest.get(start, 0))
  return [(start, start + 0.97 * length, pitch, LOUD if pitch == highest[start] else QUIET)
          for start, length, pitch in sounds]


def render(piece: str, path: Path):
  tempo = PIECES[piece]
  last = SECONDS * tempo / 60
  notes = [note for note in notes_of(piece) if note[0] < last - 4]
  piano.render(piano.midi(notes, (), tempo), path, rate=RATE)


def prelude() -> list[tuple[float, float, int, int]]:
  """(start, end, pitch, velocity) in beats: sixteen sixteenths a bar."""
  notes = []
  for half, bar in enumerate(bar for bar in PRELUDE for _ in range(2)):
    for at, pitch in enumerate((*bar, *bar[2:])):
      notes.append((2 * half + at / 4, 2 * half + (2 if at < 2 else (at + 0.97) / 4), pitch, LOUD))
  return notes


def main(argv=None):
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--output', type=Path, default=Path('data/composers'))
  flags.add_argument('--prelude', type=Path)
  args = flags.parse_args(argv)
  piano.require_fluidsynth()
  if args.prelude:
    piano.render(piano.midi(prelude(), (), PIECES['bach/bwv846']), args.prelude, rate=RATE)
    return
  args.output.mkdir(parents=True, exist_ok=True)
  work = {piece: args.output / f'{name}.flac' for piece, name in names().items()}
  with futures.ProcessPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(render, *zip(*[item for item in work.items() if not item[1].exists()], strict=True)))
  print(f'{args.output}: {len(work)} pieces')


if __name__ == '__main__':
  try:
    main()
  except UserError as error:
    sys.exit(f'composers: {error}')
