"""Is time linear in a file's length, and memory flat? Encodes and decodes noise of growing length, each call a process.

  python tests/soak/soak_lengths.py --config=base --minutes=1,2,4

Random weights; `m2l2 encode`, then `m2l2 decode --steps=1 --refine` as a user would call them, programs compiled
before. Prints JSON: of each call the seconds, the seconds a minute, also of what is longer than the file before (so
without the program's start), and the resident memory at the peak. For an idle machine. Not collected by pytest.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BLOCK = 10  # seconds that are written at a time


def make_snapshot(config, directory):
  """A snapshot of random weights."""
  import jax

  from m2l2 import build
  from m2l2.codec import snapshot
  name, _, words = config.partition(':')
  fields = importlib.import_module(f'm2l2.configs.{name}').get_config(words).to_dict()
  params = jax.jit(build.network(fields).init)(jax.random.key(0))
  snapshot.save_snapshot(directory, params=params, config=fields, step=0)
  return build.native_rates(fields['model'])[0]


def write_noise(path, *, seconds, rate):
  rng = np.random.default_rng(0)
  with soundfile.SoundFile(path, 'w', samplerate=rate, channels=1, subtype='PCM_16') as file:
    for start in range(0, round(seconds * rate), BLOCK * rate):
      file.write(0.1 * rng.standard_normal(min(BLOCK * rate, round(seconds * rate) - start)))


def call(*arguments):
  """Seconds and MiB of one call of the program."""
  begun = time.monotonic()
  popen = subprocess.Popen([sys.executable, '-m', 'm2l2', *map(str, arguments), '--quiet'],
                           env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(REPOSITORY)})
  _, status, usage = os.wait4(popen.pid, 0)
  if status:
    sys.exit(f'soak_lengths: m2l2 {arguments[0]} ended with status {os.waitstatus_to_exitcode(status)}')
  return {'seconds': time.monotonic() - begun, 'peak_mib': usage.ru_maxrss / 1024}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='base', help='a preset')
  parser.add_argument('--minutes', default='1,2,4', help='lengths (default 1,2,4)')
  args = parser.parse_args()
  minutes = [float(length) for length in args.minutes.split(',')]
  report = {'config': args.config, 'minutes': minutes}
  with tempfile.TemporaryDirectory() as directory:
    place = pathlib.Path(directory)
    maker = subprocess.run([sys.executable, '-c', 'import sys, soak_lengths; '
                            'print(soak_lengths.make_snapshot(*sys.argv[1:]))', args.config, place / 'model'],
                           env={**os.environ, 'JAX_PLATFORMS': 'cpu',
                                'PYTHONPATH': f'{REPOSITORY}:{REPOSITORY}/tests/soak'},
                           check=True, text=True, stdout=subprocess.PIPE)  # its memory is not to count below
    rate, calls = int(maker.stdout), {'encode': [], 'decode': []}
    for length in (1 / 6, *minutes):  # the first compiles
      sound, latents = place / 'in.wav', place / 'latents.safetensors'
      write_noise(sound, seconds=60 * length, rate=rate)
      for name, order in {'encode': ('encode', sound, latents),
                          'decode': ('decode', latents, place / 'out.wav', '--steps=1', '--refine')}.items():
        calls[name].append(call(*order, f'--checkpoint={place / "model"}'))
        print(f'{length:.3g} min, {name}: {calls[name][-1]}', file=sys.stderr, flush=True)
      for path in (sound, latents, place / 'out.wav'):
        path.unlink()
  for name, runs in calls.items():
    seconds, peaks = ([run[key] for run in runs[1:]] for key in ('seconds', 'peak_mib'))
    report[name] = {'seconds': seconds, 'seconds_a_minute': list(np.divide(seconds, minutes)),
                    'seconds_a_minute_more': list(np.diff(seconds) / np.diff(minutes)), 'peak_mib': peaks}
  print(json.dumps(report, indent=2))


if __name__ == '__main__':
  sys.exit(main())
