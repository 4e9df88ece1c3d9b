#!/usr/bin/env python3
"""Initial weights: the linear sketch (variants.sketch) as the principal components of the music's envelopes.

  python launch/research/pca_start.py --output=runs/start --config=configs/tiny.py --config.data.root=PREPARED
  m2l2 train --config=configs/tiny.py --config.data.root=PREPARED --config.train.init_from=runs/start --workdir=...

  --crops=N    crops of two chunks of the training music (default 5000)

Components are ordered by variance, 64 per embedding, each with RMS 0.4. The envelope's bias is set to the quantile that
training aims at. All other weights are initialised as in training. Needs the `eval` extra, too (scikit-learn).
"""

import argparse
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from m2l2 import build
from m2l2.codec.snapshot import save_snapshot
from m2l2.data.pipeline import make_loader
from m2l2.errors import UserError
from m2l2.evaluation.studies.baselines import fit_pca
from m2l2.training import main as command
from m2l2.variants import envelope

RMS = 0.4
BATCH = 10


def run(argv):
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--output', required=True)
  flags.add_argument('--crops', type=int, default=5000)
  args, rest = flags.parse_known_args(argv)
  config = command.parse(['pca_start', *rest], required=('config',)).config
  functions = build.step_functions(config)
  if not functions.network.arch.sketch_cells:
    raise UserError('this config has no linear sketch to be set: variants.sketch.cells=(bands, stretches)')
  params = jax.jit(functions.network.init)(jax.random.key(config.seed))
  params = with_components(params, *read(config, functions, args.crops))
  save_snapshot(args.output, params=jax.device_get(params), config=json.loads(json.dumps(config.to_dict())), step=0)


def read(config, functions, crops):
  """-> (mean log-magnitudes of the sketch's cells [chunks, *grid], a few whole chunks of them [n, F, T, C])."""
  if crops < BATCH:
    raise UserError(f'--crops={crops}: take {BATCH} or more (5,000 make a good start)')
  arch, rep = functions.network.arch, build.representation(config.model)
  grid = (*arch.sketch_cells, arch.channels)

  @jax.jit
  def analyse(audio):
    whole = envelope.log_magnitude(rep.analyse(audio)).reshape(-1, arch.bins, arch.frames, arch.channels)
    return envelope.band_means(whole, grid), whole

  cells, whole = [], []
  with make_loader(root=config.data.root, source=config.data.source, split=config.data.split,
                   sample_rate=functions.sample_rate, native_rates=functions.native_rates,
                   channels=functions.channels, crop_samples=functions.crop_samples, batch_size=BATCH,
                   seed=config.seed + 1) as loader:
    for number in range(crops // BATCH):
      small, large = analyse(next(loader)['audio'])
      cells.append(np.asarray(small))
      if number % max(1, crops // BATCH // 20) == 0:
        whole.append(np.asarray(large)[:4])
  return np.concatenate(cells), np.concatenate(whole)


def with_components(params, cells, whole):
  """The parameters with both sketches set."""
  encoder, decoder = params['encoder']['sketch'], params['decoder']['sketch']
  grid, latents = encoder['mix'].shape[:3], encoder['mix'].shape[3:]
  count = latents[0] * latents[1]
  flat = cells.reshape(len(cells), -1)
  pca = fit_pca(flat, count)
  deviation = np.maximum(np.sqrt(pca.explained_variance_), 1e-3)
  into, out = pca.components_.T * (RMS / deviation) * 64, pca.components_ * (deviation / RMS)[:, None] * 32
  centre = pca.mean_.reshape(grid)
  encoder = {'centre': centre, 'mix': into.reshape(*grid, *latents)}
  decoder = {'centre': centre, 'mix': out.reshape(*latents, *grid)}
  # What is left of whole bins: its quantile, by frequency.
  small = np.asarray(envelope.band_means(whole, grid))
  rebuilt = pca.inverse_transform(pca.transform(small.reshape(len(whole), -1))).reshape(small.shape)
  left = whole - np.asarray(envelope.spread_bands(rebuilt, *whole.shape[1:3]))
  bias = np.quantile(left, envelope.QUANTILE, axis=(0, 2))[:, None] / envelope.BIAS_RATE
  as_arrays = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
  # What the networks add, to the latents and to the envelope, begins at nothing.
  head = jax.tree.map(jnp.zeros_like, params['decoder']['envelope']['head']['conv_out'])
  last = ('mix', 'bias')  # of a path beside the transformers
  shortcut = {name: jnp.zeros_like(x) if name in last else x
              for name, x in params['encoder'].get('shortcut', {}).items()}
  others = {'shortcut': shortcut} if shortcut else {}
  return {**params, 'encoder': {**params['encoder'], **others, 'sketch': as_arrays(encoder)},
          'decoder': {**params['decoder'], 'sketch': as_arrays(decoder),
                      'envelope': {'head': {**params['decoder']['envelope']['head'], 'conv_out': head},
                                   'bias': as_arrays(bias)}}}


if __name__ == '__main__':
  try:
    run(sys.argv[1:])
  except UserError as error:
    sys.exit(f'pca_start: {error}')
