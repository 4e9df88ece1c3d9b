#!/usr/bin/env python3
"""Losses of some training steps in another checkout and in this one, from one snapshot: whether a change changed them.

  git worktree add ../before 756134e
  python launch/bench/losses.py --config=base:debug --against=../before
  python launch/bench/losses.py --config=nano --against=../before --name-there=tiny  # as nano was called in 756134e

The other checkout makes the first weights, writes its snapshot and trains on noise; this one loads that snapshot, so
through its table of renamed fields, takes the recipe in it, and trains on the same noise. What is printed is the
largest relative difference; exit 1 if it is above --tolerance.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='nano', metavar='NAME[:WORDS]', help='a preset')
  parser.add_argument('--against', required=True, metavar='CHECKOUT')
  parser.add_argument('--name-there', metavar='NAME[:WORDS]', help="the preset's name there (default: the same)")
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--tolerance', type=float, default=1e-5, help='relative (default 1e-5)')
  parser.add_argument('--side', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.side:
    print(json.dumps(train(*args.side, args.config, args.steps)))
    return 0
  with tempfile.TemporaryDirectory() as folder:
    snapshot = os.path.join(folder, 'snapshot')
    then = in_a_process_of_its_own(os.path.abspath(args.against), snapshot, args.name_there or args.config, args)
    now = in_a_process_of_its_own(ROOT, snapshot, args.config, args)
  difference = max((abs(a - b) / abs(a) for a, b in zip(then, now)), key=lambda x: (math.isnan(x), x))
  print(f'{args.config}: losses {then[0]:.6g} ... {then[-1]:.6g} there, {now[0]:.6g} ... {now[-1]:.6g} here; '
        f'largest relative difference {difference:.1e}')
  return int(not difference <= args.tolerance)


def in_a_process_of_its_own(root, snapshot, name, args) -> list:
  done = subprocess.run(
      [sys.executable, os.path.abspath(__file__), f'--config={name}', f'--against={args.against}',
       f'--steps={args.steps}', '--side', root, snapshot],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': root}, stdout=subprocess.PIPE, text=True, check=False)
  if done.returncode:
    raise SystemExit(done.returncode)
  return json.loads(done.stdout.splitlines()[-1])


def train(root, snapshot, name, count) -> list:
  """Losses of `count` steps of the checkout at `root`, which writes the snapshot if there is none yet."""
  from compile_cost import preset  # beside this script
  import jax
  import jax.numpy as jnp
  import numpy as np

  from m2l2 import build
  config = preset(name, root)
  try:
    from m2l2.codec import snapshot as snapshots
  except ImportError:  # a checkout before that package
    from m2l2 import snapshot as snapshots
  first = not os.path.exists(snapshot)
  if first:
    config.train.update(batch_size=2 * config.train.accumulate, warmup_steps=min(config.train.warmup_steps, 5))
  else:
    saved = snapshots.load_snapshot(snapshot)
    take(config, saved.config)
  steps = build.step_functions(config)
  state = jax.jit(steps.init)(jax.random.key(0))
  if first:
    snapshots.save_snapshot(snapshot, params=jax.device_get(state.params), step=0,
                            config=json.loads(json.dumps(config.to_dict())))
  else:
    params = jax.tree.map(jnp.asarray, saved.params)
    if jax.tree.structure(params) != jax.tree.structure(state.params):
      raise SystemExit('losses: there are weights in that snapshot for something that models of today do not have')
    state = dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))

  rng, losses = np.random.default_rng(0), []
  shape = config.train.batch_size, steps.channels, steps.crop_samples
  step = jax.jit(steps.train_step, donate_argnums=0)
  for _ in range(count):
    state, metrics = step(state, {'audio': jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32)})
    losses.append(float(metrics['loss']))
  return losses


def take(config, saved):
  """Fields of a saved config go into `config`; of those that it has no more, told on stderr, nothing."""
  for name, value in saved.items():
    if name not in config:
      print(f'no field here: {name}={value!r}', file=sys.stderr)
    elif isinstance(value, dict):
      take(config[name], value)
    else:
      with config.unlocked(), config.ignore_type():
        config[name] = tuples(value)


def tuples(value):
  return tuple(map(tuples, value)) if isinstance(value, list) else value


if __name__ == '__main__':
  sys.exit(main())
