#!/usr/bin/env python3
"""Measures the cost of compiling, and counts kernels of the optimised program by named scope.

  python launch/bench/compile_cost.py --config=nano
  python launch/bench/compile_cost.py --config=tiny --program=decode --depth=2
  python launch/bench/compile_cost.py --config=base:debug --against=../before   # another checkout and this one in turn

XLA's CPU compiler generates machine code for each distinct loop, and its time depends on their number, not on their
work (products, convolutions and most reductions are library calls and cost it nothing). The table
counts all kernels by the named scope that they were traced in; a gradient counts in the scope of its forward pass.
Seconds are of processor time (user), of tracing and of compiling apart, without any cache of compiled programs. Of
encode and decode they are what a codec's first call takes more than its second, and the table is of its main program.
Even processor time doubles when the other thread of a core is busy, so compare figures of one run only.
"""

import argparse
import collections
import importlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAMS = ('train', 'head', 'probe', 'encode', 'decode')
CONTROL = ('while', 'body', 'cond', 'closed_call', 'checkpoint', 'rematted_computation')  # in the names of scopes
# Operations that are no kernel and no call of a library, but names of memory, or control.
NO_KERNEL = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'call', 'conditional',
             'after-all', 'partition-id', 'replica-id', 'opt-barrier'}


def main(argv=None) -> int:
  args = parse(argv)
  if args.against is None:
    print(json.dumps(measure(args)) if args.json else table(measure(args)))
    return 0
  places = {'before': os.path.abspath(args.against), 'now': ROOT}
  runs = {name: [] for name in places}
  for _ in range(args.rounds):
    for name, place in places.items():
      runs[name].append(in_a_process_of_its_own(place, args))
  seconds = {name: statistics.median(sum(run['seconds']) for run in runs[name]) for name in runs}
  for name in runs:
    print(f"{name:>7}: {seconds[name]:.1f} s ({', '.join(format_seconds(run) for run in runs[name])}), "
          f"{runs[name][0]['kernels']} kernels, {runs[name][0]['lines']} lines")
  print(f"{args.config} {args.program}: {seconds['now'] / seconds['before']:.2f} of before")
  return 0


def parse(argv):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='nano', metavar='NAME[:WORDS]', help='a preset')
  parser.add_argument('--program', default='train', choices=PROGRAMS,
                      help='train step, head-start step, probe, or a call of the codec (default train)')
  parser.add_argument('--depth', type=int, default=2, help='names of a scope that are told apart (default 2)')
  parser.add_argument('--against', metavar='CHECKOUT', help='compile there and here in turn, and tell the ratio')
  parser.add_argument('--rounds', type=int, default=1, help='of those (default 1)')
  parser.add_argument('--hlo', metavar='FILE', help='the optimised program goes there')
  parser.add_argument('--json', action='store_true', help='figures as JSON')
  parser.add_argument('--root', default=ROOT, help=argparse.SUPPRESS)
  return parser.parse_args(argv)


def in_a_process_of_its_own(place, args) -> dict:
  """The figures of another checkout by this script: it is run there, whatever scripts that checkout has."""
  command = [sys.executable, os.path.abspath(__file__), f'--config={args.config}', f'--program={args.program}',
             '--json', f'--root={place}']
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': '', 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def measure(args) -> dict:
  """Compiles one program of `args.config` in the checkout at `args.root`."""
  sys.path.insert(0, args.root)
  import jax
  jax.config.update('jax_enable_compilation_cache', False)
  config = preset(args.config, args.root)
  began = processor_seconds()
  lowered = lower(config, args.program)
  traced = processor_seconds()
  text = lowered.compile(compiler_options=options(config, args.program)).as_text()
  seconds = [traced - began, processor_seconds() - traced]
  if args.program in ('encode', 'decode'):
    jax.clear_caches()
    seconds = [codec_seconds(config, args.program)]
  if args.hlo:
    with open(args.hlo, 'w', encoding='utf-8') as file:
      file.write(text)
  scopes = kernels(text, depth=args.depth)
  return {'config': args.config, 'program': args.program, 'seconds': seconds, 'kernels': sum(scopes.values()),
          'lines': text.count('\n'), 'scopes': dict(scopes.most_common())}


def preset(name, root):
  name, _, words = name.partition(':')
  sys.modules.setdefault('m2l2.configs', sys.modules.get('configs') or importlib.import_module('configs'))
  assert os.path.dirname(sys.modules['m2l2.configs'].__file__) == os.path.join(root, 'configs')
  try:
    return importlib.import_module(f'm2l2.configs.{name}').get_config(words)
  except (ModuleNotFoundError, ValueError) as error:
    raise SystemExit(f'compile_cost: --config={name}: {error}') from error


