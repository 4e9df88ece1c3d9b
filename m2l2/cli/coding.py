"""encode, decode, reconstruct, info: files of audio to files of latents and back."""

import contextlib
import json
import os
import sys
import time

from m2l2.cli import options, terminal
from m2l2.errors import OutputClosed, UserError, in_one_line, is_full, told

_SECONDS = 10  # of audio per read
_AUDIO_IN, _AUDIO_OUT = 'WAV, FLAC, OGG, Opus, MP3, AIFF file (M4A, AAC: extra av)', '*.wav, *.flac or *.ogg'
_LATENTS = '*.safetensors'


def add(command):
  parser = command('encode', _encode, summary='Audio file -> file of latents.',
                   example='  m2l2 encode song.flac song.safetensors --checkpoint=tiny\n'
                           '  m2l2 encode albums/ latents/ --checkpoint=tiny\n'
                           '  m2l2 encode song.flac song.npz --checkpoint=tiny --features')
  options.files(parser, _AUDIO_IN, f'{_LATENTS}, or *.npz with --features')
  options.overwrite(parser)
  options.discrete(parser)
  options.features(parser)
  options.embeddings(parser)
  parser = command('decode', _decode, summary='File of latents -> audio file, as long as the source.',
                   example='  m2l2 decode song.safetensors song.wav --checkpoint=tiny --seed=1\n'
                           '  m2l2 decode song.safetensors - --checkpoint=tiny | aplay')
  options.files(parser, _LATENTS, _AUDIO_OUT)
  options.sound(parser)
  options.decoding(parser)
  parser = command('reconstruct', _reconstruct, summary='Audio file -> latents -> audio file.',
                   example='  m2l2 reconstruct song.flac again.wav --checkpoint=tiny\n'
                           "  m2l2 reconstruct 'albums/**/*.mp3' again/ --checkpoint=tiny --format=flac")
  options.files(parser, _AUDIO_IN, _AUDIO_OUT)
  options.embeddings(parser)
  options.sound(parser)
  options.decoding(parser)
  parser = command('info', _info, summary='Facts about audio, latents, a snapshot or a workdir.',
                   example='  m2l2 info song.safetensors\n  m2l2 info tiny --json')
  parser.add_argument('path', metavar='FILE_OR_CHECKPOINT',
                      help='a path, the name of a model in the box, or - for a pipe')
  parser.add_argument('--json', action='store_true', help='one JSON object')


def _encode(args):
  from m2l2.cli import jobs
  from m2l2.codec import features
  from m2l2.data import audio_io
  if args.features and (args.discrete or args.embeddings is not None):
    raise UserError('--features are of all numbers: leave --discrete and --embeddings out')
  output = '.npz' if args.features else '.safetensors'
  planned = jobs.find_jobs(args.source, args.target, inputs=jobs.AUDIO, output=output)
  with _over(planned, 'encode', args) as (done, passing):
    many = len(planned) > 1
    codec = _encoder(args) if many else None  # what is wrong for all files is told once
    for job in planned:
      with passing(job), jobs.reading(job) as path:
        info = audio_io.info(path)
        if many and not args.overwrite and _are_there(job.target, codec, args):
          terminal.say(args, f'{audio_io.shown(job.target)}: is there already')
          done(1)
          continue
        check = _new_file(job.source, overwrite=args.overwrite, extensions=(output,))
        with jobs.writing(job, output=output, check=check) as target:
          codec = codec or _encoder(args)
          began = time.monotonic()
          latents = encode_file(codec, info, discrete=args.discrete, embeddings=args.embeddings, quiet=args.quiet)
          speed = latents.seconds / (time.monotonic() - began)
          if args.features:
            features.save(target, codec, latents)
          else:
            latents.save(target)
        terminal.say(args, f'{audio_io.shown(job.target)}: {latents.words()}; {_speed(speed)}')
      done(1)


