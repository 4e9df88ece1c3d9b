#!/usr/bin/env python3
"""Puts a trained model into the box: bfloat16, in files below 16 MB, under m2l2/assets/models/NAME.

  python launch/research/ship.py runs/tiny tiny [--box=DIR]

`m2l2.load(NAME)` finds it there; with --box it goes to DIR/NAME instead. MODEL.md beside the weights (data, licences,
cost, figures, limits) is written by hand and kept when the weights are replaced; this command warns if it is missing.
"""

import argparse
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import numpy as np

from m2l2.codec.snapshot import load_snapshot, save_snapshot
from m2l2.errors import UserError

BOX = Path(__file__).parents[2] / 'm2l2' / 'assets' / 'models'
SHARD_BYTES = 15_000_000


def ship(source, name: str, *, box: Path = BOX) -> Path:
  """Writes the snapshot at `source` (or in that workdir) into the box; returns where."""
  if not name.isidentifier():
    raise UserError(f'{name!r} cannot be the name of a model: use letters, digits and _')
  snapshot = load_snapshot(source)
  params = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), snapshot.params)
  places = {'data': 'root', 'train': 'init_from', 'evaluate': 'root'}  # of the machine it was made on
  config = snapshot.config | {part: {**snapshot.config[part], name: ''} for part, name in places.items()
                              if part in snapshot.config}
  save_snapshot(box / name, params=params, config=config, step=snapshot.step, extra=snapshot.extra,
                shard_bytes=SHARD_BYTES)
  return box / name


if __name__ == '__main__':
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('model', help='a snapshot, or the workdir of a run')
  flags.add_argument('name')
  flags.add_argument('--box', type=Path, default=BOX)
  args = flags.parse_args()
  try:
    place = ship(args.model, args.name, box=args.box)
    size = sum(file.stat().st_size for file in place.iterdir())
    print(f'{place}: {size / 1e6:.1f} MB' + ('' if (place / 'MODEL.md').is_file() else '; write MODEL.md beside it'))
  except UserError as error:
    sys.exit(f'ship: {error}')
