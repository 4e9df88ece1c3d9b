#!/usr/bin/env python3
"""Times train step, encoding, decoding and attention on whatever device is there: JSON on stdout.

  python launch/bench.py --config=tiny
  python launch/bench.py --config=base --batch=16 --dtype=bfloat16 --peak-tflops=989 > bench.json
  python launch/bench.py --config=tiny --only=train,attention

Runs from a checkout, installed or not. The train step and attention need jax, flax, optax and numpy
alone (and ml_collections, unless --config-json names the config.json of a workdir or snapshot);
encoding and decoding need soundfile and soxr too and are left out with a note without them. One
device; random weights; audio is noise. Every time is of compiled code that ran before, with the
result waited for.
"""

import argparse
import importlib
import json
import math
import os
import runpy
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import jax  # noqa: E402  (after the path is set: the checkout's own m2l2 is measured)
import jax.extend  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from m2l2 import build  # noqa: E402
from m2l2.errors import UserError  # noqa: E402
from m2l2.flops import count_flops  # noqa: E402
from m2l2.kernels.chunk_causal import (  # noqa: E402
    IMPLEMENTATIONS, check_implementation, chunk_causal_attention)

PARTS = ('train', 'encode', 'decode', 'attention')


def main(argv=None) -> int:
  args = parse(argv)
  try:
    report = measure(args)
  except UserError as error:
    print(f'bench: {error}', file=sys.stderr)
    return 1
  print(json.dumps(report, indent=2))
  return 0


def parse(argv):
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='tiny', metavar='NAME[:WORDS]',
                      help='a preset (tiny, base, stereo:debug, ...) or a config file')
  parser.add_argument('--config-json', metavar='FILE', help='a resolved config instead')
  parser.add_argument('--batch', type=int, help="crops a step (default: the config's)")
  parser.add_argument('--steps', type=int, default=10, help='timed runs of each part (default 10)')
  parser.add_argument('--seconds', type=float, default=30, metavar='S',
                      help='length of the signal that is encoded and decoded (default 30)')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='of activations')
  parser.add_argument('--only', default=','.join(PARTS), metavar='A,B',
                      help=f'some of {",".join(PARTS)}')
  parser.add_argument('--peak-tflops', type=float, metavar='X',
                      help="the device's peak in this dtype: adds the MFU")
  args = parser.parse_args(argv)
  args.only = args.only.split(',')
  if set(args.only) - set(PARTS) or args.steps < 1 or (args.batch or 1) < 1 or args.seconds <= 0:
    parser.error(f'--only takes some of {",".join(PARTS)}; --steps, --batch, --seconds are above 0')
  return args


def measure(args) -> dict:
  config = read_config(args)
  if args.dtype:
    config['model']['dtype'] = args.dtype
  batch = args.batch or config['train']['batch_size']
  network = build.network(config['model'])
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  device = jax.devices()[0]
  report = {
      'device': device.device_kind, 'platform': device.platform, 'jax': jax.__version__,
      'python': sys.version.split()[0], 'config': args.config_json or args.config,
      'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
      'dtype': config['model']['dtype'], 'attention_impl': config['model']['attention'],
      'remat': config['model']['remat'], 'notes': []}
  if 'train' in args.only:
    say(f'train step, batch {batch}')
    report['train'] = time_train(config, batch=batch, args=args)
  if 'attention' in args.only:
    say('attention')
    report['attention'] = time_attention(network.arch, batch=batch, args=args)
  codec_parts = [part for part in ('encode', 'decode') if part in args.only]
  if codec_parts:
    say(' and '.join(codec_parts))
    try:
      report |= time_codec(config, network, parts=codec_parts, args=args)
    except ModuleNotFoundError as error:
      report['notes'].append(f'encode and decode are left out: {error.name} is not installed')
  stats = device.memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    report['peak_bytes'] = stats['peak_bytes_in_use']
  return report


def read_config(args) -> dict:
  """The resolved config as a plain dict."""
  if args.config_json:
    try:
      with open(args.config_json, encoding='utf-8') as file:
        config = json.load(file)
    except (OSError, ValueError) as error:
      raise UserError(f'{args.config_json}: cannot be read as JSON ({error})') from error
    return config.get('config', config)  # of a snapshot, or of a workdir
  name, _, words = args.config.partition(':')
  try:
    presets()
    if os.path.isfile(name):
      get_config = runpy.run_path(name)['get_config']
    else:
      get_config = importlib.import_module(f'm2l2.configs.{name}').get_config
  except ModuleNotFoundError as error:
    if error.name == 'ml_collections':
      raise UserError('presets need ml_collections: pip install ml-collections, or give '
                      '--config-json=FILE') from error
    raise UserError(f'--config={args.config}: there is no such preset or file') from error
  return json.loads(json.dumps(get_config(words).to_dict()))


def presets():
  """Makes m2l2.configs importable where m2l2 is not installed, only checked out."""
  try:
    importlib.import_module('m2l2.configs')
  except ModuleNotFoundError:
    sys.modules['m2l2.configs'] = importlib.import_module('configs')


# ---- the parts -----------------------------------------------------------------------------------


