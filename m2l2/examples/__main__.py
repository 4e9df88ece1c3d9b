"""python -m m2l2.examples train ..., python -m m2l2.examples sample ...: the generator of latents, see generate.py."""

import argparse
import dataclasses
import os
import sys
import time

from absl import logging
import numpy as np

from m2l2.cli import options
from m2l2.codec.codec import load
from m2l2.data import audio_io
from m2l2.errors import UserError, told
from m2l2.examples import generate


def parser() -> argparse.ArgumentParser:
  root = argparse.ArgumentParser(prog='python -m m2l2.examples', description=generate.__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = root.add_subparsers(dest='command', required=True)
  flags = commands.add_parser('train', help='on latents; the same command goes on with a run that was stopped')
  flags.add_argument('latents', help='what m2l2 encode-dataset wrote')
  flags.add_argument('--workdir', required=True)
  for field in dataclasses.fields(generate.Recipe):
    flags.add_argument(f'--{field.name.replace("_", "-")}', type=type(field.default), default=field.default)
  options.hosts(flags)
  flags = commands.add_parser('sample', help='new music, or what goes on after --prefix')
  flags.add_argument('output', help='*.wav, *.flac or *.ogg')
  flags.add_argument('--workdir', required=True, help='of train')
  flags.add_argument('--checkpoint', required=True, help='the codec that made the latents')
  flags.add_argument('--seconds', type=float, default=10.0)
  flags.add_argument('--label', help='a class of the corpus')
  flags.add_argument('--prefix', help='an audio file, after whose end it goes on; that is written, too')
  flags.add_argument('--steps', type=int, default=50)
  flags.add_argument('--guidance', type=float, default=1.0, help='above 1: more of what the class adds')
  flags.add_argument('--temperature', type=float, default=generate.TEMPERATURE, help='lower: with less variety')
  flags.add_argument('--seed', type=int, default=0)
  options.overwrite(flags)
  return root


def main(argv=None) -> int:
  """One command; 1 and one line after a mistake of the user's."""
  args = parser().parse_args(argv)
  logging.set_verbosity(logging.INFO if args.command == 'train' else logging.WARNING)
  try:
    (_train if args.command == 'train' else _sample)(args)
  except Exception as error:
    line = told(error)
    if line is None:
      raise
    print(f'generate: {line}', file=sys.stderr)
    return 1
  return 0


def _train(args):
  from m2l2.training import hosts
  recipe = generate.Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(generate.Recipe)})
  began = time.perf_counter()
  with hosts.joined(args):
    done = generate.train(args.latents, args.workdir, recipe)
  print(f'{done} of {recipe.steps} steps; {(time.perf_counter() - began) / 60:.1f} minutes, '
        f'{time.process_time() / 60:.1f} of processors')


def _sample(args):
  audio_io.check_writable(args.output, extensions=tuple(audio_io.WRITE_FORMATS))
  if os.path.exists(args.output) and not args.overwrite:
    raise UserError(f'{audio_io.shown(args.output)}: is there already; name another output, or add --overwrite')
  if args.steps < 1 or not args.seconds > 0:
    raise UserError('--steps must be 1 or more, and --seconds positive')
  generator, codec = generate.load(args.workdir), load(args.checkpoint)
  if generator.codec != codec.fingerprint:
    raise UserError(f'{audio_io.shown(args.workdir)}: makes latents of model {generator.codec}, and --checkpoint is '
                    f'{codec.fingerprint}')
  rate, prefix = codec.native_rates[0], None
  chunks = codec.layout(round(args.seconds * rate), rate).chunks
  if args.prefix:
    audio, own = audio_io.read(args.prefix)
    audio = audio_io.resample(audio.mean(axis=0, keepdims=True), from_rate=own, to_rate=rate)
    prefix = codec.encode(audio, rate).z[0]
    prefix = prefix[:-1] if len(prefix) > 1 else prefix  # the last chunk may end in silence
  sampled = generator.sample(chunks, seed=args.seed, prefix=prefix, label=args.label, steps=args.steps,
                             guidance=args.guidance, temperature=args.temperature)[0]
  z = sampled if prefix is None else np.concatenate([prefix, sampled])
  sound = codec.decode(generate.as_latents(codec, z, seconds=args.seconds if prefix is None else None), seed=args.seed)
  audio_io.write(args.output, sound, rate)


if __name__ == '__main__':
  sys.exit(main())
