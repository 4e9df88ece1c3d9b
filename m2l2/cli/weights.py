"""export, import-codicodec: models to and from other formats."""

from m2l2.cli import extras, options, terminal
from m2l2.errors import printable


def add(command):
  parser = command('export', _export, summary='Checkpoint -> programs and weights that JAX runs without m2l2.',
                   example='  m2l2 export tiny --format=stablehlo --output=exported\n'
                           '  cd exported && python -c "import load; print(load.Model(\'.\').about)"')
  parser.add_argument('checkpoint', metavar='DIR',
                      help='snapshot, workdir of a training run, or name of a model in the box')
  parser.add_argument('--format', choices=('stablehlo',), default='stablehlo', help='only stablehlo')
  parser.add_argument('--output', metavar='DIR', required=True, help='the folder to write; it must not exist')
  options.quiet(parser, without='no last line')
  parser = command('import-codicodec', _import_codicodec, summary="CoDiCodec's published weights -> snapshot.",
                   example='  m2l2 import-codicodec codicodec.pt runs/codicodec\n'
                           '  m2l2 encode song.flac song.safetensors --checkpoint=runs/codicodec')
  parser.add_argument('source', metavar='FILE',
                      help='codicodec.pt (reading it needs torch), or its tensors as .safetensors')
  parser.add_argument('target', metavar='DIR', help='the snapshot to write')
  parser.add_argument('--verify', action='store_true',
                      help='first compare with the original on one input (needs torch and codicodec)')
  options.quiet(parser, without='no last lines')


def _export(args):
  extras.require('exporting', 'export', 'flatbuffers')  # jax.export writes with it
  from m2l2.codec import codec, export, loading
  from m2l2.codec.snapshot import load_snapshot
  export.check_target(args.output)
  snapshot = load_snapshot(loading.locate(args.checkpoint))
  portable = codec.Codec(config=export.portable(snapshot.config), params=snapshot.params,
                         fingerprint=snapshot.fingerprint)
  export.export_stablehlo(portable, args.output)
  terminal.say(args, f'{printable(args.output)}: encode, start, step and finish for '
               f'{", ".join(export.PLATFORMS)}; load.py runs them')


def _import_codicodec(args):
  from m2l2.interop import codicodec
  report = codicodec.import_codicodec(args.source, args.target, verify=args.verify)
  if 'errors' in report:
    errors = ', '.join(f'{name} {error:.1e}' for name, error in report['errors'].items())
    terminal.say(args, f'verified against the original, relative errors: {errors}')
  terminal.say(args, f'{len(report["unused"])} tensors that the original stores and never uses were left out')
  terminal.say(args, f'{printable(args.target)}: snapshot of CoDiCodec, {report["parameters"]:,} parameters, '
               f'fingerprint {report["fingerprint"]}')
