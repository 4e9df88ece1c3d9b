"""The original and m2l2 side by side in one process, any number of chunks; prints relative errors of waveforms.

    python tests/conformance/live.py --chunks=40 [--decoders=autoregressive,parallel,live]
"""

import argparse
import sys
import time

import numpy as np

import kit
import original
import port


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


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--chunks', type=int, default=40)
  parser.add_argument('--decoders', default=','.join(kit.DECODERS))
  args = parser.parse_args()
  codec, network = port.make_codec(0), original.load(kit.weights(0))
  worst = 0.0
  for decoder in args.decoders.split(','):
    whole, last, theirs, ours = compare(decoder, chunks=args.chunks, codec=codec, network=network)
    worst = max(worst, whole)
    print(f'{decoder}, {args.chunks} chunks: relative error {whole:.2e}, of the last chunk {last:.2e}; original '
          f'{theirs:.0f} s, m2l2 {ours:.0f} s (compilation included)', flush=True)
  return int(worst >= kit.TOLERANCE)


if __name__ == '__main__':
  sys.exit(main())