def lower(config, program):
  """The program, traced for this machine: as `m2l2 train` and Codec compile it."""
  import jax
  import jax.numpy as jnp

  from m2l2 import build
  key = jax.eval_shape(lambda: jax.random.key(0))
  if program in ('encode', 'decode'):
    return codec_program(config, program)
  try:
    steps = build.step_functions(config, ravel=True)
    # `pack` and `head=` are what checkouts of before 30 Nov 2026 have.
    state = (steps.ravel if hasattr(steps, 'ravel') else steps.pack)(jax.eval_shape(steps.init, key))
  except TypeError:  # a checkout from before states were ravelled
    steps = build.step_functions(config)
    state = jax.eval_shape(steps.init, key)
  batch = {'audio': jax.ShapeDtypeStruct((config.train.batch_size, steps.channels, steps.crop_samples), jnp.float32)}
  if program == 'probe':
    return jax.jit(steps.probe_step).lower(state.params, batch, key)
  step = steps.train_step if program == 'train' else lambda *a: steps.train_step(
      *a, **({'phase': 'head_start'} if hasattr(steps, 'phases') else {'head': True}))
  return jax.jit(step, donate_argnums=0).lower(state, batch)


def options(config, program):
  """What XLA is told of that program, as by `m2l2 train`."""
  from m2l2 import build
  if program not in ('train', 'head'):
    return None
  return getattr(build, 'compiler_options', lambda config: None)(config)


def codec_program(config, program):
  """Two chunks encoded; a pair of chunks decoded in a step: the bulk of what Codec compiles."""
  import jax
  import jax.numpy as jnp

  from m2l2 import build
  network, consistency = built(config)
  representation = build.representation(config['model'])
  arch = network.arch
  params = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)))
  bottleneck = arch.make_bottleneck()
  if program == 'encode':
    audio = jax.ShapeDtypeStruct((1, arch.channels, representation.crop_samples(2)), jnp.float32)
    return jax.jit(lambda params, audio: bottleneck(network.encode(params, representation.analyse(audio)))).lower(
        params, audio)

  def decode(params, z, noisy, sigma):
    features = network.decode(params, z)
    return consistency.denoise(lambda x, s: network.denoise(params, x, s, features), noisy, sigma)

  shape = lambda *sizes: jax.ShapeDtypeStruct((1, 2, *sizes), jnp.float32)
  return jax.jit(decode).lower(
      params, shape(arch.num_latents, arch.latent_dim), shape(arch.bins, arch.frames, 2 * arch.channels), shape())


def built(config) -> tuple:
  """(network, consistency) of a config."""
  from m2l2 import build
  if hasattr(build, 'variants'):
    return build.network(config), build.consistency(config)
  return build.network(config['model']), build.consistency(config['consistency'])  # a checkout before those groups


def codec_seconds(config, program) -> float:
  """Processor seconds that a codec's first call on three chunks takes more than its second."""
  import jax
  import numpy as np

  try:
    from m2l2.codec.codec import Codec
  except ModuleNotFoundError:  # a checkout before that package
    from m2l2.codec import Codec
  shapes = jax.eval_shape(built(config)[0].init, jax.eval_shape(lambda: jax.random.key(0)))
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: draw.normal(0, 0.02, leaf.shape).astype(np.float32), shapes)
  codec = Codec(config=config.to_dict(), params=params, fingerprint='0' * 12)
  audio = draw.normal(0, 0.1, (1, codec.representation.chunk_samples * 5 // 2)).astype(np.float32)
  call = lambda: codec.encode(audio, codec.native_rates[0])
  if program == 'decode':
    latents = call()
    call = lambda: codec.decode(latents)
  times = [processor_seconds()]
  for _ in range(2):
    call()
    times.append(processor_seconds())
  return (times[1] - times[0]) - (times[2] - times[1])


def kernels(text, *, depth) -> collections.Counter:
  """Optimised HLO -> number of kernels by scope."""
  counts, inside = collections.Counter(), False
  inner = set(re.findall(r'(?:calls|to_apply)=%([\w.-]+)', re.sub(r'.* call\(.*', '', text)))
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith(' '):
      inside = line.split()[0].lstrip('%') in inner  # of one kernel, or of a reduction
    operation = re.match(r'\s+(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(', line)
    if operation and not inside and operation[1] not in NO_KERNEL:
      name = re.search(r'op_name="([^"]*)"', line)
      counts[scope(name[1] if name else '', depth=depth)] += 1
  return counts


def scope(name, *, depth) -> str:
  """'jit(f)/transpose(jvp(student))/denoiser/while/body/x/mul' -> 'student/denoiser/x'."""
  parts = []
  for part in name.split('/')[1:-1]:
    if part.startswith('jit(') or part in CONTROL:
      continue
    part = re.sub(r'^(?:\w+\()+|\)+$', '', part)
    if re.fullmatch(r'[a-z]\w*', part) and part not in parts:
      parts.append(part)
  return '/'.join(parts[:depth]) or '(none)'


def processor_seconds() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def format_seconds(run) -> str:
  return ' + '.join(f'{seconds:.1f}' for seconds in run['seconds'])


def table(report) -> str:
  lines = [f"{report['config']} {report['program']}: {format_seconds(report)} s of tracing and compiling, "
           f"{report['kernels']} kernels, {report['lines']} lines"]
  return '\n'.join([*lines, *(f'{count:6d}  {name}' for name, count in report['scopes'].items())])


if __name__ == '__main__':
  sys.exit(main())
