#!/usr/bin/env python3
"""Times train step, encoding, decoding and attention on the available device: JSON on stdout.

  python launch/bench/bench.py --config=nano
  python launch/bench/bench.py --config=base --batch=16 --dtype=bfloat16 > bench.json
  python launch/bench/bench.py --config=nano --only=train,attention --no-pairs
  python launch/bench/bench.py --config=codicodec --only=train --torch --threads=2 --batch=1 --remat=none --steps=3

Runs from a checkout, installed or not. The train step and attention need jax, flax, optax and numpy
alone (and ml_collections, unless --config-json names the config.json of a workdir or snapshot);
encoding and decoding need soundfile and soxr too, and are left out with a note without them. One
device; random weights; the audio is noise. Every time is of compiled code after a first run, until the
result is ready.

Each measurement alternates with its references (ABCABC...), so that other work of the machine affects all
alike; `ratio` is the reference's seconds over ours, round by round: above 1 ours is faster. References are: of
attention, one dense attention under a mask; of the others float32 for a narrower dtype; of the train step also plain
attention for a fused one, and the further policies of --remat; and with --torch CoDiCodec's own torch modules
(launch/bench/torch_reference.py).
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import json
import math
import os
import runpy
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import jax  # noqa: E402  (after the path is set: the checkout's own m2l2 is measured)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from m2l2 import build  # noqa: E402
from m2l2.codec import renamed  # noqa: E402
from m2l2.errors import UserError  # noqa: E402
from m2l2.kernels import chunk_causal  # noqa: E402
from m2l2.model.remat import REMATS  # noqa: E402
from m2l2.planning.chips import find_chip  # noqa: E402
from m2l2.training import timing  # noqa: E402

PARTS = ('train', 'encode', 'decode', 'attention')
SAME = 1e-4  # relative difference up to which torch's loss and gradient are ours


def main(argv=None) -> int:
  args = parse(argv)
  try:
    with on_threads(args.threads):
      report = measure(args)
  except UserError as error:
    print(f'bench: {error}', file=sys.stderr)
    return 1
  print(json.dumps(report, indent=2))
  return 0


def parse(argv):
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='nano', metavar='NAME[:WORDS]',
                      help='a preset (nano, base, stereo:debug, ...) or a config file')
  parser.add_argument('--config-json', metavar='FILE', help='a resolved config instead')
  parser.add_argument('--batch', type=int, help="crops a step (default: the config's)")
  parser.add_argument('--steps', type=int, default=10, help='timed runs of each part (default 10)')
  parser.add_argument('--seconds', type=float, default=30, metavar='S',
                      help='length of the signal that is encoded and decoded (default 30)')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='of activations')
  parser.add_argument('--remat', metavar='A,B',
                      help=f'some of {",".join(REMATS)}: the first is measured, the others are references')
  parser.add_argument('--only', default=','.join(PARTS), metavar='A,B',
                      help=f'some of {",".join(PARTS)}')
  parser.add_argument('--pairs', action=argparse.BooleanOptionalAction, default=True,
                      help='whether the references run too (default: they do)')
  parser.add_argument('--torch', action='store_true',
                      help='CoDiCodec in torch is a reference too (float32, on the CPU, --config=codicodec)')
  parser.add_argument('--threads', type=int, metavar='N', help='CPU threads (default: all; with --torch 2)')
  parser.add_argument('--seed', type=int, default=0, help='of weights and signals (default 0)')
  parser.add_argument('--peak-tflops', type=float, metavar='X',
                      help="the device's peak in this dtype, for the MFU (default: m2l2/planning/chips.py)")
  args = parser.parse_args(argv)
  args.only = args.only.split(',')
  args.remat = args.remat.split(',') if args.remat else []
  if args.torch and args.threads is None:
    args.threads = 2
  above_0 = [size for size in (args.steps, args.batch, args.seconds, args.threads) if size is not None]
  if set(args.only) - set(PARTS) or set(args.remat) - set(REMATS) or min(above_0) <= 0 or args.seed < 0:
    parser.error(f'--only takes some of {",".join(PARTS)}, --remat of {",".join(REMATS)}; --steps, --batch, '
                 '--seconds and --threads are above 0, --seed is not below')
  if args.torch and not args.pairs:
    parser.error('--torch is one of a pair: leave out --no-pairs')
  return args


@contextlib.contextmanager
def on_threads(count):
  """Keeps the process to so many cores: XLA makes its threads by them when it starts."""
  if count is None:
    yield
    return
  if not hasattr(os, 'sched_setaffinity'):
    raise UserError('--threads pins the process to cores, which only Linux offers')
  before = os.sched_getaffinity(0)
  if count > len(before):
    raise UserError(f'--threads={count}: there are {len(before)} cores')
  os.sched_setaffinity(0, sorted(before)[:count])
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def measure(args) -> dict:
  config = read_config(args)
  if args.dtype:
    config['model']['dtype'] = args.dtype
  if args.remat:
    config['model']['remat'] = args.remat[0]
  batch = args.batch or config['train']['batch_size']
  network = build.network(config)
  config['model']['dtype'] = network.arch.dtype  # what 'auto' is here
  shapes = network.shapes
  device = jax.devices()[0]
  report = {
      'device': device.device_kind, 'platform': device.platform, 'jax': jax.__version__,
      'python': sys.version.split()[0], 'date': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
      'seed': args.seed, 'threads': args.threads or os.cpu_count(),
      'config': args.config_json or args.config,
      'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
      'dtype': config['model']['dtype'], 'attention_impl': config['model']['attention'],
      'remat': config['model']['remat'], 'notes': []}
  with contextlib.ExitStack() as stack:
    original = stack.enter_context(torch_original(config, network, args)) if args.torch else None
    if original:
      report['torch'] = original.version
    if 'train' in args.only:
      say(f'train step, batch {batch}')
      report['train'] = time_train(config, batch=batch, args=args, original=original, notes=report['notes'])
    if 'attention' in args.only:
      say('attention')
      report['attention'] = time_attention(network.arch, batch=batch, args=args)
    codec_parts = [part for part in ('encode', 'decode') if part in args.only]
    if codec_parts:
      say(' and '.join(codec_parts))
      try:
        report |= time_codec(config, parts=codec_parts, args=args, original=original)
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
    return renamed.current(config.get('config', config))  # of a snapshot, or of a workdir
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


def time_train(config, *, batch, args, original=None, notes=None) -> dict:
  """The whole compiled update, its state donated as in training."""
  steps = build.step_functions(config)
  audio = 0.1 * jax.random.normal(jax.random.key(args.seed + 1), (batch, steps.channels, steps.crop_samples))
  params = original.params if original else jax.jit(steps.init)(jax.random.key(args.seed)).params
  ours = CompiledStep(config, params, audio)
  references, checks = {}, {}
  if args.pairs:
    for name, changes in train_references(config, args).items():
      try:
        references[name] = CompiledStep({**config, 'model': {**config['model'], **changes}}, params, audio)
      except jax.errors.JaxRuntimeError as error:  # of a float32 step that does not fit, say
        notes.append(f'train step without {name}: {str(error).splitlines()[0]}')
  if original:
    references['torch'] = training = original.training(config, audio)
    checks['torch_agreement'] = agreement(training, ours)
  times = seconds_of(ours, references, count=args.steps)
  per_step = times['median']
  seconds = batch * steps.crop_samples / steps.sample_rate
  flops = timing.step_flops(build.step_functions(timing.plain_model(config), ravel=True), batch).total
  result = {
      'batch': batch, 'compile_seconds': ours.compile_seconds, 'seconds_per_step': times,
      'crops_per_second': batch / per_step, 'audio_seconds_per_second': seconds / per_step,
      'flops_per_step': flops, 'tflops_per_second': flops / per_step / 1e12,
      'flops_by_xla': xla_flops(ours.compiled), 'temporary_bytes': temporary_bytes(ours.compiled), **checks}
  chip = find_chip(jax.devices()[0].device_kind)
  peak = 1e12 * args.peak_tflops if args.peak_tflops else chip and chip.flops(config['model']['dtype'])
  if peak:
    result['mfu'] = flops / per_step / peak
  return result


class CompiledStep:
  """One config's train step and its state, as `m2l2 train` has them on one device; every call is an update and returns
  the metrics."""

  def __init__(self, config, params, audio):
    steps = build.step_functions(config, ravel=True)
    self.batch = {'audio': audio}
    copy = functools.partial(jax.tree.map, jnp.array)  # donated at the first call, and `params` serve others too
    state = dataclasses.replace(jax.jit(steps.init)(jax.random.key(0)), params=copy(params), ema=copy(params))
    self.state = steps.ravel(state)
    start = time.perf_counter()
    self.compiled = jax.jit(steps.train_step, donate_argnums=0).lower(self.state, self.batch).compile(
        compiler_options=build.compiler_options(config))
    self.compile_seconds = time.perf_counter() - start

  def __call__(self):
    self.state, metrics = self.compiled(self.state, self.batch)
    return metrics


def train_references(config, args) -> dict:
  """Name -> fields of config.model that are other than in what is measured."""
  model = config['model']
  references = {f'remat_{remat}': {'remat': remat} for remat in args.remat[1:] if remat != model['remat']}
  if model['dtype'] != 'float32':
    references['float32'] = {'dtype': 'float32'}
  here = chunk_causal.platform()
  if model['attention'] != 'xla' and (model['attention'] != 'auto' or here != 'cpu'):  # 'auto' is 'xla' on a CPU
    references['attention_xla'] = {'attention': 'xla'}
  return references


def agreement(training, ours) -> dict:
  """Proof that both sides compute the same: relative differences of the first loss and of its gradient's norm.

  Raises UserError: they do not.
  """
  metrics = ours()
  theirs = dict(zip(('loss', 'norm/gradients'), training.gradients()))
  errors = {name: abs(float(metrics[name]) / value - 1) for name, value in theirs.items()}
  for name, error in errors.items():
    if not error <= SAME:  # nan neither
      raise UserError(f'{name} is {float(metrics[name]):.6g} here and {theirs[name]:.6g} in torch: not the same step')
  return {'loss': theirs['loss'], 'relative_difference_of_loss': errors['loss'],
          'relative_difference_of_gradient_norm': errors['norm/gradients']}


def time_attention(arch, *, batch, args) -> dict:
  """Chunk-causal attention of the denoiser, forward and forward with gradient, one layer."""
  tokens = math.prod(arch.grid) + arch.denoiser_registers + (
      arch.num_latents if arch.denoiser_latents else 0)
  shape = (batch, arch.chunks * tokens, arch.widths[-1] // arch.head_dim, arch.head_dim)
  q, k, v = (jax.random.normal(key, shape, jnp.dtype(arch.dtype))
             for key in jax.random.split(jax.random.key(args.seed + 2), 3))

  def calls(attention):
    def loss(q, k, v):
      return jnp.sum(jnp.square(attention(q, k, v, num_chunks=arch.chunks).astype(jnp.float32)))

    forward = jax.jit(functools.partial(attention, num_chunks=arch.chunks))
    backward = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return {'forward': lambda: forward(q, k, v), 'forward_backward': lambda: backward(q, k, v)}

  result = {'shape': list(shape), 'chunks': arch.chunks}
  masked = calls(chunk_causal.masked_dense_attention)
  for impl in chunk_causal.IMPLEMENTATIONS:
    try:
      chunk_causal.check_implementation(impl, dtype=q.dtype)
    except ValueError as error:
      result[impl] = str(error)
      continue
    ours = calls(functools.partial(chunk_causal.chunk_causal_attention, impl=impl))
    result[impl] = {name: seconds_of(ours[name], {'masked_dense': masked[name]} if args.pairs else {},
                                     count=args.steps) for name in ours}
  return result


def time_codec(config, *, parts, args, original=None) -> dict:
  """Codec.encode and Codec.decode of one signal, with all that users wait for."""
  from m2l2.codec.codec import Codec  # needs soundfile and soxr

  def calls(config):
    params = original.params if original else jax.jit(build.network(config).init)(jax.random.key(args.seed))
    codec = Codec(config=config, params=params, fingerprint='bench')
    latents = codec.encode(audio, rate)
    return {'encode': lambda: codec.encode(audio, rate), 'decode': lambda: codec.decode(latents)}, latents

  rate, channels = build.native_rates(config['model'])[0], config['model']['channels']
  audio = 0.1 * np.random.default_rng(args.seed).standard_normal((channels, round(args.seconds * rate)), np.float32)
  ours, latents = calls(config)
  references = {}
  if args.pairs and config['model']['dtype'] != 'float32':
    references['float32'], _ = calls({**config, 'model': {**config['model'], 'dtype': 'float32'}})
  if original:
    references['torch'] = original.codec(audio, steps=config['consistency']['steps'])
  report = {}
  for part in parts:
    times = seconds_of(ours[part], {name: runs[part] for name, runs in references.items()}, count=min(args.steps, 3))
    report[part] = {'audio_seconds': args.seconds, 'chunks': latents.z.shape[1], 'seconds': times,
                    'real_time_factor': args.seconds / times['median']}
  return report


@contextlib.contextmanager
def torch_original(config, network, args):
  """The original implementation. Raises UserError: it is not installed, or has another architecture than the config."""
  if config['model']['dtype'] != 'float32' or jax.default_backend() != 'cpu':
    raise UserError('--torch compares float32 on the CPU: set --dtype=float32 and JAX_PLATFORMS=cpu')
  from launch.bench import torch_reference  # needs torch and codicodec
  with torch_reference.sized(network.arch, hop=config['model']['hop'], threads=args.threads):
    yield torch_reference.Original(network.arch, seed=args.seed)


# ---- measuring -----------------------------------------------------------------------------------


def seconds_of(run, references=None, *, count) -> dict:
  """Times `run` and its references in turn, `count` rounds after two that are not counted.

  Returns:
    {'min', 'median', 'runs'} of `run` in seconds; where there are references 'against': name -> the same of the
    reference and 'ratio': {'median', 'min', 'max'} of its seconds over those of `run` in the same round.
  """
  everything = {'': run, **(references or {})}
  times = {name: [] for name in everything}
  for i in range(count + 2):
    for name, call in everything.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      if i >= 2:
        times[name].append(time.perf_counter() - start)
  result, against = summary(times['']), {}
  for name in references or {}:
    ratios = [theirs / ours for theirs, ours in zip(times[name], times[''], strict=True)]
    against[name] = {**summary(times[name]), 'ratio': {
        'median': statistics.median(ratios), 'min': min(ratios), 'max': max(ratios)}}
  return {**result, 'against': against} if against else result


def summary(times) -> dict:
  return {'min': min(times), 'median': statistics.median(times), 'runs': len(times)}


def xla_flops(compiled):
  """What the compiler reports, where it does; scans are counted as one turn."""
  try:
    analysis = compiled.cost_analysis()
  except Exception:  # not every backend has one
    return None
  analysis = analysis[0] if isinstance(analysis, (list, tuple)) else analysis
  return (analysis or {}).get('flops')


def temporary_bytes(compiled):
  """Temporary bytes of the step, if the backend reports them."""
  try:
    return compiled.memory_analysis().temp_size_in_bytes
  except Exception:  # not every backend has one
    return None


def say(line):
  print(f'bench: {line}', file=sys.stderr)


if __name__ == '__main__':
  sys.exit(main())
