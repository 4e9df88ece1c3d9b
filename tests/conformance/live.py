"""The original and m2l2 side by side in one process, any number of chunks; prints relative errors of waveforms.

    python tests/conformance/live.py --chunks=40 [--decoders=autoregressive,parallel,live]
    python tests/conformance/live.py --bfloat16       both in bfloat16, 7 chunks, against the float32 reference
"""

import argparse
import sys
import time

import kit
import numpy as np
import original
import port
import torch


def error(a, b):
  """||a - b|| / ||b||."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def compare(decoder, *, chunks, codec, network):
  """-> (relative error, the same over the last chunk alone, seconds of the original, seconds of m2l2)."""
  steps = kit.DECODERS[decoder]
  noise = kit.noises(0, chunks=chunks, roles=kit.ROLES)
  start = time.time()
  _, theirs = original.DECODERS[decoder](network, kit.latents(0, chunks=chunks), noise, steps)
  middle = time.time()
  ours = port.waveform(codec, decoder, chunks=chunks)
  end = time.time()
  last = kit.FRAMES * kit.HOP
  return error(ours, theirs), error(ours[:, -last:], theirs[:, -last:]), middle - start, end - middle


def report_bfloat16(decoders, *, chunks=7):
  """Chained decoders in bfloat16: errors add up over steps and chunks; reported, not judged."""
  reference, network = kit.load_reference(), original.load(kit.weights(0))
  noise = kit.noises(0, chunks=chunks, roles=kit.ROLES)
  codec = port.compiled('bfloat16')
  codec.params = port.make_params(0)
  # Its own wrapper sets the precision anew in every call.
  original.codicodec.models.distribute = lambda model, x, batch, device, *args, **kwargs: model(x, *args, **kwargs)
  for decoder in decoders:
    with torch.autocast('cpu', dtype=torch.bfloat16):
      _, theirs = original.DECODERS[decoder](network, kit.latents(0, chunks=chunks), noise, kit.DECODERS[decoder])
    name = f'0/{decoder}/{chunks}/waveform'
    ours = port.waveform(codec, decoder, chunks=chunks)
    print(f'{decoder}, {chunks} chunks, bfloat16 against float32: torch autocast '
          f'{kit.relative_error(name, theirs, reference):.2e}, m2l2 {kit.relative_error(name, ours, reference):.2e}',
          flush=True)
  return 0


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--chunks', type=int, default=40)
  parser.add_argument('--decoders', default=','.join(kit.DECODERS))
  parser.add_argument('--bfloat16', action='store_true')
  args = parser.parse_args()
  if args.bfloat16:
    return report_bfloat16(args.decoders.split(','))
  codec, network = port.make_codec(0), original.load(kit.weights(0))
  passed = True
  for decoder in args.decoders.split(','):
    whole, last, theirs, ours = compare(decoder, chunks=args.chunks, codec=codec, network=network)
    passed = passed and whole < kit.TOLERANCE
    print(f'{decoder}, {args.chunks} chunks: relative error {whole:.2e}, of the last chunk {last:.2e}; original '
          f'{theirs:.0f} s, m2l2 {ours:.0f} s (compilation included)', flush=True)
  return 0 if passed else 1


if __name__ == '__main__':
  sys.exit(main())
