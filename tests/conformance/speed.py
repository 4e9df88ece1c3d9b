"""m2l2 against the original package, in turn: seconds to encode and to decode the same stereo file, and peak memory.

    python tests/conformance/speed.py --seconds=30 --rounds=3 [--calls=encode]

Same made-up weights, float32, `--threads` threads. Each side is a process of its own that lives through all rounds,
warmed up on a short file; it works only when asked. The original: encode; decode in parallel mode, 4 steps; decode
autoregressively with the package's default steps. m2l2: the same, the last in Music2Latent2's two steps of one call.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

CALLS = ('encode', 'parallel', 'autoregressive')
RATE = 44100


def audio(seconds):
  """Chords and noise, [2, samples]."""
  rng = np.random.default_rng(0)
  t = np.arange(round(seconds * RATE)) / RATE
  tones = sum(np.sin(2 * np.pi * f * t + p) for f, p in rng.uniform(50, 2000, (6, 2)))
  return (0.05 * tones + 0.02 * rng.standard_normal((2, t.size))).astype(np.float32)


def theirs():
  import kit
  import original
  import torch
  torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
  codec = original.package(original.load(kit.weights(0)))
  held = {}

  def encode(sound):
    held['latents'] = codec.encode(sound)

  with torch.no_grad():
    yield {'encode': encode,
           'parallel': lambda sound: codec.decode(held['latents'], mode='parallel', denoising_steps=4),
           'autoregressive': lambda sound: codec.decode(held['latents'], mode='autoregressive')}


def ours():
  import port
  codec, held = port.make_codec(0), {}

  def encode(sound):
    held['latents'] = codec.encode(sound, RATE)

  yield {'encode': encode,
         'parallel': lambda sound: codec.decode(held['latents'], mode='parallel', steps=4),
         'autoregressive': lambda sound: codec.decode(held['latents'], steps=1, refine=True)}


def serve(side, seconds, names):
  """Does what the lines on standard input name; answers with seconds, at the end with the peak in MiB."""
  (calls,) = {'theirs': theirs, 'ours': ours}[side]()
  replies, sys.stdout = sys.stdout, sys.stderr
  for name in dict.fromkeys(('encode', *names)):  # 13 chunks make all shapes; the original compiles nothing
    calls[name](audio(9.5 if side == 'ours' else 1.5))
  print('ready', file=replies, flush=True)
  sound = audio(seconds)
  for line in sys.stdin:
    begun = time.monotonic()
    calls[line.strip()](sound)
    print(time.monotonic() - begun, file=replies, flush=True)
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=replies, flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seconds', type=float, default=30)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--calls', default=','.join(CALLS))
  parser.add_argument('--side', choices=('ours', 'theirs'), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.side:
    return serve(args.side, args.seconds, args.calls.split(','))
  sides, seconds = {}, {side: {name: [] for name in args.calls.split(',')} for side in ('theirs', 'ours')}
  for side in seconds:
    sides[side] = subprocess.Popen(
        [sys.executable, __file__, f'--side={side}', f'--seconds={args.seconds}', f'--calls={args.calls}'],
        text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, 'OMP_NUM_THREADS': str(args.threads), 'JAX_PLATFORMS': 'cpu'})
    assert sides[side].stdout.readline() == 'ready\n'
  for _ in range(args.rounds):
    for name in seconds['ours']:
      for side, popen in sides.items():
        print(name, file=popen.stdin, flush=True)
        seconds[side][name].append(float(popen.stdout.readline()))
        print(f'{side} {name}: {seconds[side][name][-1]:.1f} s', file=sys.stderr, flush=True)
  peaks = {}
  for side, popen in sides.items():
    popen.stdin.close()
    peaks[side] = float(popen.stdout.readline())
  report = {'audio_seconds': args.seconds, 'threads': args.threads, 'peak_mib': peaks,
            'peak_ratio': peaks['ours'] / peaks['theirs']}
  for name in seconds['ours']:
    ratios = sorted(t / o for t, o in zip(seconds['theirs'][name], seconds['ours'][name]))
    report[name] = {'speed_ratio': {'median': float(np.median(ratios)), 'min': ratios[0], 'max': ratios[-1]},
                    **{side: seconds[side][name] for side in seconds}}
  print(json.dumps(report, indent=2))


if __name__ == '__main__':
  sys.exit(main())