def time_train(config, *, batch, args) -> dict:
  """The whole compiled update, its state donated as in training."""
  steps = build.step_functions(config)
  shape = (batch, steps.channels, steps.crop_samples)
  audio = 0.1 * jax.random.normal(jax.random.key(1), shape)
  state = jax.jit(steps.init)(jax.random.key(0))
  start = time.perf_counter()
  compiled = jax.jit(steps.train_step, donate_argnums=0).lower(state, {'audio': audio}).compile()
  compile_seconds = time.perf_counter() - start

  def run():
    nonlocal state
    state, metrics = compiled(state, {'audio': audio})
    return metrics

  times = seconds_of(run, count=args.steps)
  per_step = times['median']
  seconds = batch * steps.crop_samples / steps.sample_rate
  flops = model_flops(config, audio)
  result = {
      'batch': batch, 'compile_seconds': compile_seconds, 'seconds_per_step': times,
      'crops_per_second': batch / per_step, 'audio_seconds_per_second': seconds / per_step,
      'flops_per_step': flops, 'tflops_per_second': flops / per_step / 1e12,
      'flops_by_xla': xla_flops(compiled), 'temporary_bytes': temporary_bytes(compiled)}
  if args.peak_tflops:
    result['mfu'] = flops / per_step / 1e12 / args.peak_tflops
  return result


def time_attention(arch, *, batch, args) -> dict:
  """Chunk-causal attention of the denoiser, forward and forward with gradient, one layer."""
  tokens = math.prod(arch.grid) + arch.denoiser_registers + (
      arch.num_latents if arch.latents_in_denoiser else 0)
  shape = (batch, arch.chunks * tokens, arch.widths[-1] // arch.head_dim, arch.head_dim)
  q, k, v = (jax.random.normal(key, shape, jnp.dtype(arch.dtype))
             for key in jax.random.split(jax.random.key(2), 3))
  result = {'shape': list(shape), 'chunks': arch.chunks}
  for impl in IMPLEMENTATIONS:
    try:
      check_implementation(impl, dtype=q.dtype)
    except ValueError as error:
      result[impl] = str(error)
      continue

    def forward(q, k, v, impl=impl):
      return chunk_causal_attention(q, k, v, num_chunks=arch.chunks, impl=impl)

    def loss(q, k, v, forward=forward):
      return jnp.sum(jnp.square(forward(q, k, v).astype(jnp.float32)))

    both = {'forward': jax.jit(forward),
            'forward_backward': jax.jit(jax.grad(loss, argnums=(0, 1, 2)))}
    result[impl] = {name: seconds_of(lambda run=run: run(q, k, v), count=args.steps)
                    for name, run in both.items()}
  return result


def time_codec(config, network, *, parts, args) -> dict:
  """Codec.encode and Codec.decode of one signal, with all that users wait for."""
  from m2l2.codec import Codec  # needs soundfile and soxr
  codec = Codec(config=config, params=jax.jit(network.init)(jax.random.key(0)), fingerprint='bench')
  rate = codec.native_rates[0]
  shape = (codec.representation.channels, round(args.seconds * rate))
  audio = 0.1 * np.random.default_rng(0).standard_normal(shape, np.float32)
  latents = codec.encode(audio, rate)
  runs = {'encode': lambda: codec.encode(audio, rate), 'decode': lambda: codec.decode(latents)}
  report = {}
  for part in parts:
    times = seconds_of(runs[part], count=min(args.steps, 3))
    report[part] = {'audio_seconds': args.seconds, 'chunks': latents.z.shape[1], 'seconds': times,
                    'real_time_factor': args.seconds / times['median']}
  return report


# ---- measuring -----------------------------------------------------------------------------------


def seconds_of(run, *, count) -> dict:
  """Least, median and number of `count` timed runs, after two that are not counted."""
  times = []
  for i in range(count + 2):
    start = time.perf_counter()
    jax.block_until_ready(run())
    if i >= 2:
      times.append(time.perf_counter() - start)
  return {'min': min(times), 'median': statistics.median(times), 'runs': count}


def model_flops(config, audio) -> float:
  """FLOPs of all matrix products and convolutions of one step, rematerialisation left out."""
  plain = build.step_functions({**config, 'model': {**config['model'], 'remat': 'none'}})
  state = jax.eval_shape(plain.init, jax.random.key(0))
  return count_flops(jax.make_jaxpr(plain.train_step)(state, {'audio': audio}).jaxpr).total


def xla_flops(compiled):
  """What the compiler reports, where it does; scans are counted as one turn."""
  try:
    analysis = compiled.cost_analysis()
  except Exception:  # not every backend has one
    return None
  analysis = analysis[0] if isinstance(analysis, (list, tuple)) else analysis
  return (analysis or {}).get('flops')


def temporary_bytes(compiled):
  """Bytes that the step needs beside its arguments and results, where the backend says so."""
  try:
    return compiled.memory_analysis().temp_size_in_bytes
  except Exception:  # not every backend has one
    return None


def say(line):
  print(f'bench: {line}', file=sys.stderr)


if __name__ == '__main__':
  sys.exit(main())