def _are_there(path, codec, args) -> bool:
  """Whether the outputs exist and come from an earlier run over the same files."""
  from m2l2.codec import features
  from m2l2.codec.latents import Latents
  try:
    if args.features:
      features.load(path, model=codec.fingerprint)
      return True
    latents = Latents.load(path)
  except UserError:
    return False
  return (latents.model == codec.fingerprint and (latents.z.ndim == 3) == args.discrete
          and args.embeddings in (None, latents.z.shape[2]))


@contextlib.contextmanager
def _over(planned, name, args):
  """Yields (progress, passing). In `passing(job)` an error is reported and the next file follows; of a single file it
  ends the command."""
  from m2l2.data.audio_io import shown
  faults = 0

  @contextlib.contextmanager
  def passing(job):
    nonlocal faults
    try:
      yield
    except Exception as error:
      line = told(error)
      if line is None or isinstance(line, OutputClosed):
        raise
      text = in_one_line(line)
      if is_full(text):  # for all others, too
        again = '; make room and run the same command again'
        raise UserError(text.removesuffix(again) + again) from error
      if job.name not in text and shown(job.target) not in text:  # such as the number of channels
        text = f'{job.name}: {text}'
      if len(planned) == 1:
        raise UserError(text) from error
      faults += 1
      terminal.tell(text)

  with terminal.bar(f'{name} files', len(planned), quiet=args.quiet or len(planned) == 1) as done:
    yield done, passing
  if faults:
    raise UserError(f'{faults} of {len(planned)} files were skipped; the others are done')


def _decode(args):
  from m2l2.cli import jobs
  from m2l2.codec.latents import Latents

  def opened(path):
    latents = Latents.load(path)
    return latents, lambda codec: latents
  _decode_jobs(args, jobs.find_jobs(args.source, args.target, inputs=jobs.LATENTS, output=f'.{args.format}'), opened)


def _reconstruct(args):
  from m2l2.cli import jobs
  from m2l2.data import audio_io

  def opened(path):
    info = audio_io.info(path)
    return info, lambda codec: encode_file(codec, info, embeddings=args.embeddings, quiet=args.quiet)
  _decode_jobs(args, jobs.find_jobs(args.source, args.target, inputs=jobs.AUDIO, output=f'.{args.format}'), opened)


def _decode_jobs(args, planned, opened):
  """Decodes `--batch` files at a time. opened(path) -> (what has rate, channels and tags; codec -> latents)."""
  from m2l2.cli import jobs
  from m2l2.data import audio_io
  if args.batch is not None and args.batch < 1:
    raise UserError(f'--batch={args.batch}: decode at least one file at once')
  codec = _decoder(args) if len(planned) > 1 else None  # what is wrong for all files is told once
  with _over(planned, 'decode', args) as (done, passing):
    waiting = list(planned)
    while waiting:
      began = time.monotonic()
      size = 1 if len(planned) == 1 else args.batch or _batch()
      group, waiting = waiting[:size], waiting[size:]
      with contextlib.ExitStack() as all_files:
        ready = []
        for job in group:
          with passing(job), contextlib.ExitStack() as files:
            source, latents_by = opened(files.enter_context(jobs.reading(job)))
            check = _new_file(job.source, overwrite=args.overwrite)
            target = files.enter_context(jobs.writing(job, output=f'.{args.format}', check=check))
            if codec is None:
              codec, began = _decoder(args), time.monotonic()  # loading the model does not count as speed
            # Opened first, so that a format that cannot hold these channels is reported before the work.
            writer = files.enter_context(audio_io.AudioWriter(
                target, source.sample_rate, source.channels, tags=source.tags, normalize=args.normalize))
            latents = latents_by(codec)
            codec.check_latents(latents)
            ready.append((job, latents, writer))
            all_files.enter_context(files.pop_all())
        if ready:
          decode_files(codec, [latents for _, latents, _ in ready], [writer for *_, writer in ready], args)
      speed = sum(latents.seconds for _, latents, _ in ready) / (time.monotonic() - began)
      for job, latents, _ in ready:
        terminal.say(args, f'{audio_io.shown(job.target)}: {latents.words()}; {_speed(speed)}')
      done(len(group))


