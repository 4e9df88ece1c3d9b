"""similar: which pieces of a folder are nearest to a piece."""

import json
import os

from m2l2.cli import options, terminal
from m2l2.errors import UserError, in_one_line


def add(command):
  parser = command('similar', _similar, summary='The pieces of a folder that sound most like a piece.',
                   example='  m2l2 similar song.mp3 music/ --checkpoint=tiny\n'
                           '  m2l2 encode music/ features/ --checkpoint=tiny --features   # once, for many questions\n'
                           '  m2l2 similar song.mp3 features/ --checkpoint=tiny --most=5')
  parser.add_argument('piece', metavar='PIECE', help='audio, *.safetensors of m2l2 encode, or *.npz of --features')
  parser.add_argument('folder', metavar='FOLDER', help='of such files, at any depth; or a glob')
  options.checkpoint(parser)
  parser.add_argument('--device', metavar='KIND[:N]', help='cpu, gpu or tpu, the N-th of them (default: the best)')
  parser.add_argument('--most', type=int, default=10, metavar='N', help='pieces to print (default 10)')
  parser.add_argument('--json', action='store_true', help='one JSON list, the nearest first')
  options.quiet(parser, without='no progress bar, no warnings')


def _similar(args):
  from m2l2.cli import jobs
  from m2l2.codec import features
  from m2l2.data import audio_io, sources
  if args.most < 1:
    raise UserError(f'--most={args.most}: print at least one piece')
  if not os.path.isfile(args.piece):
    raise UserError(f'{audio_io.shown(args.piece)}: there is no such file')
  listing = sources.find_files(args.folder, (*jobs.AUDIO, *jobs.LATENTS, features.EXTENSION))
  if not listing:
    raise UserError(f'{audio_io.shown(args.folder)}: there is no such file or directory')
  base = listing[0]
  names = [name for name in sorted(listing[1]) if not os.path.samefile(os.path.join(base, name), args.piece)]
  codec = options.load_codec(args)
  query, kept, pieces = _features_of(args.piece, codec), [], []
  with terminal.bar('read', len(names), quiet=args.quiet) as done:
    for name in names:
      try:
        pieces.append(_features_of(os.path.join(base, name), codec))
        kept.append(name)
      except UserError as error:
        if not args.quiet:
          terminal.tell(in_one_line(error))
      done(1)
  if not kept:
    raise UserError(f'{audio_io.shown(args.folder)}: no piece there to compare with')
  similarity = features.similarity(query, pieces)
  ranked = sorted(zip(similarity.tolist(), kept), key=lambda pair: (-pair[0], pair[1]))[:args.most]
  if args.json:
    terminal.show(json.dumps([{'piece': name, 'similarity': round(value, 4)} for value, name in ranked], indent=2))
    return
  for value, name in ranked:
    terminal.show(f'{value:6.3f}  {audio_io.shown(name)}')


def _features_of(path, codec):
  """[time, dim] of a file of audio, latents or features. Raises UserError: it cannot be read, or is another model's."""
  from m2l2.codec import features
  from m2l2.codec.latents import Latents
  if path.endswith(features.EXTENSION):
    return features.load(path, model=codec.fingerprint)
  if path.endswith('.safetensors'):
    return codec.features(Latents.load(path))
  return codec.features(codec.encode(path))