def _batch():
  import jax
  return 1 if jax.default_backend() == 'cpu' else 8


def _encoder(args):
  """Loads the Codec and checks the options of encoding against it."""
  codec = options.load_codec(args)
  codec.check_source(channels=1, discrete=getattr(args, 'discrete', False))
  if getattr(args, 'embeddings', None) is not None:
    codec.check_first(args.embeddings)
  return codec


def _decoder(args):
  codec = _encoder(args)
  codec.check_decoding(args.seed, mode=args.mode, steps=args.steps, sigma_cond=args.sigma_cond)
  return codec


def _new_file(source, *, overwrite, extensions=None):
  """A check of an output path (audio by default) that refuses to replace a file without --overwrite."""
  from m2l2.data import audio_io

  def check(path):
    audio_io.check_writable(path, extensions=extensions or tuple(audio_io.WRITE_FORMATS))
    if not os.path.exists(path):
      return
    if os.path.exists(source) and os.path.samefile(source, path):
      raise UserError(f'{audio_io.shown(path)}: is the input too; name another output')
    if not overwrite:
      raise UserError(f'{audio_io.shown(path)}: is there already; name another output, or add --overwrite')
  return check


def encode_file(codec, info, *, discrete=False, embeddings=None, quiet):
  """Encodes an audio file, read in blocks, into latents."""
  import dataclasses

  from m2l2.data import audio_io
  codec.check_source(channels=info.channels, discrete=discrete)
  blocks = audio_io.read_blocks(
      info.path, block_samples=_SECONDS * info.sample_rate, check_finite=True)
  with terminal.progress('encode', info, quiet=quiet) as done:
    latents = codec.encode_blocks(
        terminal.counted(blocks, done), sample_rate=info.sample_rate, channels=info.channels,
        discrete=discrete)
  latents = codec.first(latents, embeddings) if embeddings is not None else latents
  return dataclasses.replace(latents, tags=dict(info.tags))


def decode_files(codec, many, writers, args):
  """Writes the audio of several files' latents block by block; `terminal.counted` goes by the longest."""
  longest = max(range(len(many)), key=lambda i: many[i].num_samples / many[i].sample_rate)
  pieces = codec.decode_together(many, args.seed, clip=False, **options.decoding_of(args))
  with terminal.progress('decode', many[longest], quiet=args.quiet) as done:
    for blocks in pieces:
      for writer, block in zip(writers, blocks):
        writer.write(block)
      done(blocks[longest])


def _info(args):
  if sys.stdout is None:
    raise UserError('standard output is closed: the result cannot be printed')
  from m2l2.cli import info, jobs
  job = jobs.Job(jobs.PIPE if args.path in ('-', '/dev/stdin') else args.path, jobs.PIPE)
  with jobs.reading(job) as path:
    facts = info.facts(path)
  if path != job.source:  # audio from a pipe
    facts['path'] = job.name
  if args.json:
    terminal.show(json.dumps(facts, indent=2))
    return
  width = max(map(len, facts))
  for name, value in facts.items():
    terminal.show(f'{name.replace("_", " "):{width}}  {_readable(value)}')


def _readable(value) -> str:
  if isinstance(value, list):
    return ', '.join(map(_readable, value)) or 'none'
  if isinstance(value, float):
    return f'{value:,.4g}' if abs(value) < 1e4 else f'{value:,.0f}'
  if value is None:
    return 'none'
  return f'{value:,}' if isinstance(value, int) and value >= 10 ** 5 else str(value)


def _speed(times: float) -> str:
  return f'{times:.3g}x real time'
