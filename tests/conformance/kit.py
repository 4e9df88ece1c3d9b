"""Conformance kit for CoDiCodec-shaped models: seeded weights and inputs, reference outputs, a checker. Needs numpy.

    python tests/conformance/kit.py export DIR          weights and inputs as .npz, for a port in any language
    python tests/conformance/kit.py check OUTPUTS.npz   a port's outputs against the reference; status 1 if one fails

README.md beside this file says what the cases are. Nothing here knows torch, JAX or m2l2.
"""

import functools
import json
from pathlib import Path
import sys
import zlib

import numpy as np

HERE = Path(__file__).parent
REFERENCE = HERE / 'reference.npz'
TOLERANCE = 1e-4   # of ||a - b|| / ||b||
BUCKETS = 1024     # numbers of a sketch; its norm is right to 2 %
NEAR_EDGE = 1e-4   # a latent so near to where rounding changes may round either way

SEEDS = (0, 1, 2)
CHUNKS = (1, 2, 7)     # lengths of the decoders' cases
DECODERS = {'autoregressive': 2, 'parallel': 4, 'live': 2}  # and their steps
ROLES = 5              # noises a chunk: see `noise`
BINS, FRAMES, CHANNELS, HOP = 1024, 32, 4, 1024
LATENTS, WIDTH, LEVELS = 128, 4, 11
SIGMA_COND = 0.9654169263318955  # sigma(0.4)
LEVEL_PAIRS = ((SIGMA_COND, 80.0), (0.002, 0.002), (SIGMA_COND, 2.515), (80.0, 80.0), (0.17, 17.5))


# ---- random numbers that stay the same ------------------------------------------------------------------------


def raw(*key, size):
  """uint64 [size]: Philox, a function of the key (strings and ints) alone; numpy keeps bit streams stable."""
  digest = [zlib.crc32(repr(part).encode()) for part in key]
  words = np.random.SeedSequence(digest).generate_state(2, np.uint64)
  return np.random.Philox(key=words).random_raw(size)


def uniform(*key, shape):
  """float32, mean 0, variance 1: 24 random bits each, so exactly the same everywhere."""
  size = int(np.prod(shape))
  words = raw(*key, size=-(-size // 2)).view(np.uint32)[:size]
  numbers = (words >> 8).astype(np.float32) * np.float32(2 ** -23) - np.float32(1 - 2 ** -24)
  return (numbers * np.float32(3 ** 0.5)).reshape(shape)


def normal(*key, shape):
  """float32 standard normal, by Box and Muller in float64."""
  size = int(np.prod(shape))
  half = -(-size // 2)
  bits = raw(*key, size=2 * half)
  u = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0 ** -53
  radius, angle = np.sqrt(-2 * np.log(u[:half])), 2 * np.pi * u[half:]
  return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size].astype(np.float32).reshape(shape)


# ---- weights --------------------------------------------------------------------------------------------------


def tensors():
  """Name -> shape of the whole state dict, torch's layouts."""
  return json.loads((HERE / 'tensors.json').read_text())


def constant(name, shape):
  """The value of a tensor that is never trained, or None."""
  if name.endswith('.down.weight'):
    return np.full(shape, 1 / (shape[2] * shape[3]), np.float32)
  if name.endswith('.up.weight'):  # averages groups of channels into half as many
    return np.full(shape, 0.5, np.float32)
  if name == 'fsq._levels_tensor':
    return np.full(shape, LEVELS, np.int64)
  if name == 'fsq._basis_tensor':
    return LEVELS ** np.arange(shape[0], dtype=np.int64)
  return None


def weight(name, shape, seed):
  """One tensor: a function of name and seed. Nothing is zero, or half of the model would go untested."""
  fixed = constant(name, shape)
  if fixed is not None:
    return fixed
  u = uniform('weight', name, seed, shape=shape)
  if len(shape) == 1 and (name.endswith('.g') or name.endswith('.weight')) or name == 'gain_encoder':
    return np.float32(1) + np.float32(0.2) * u
  if name.endswith('.bias'):
    return np.float32(0.1) * u
  if not name.endswith('.weight'):  # positions, queries, registers, masks
    return u
  # A transposed convolution is stored [in, out, F, T]; its kernel is its stride, so each output has `in` summands.
  fan_in = shape[0] if '.up_layers.' in name and name.endswith('.c.weight') else np.prod(shape[1:])
  gain = 0.3 if 'cond_proj' in name or name == 'gain_decoder.4.weight' else 1.0
  if name.endswith(('ff2.weight', '.c.weight', 'to_out.weight')):  # ends of residual branches
    gain = 0.5
  return np.float32(gain / fan_in ** 0.5) * u


def weights(seed):
  """The whole state dict of a seed: 148.5 million numbers, a few seconds."""
  return {name: weight(name, tuple(shape), seed) for name, shape in tensors().items()}


# ---- inputs ---------------------------------------------------------------------------------------------------


def audio(seed, *, channels=2, chunks=2):
  """float32 [channels, samples] in [-1, 1]: partials and noise; its last chunk is only partly there."""
  samples = chunks * FRAMES * HOP - 9_999
  time = np.arange(samples) / 44100
  rng_phase = uniform('phase', seed, shape=(channels, 8)).astype(np.float64)
  pitches = 110.0 * np.arange(1, 9) * 1.25 ** np.arange(channels)[:, None]
  tones = np.sin(2 * np.pi * pitches[..., None] * time + rng_phase[..., None])
  mix = 0.08 * tones.sum(axis=1) + 0.05 * normal('audio', seed, shape=(channels, samples))
  return mix.astype(np.float32)


def spectrogram(seed, *, chunks=2):
  """float32 [chunks, F, T, C], the scale of compressed music."""
  return np.float32(0.3) * normal('spectrogram', seed, shape=(chunks, BINS, FRAMES, CHANNELS))


def latents(seed, *, chunks):
  """float32 [chunks, K, d] in (-1, 1): chunk by chunk, so that fewer chunks are a prefix of more."""
  return np.stack([np.float32(0.999) * np.tanh(normal('latents', seed, chunk, shape=(LATENTS, WIDTH)))
                   for chunk in range(chunks)])


@functools.cache
def noise(seed, chunk, role):
  """Unit noise float32 [F, T, C] of one chunk.

  Roles: 0 what it starts from; 1 what is put on it as the next chunk's left neighbour; 2, 3, ... what is put on it
  before its second denoising, its third and so on.
  """
  return normal('noise', seed, chunk, role, shape=(BINS, FRAMES, CHANNELS))


def noises(seed, *, chunks, roles):
  """float32 [chunks, roles, F, T, C]."""
  return np.stack([np.stack([noise(seed, chunk, role) for role in range(roles)]) for chunk in range(chunks)])


def noisy_pair(seed, levels):
  """The denoiser's input at two noise levels: float32 [2, F, T, C]."""
  eps = np.stack([noise(seed, chunk, 0) for chunk in range(2)])
  return spectrogram(seed) + np.float32(levels)[:, None, None, None] * eps


# ---- outputs --------------------------------------------------------------------------------------------------


def cases():
  """Name -> what a port has to compute. Shapes have chunks first; maps are [chunks, F, T, C]."""
  outputs = {}
  for seed in SEEDS:
    outputs[f'{seed}/representation'] = f'compressed spectrogram of audio({seed}), zero-padded to whole chunks'
    outputs[f'{seed}/latents'] = f'continuous latents [2, 128, 4] of audio({seed})'
    outputs[f'{seed}/latents_mono'] = f'the same of audio({seed}, channels=1)'
    outputs[f'{seed}/tokens'] = f'tokens int [2, 128] of audio({seed})'
    for level in range(10):
      outputs[f'{seed}/features/{level}'] = (
          f'decoder features of latents({seed}, chunks=2), level {level}, finest first')
    for i, pair in enumerate(LEVEL_PAIRS):
      outputs[f'{seed}/denoiser/{i}'] = f'denoised noisy_pair({seed}, {pair}) given latents({seed}, chunks=2)'
  for decoder, steps in DECODERS.items():
    for chunks in CHUNKS:
      samples = chunks * FRAMES * HOP + (0 if decoder == 'live' else HOP)
      outputs[f'0/{decoder}/{chunks}/waveform'] = (
          f'waveform [2, {samples}] of {decoder} decoding in {steps} steps of latents(0, chunks={chunks}) with '
          'noise(0, chunk, role)')
  return outputs


RAW = ('latents', 'latents_mono', 'tokens')  # stored whole, as they are small


def is_raw(name):
  return name.split('/')[-1] in RAW


def sketch(name, array):
  """float64 [BUCKETS]: signed sums of random groups of elements (a count sketch).

  It is linear, and its norm estimates the array's without bias, so the norm of a difference of two sketches
  estimates the norm of the difference; any misplaced element shows.
  """
  array = np.asarray(array)
  bits = raw('sketch', name.split('/', 1)[1], size=array.size)
  signs = 1.0 - 2.0 * (bits & np.uint64(1)).astype(np.float64)
  groups = (bits >> np.uint64(8)) % np.uint64(BUCKETS)
  return np.bincount(groups.astype(np.int64), weights=signs * array.ravel().astype(np.float64), minlength=BUCKETS)


def record(name, array):
  """What the reference stores of an output."""
  array = np.asarray(array)
  if is_raw(name):
    return {name: array}
  return {name: sketch(name, array).astype(np.float32), f'{name}#shape': np.asarray(array.shape)}


def relative_error(name, array, reference):
  """||array - reference|| / ||reference||, for outputs stored as sketches to within some 2 %.

  Raises ValueError: another shape.
  """
  array = np.asarray(array)
  if is_raw(name):
    a, b = array, reference[name]
    shape = b.shape
  else:
    shape = tuple(reference[f'{name}#shape'].tolist())
    a, b = None, reference[name].astype(np.float64)
  if array.shape != shape:
    raise ValueError(f'{name} is {list(array.shape)}, should be {list(shape)}')
  if not np.isfinite(array).all():
    return float('inf')
  a = sketch(name, array) if a is None else a
  return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def wrong_tokens(tokens, reference_tokens, reference_latents):
  """-> (wrong, excused): tokens that differ; of these, those with a latent within NEAR_EDGE of a rounding edge."""
  if np.shape(tokens) != np.shape(reference_tokens):
    raise ValueError(f'tokens are {list(np.shape(tokens))}, should be {list(np.shape(reference_tokens))}')
  differ = np.asarray(tokens) != reference_tokens
  scaled = reference_latents.astype(np.float64) * (LEVELS // 2)
  distance = np.abs(scaled - np.floor(scaled) - 0.5) / (LEVELS // 2)
  near = (distance < NEAR_EDGE).any(axis=-1)
  return int((differ & ~near).sum()), int((differ & near).sum())


def load_reference():
  with np.load(REFERENCE) as file:
    return {name: file[name] for name in file.files}


def check(outputs, *, names=None):
  """-> one (name and remark, error, passed) per case; an output that is missing or misshapen has the error nan."""
  reference, rows = load_reference(), []
  for name in names or cases():
    if name not in outputs:
      rows.append((f'{name} is missing', float('nan'), False))
      continue
    try:
      if name.endswith('/tokens'):
        seed = name.split('/')[0]
        wrong, excused = wrong_tokens(outputs[name], reference[name], reference[f'{seed}/latents'])
        rows.append((f'{name} ({excused} near an edge differ)', float(wrong), not wrong))
      else:
        error = relative_error(name, outputs[name], reference)
        rows.append((name, error, error < TOLERANCE))
    except ValueError as error:
      rows.append((str(error), float('nan'), False))
  return rows


def _export(folder):
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for seed in SEEDS:
    np.savez(folder / f'weights{seed}.npz', **weights(seed))
    inputs = {'audio': audio(seed), 'audio_mono': audio(seed, channels=1), 'latents': latents(seed, chunks=max(CHUNKS)),
              **{f'noisy_pair{i}': noisy_pair(seed, pair) for i, pair in enumerate(LEVEL_PAIRS)}}
    if seed == 0:
      inputs['noise'] = noises(0, chunks=max(CHUNKS), roles=ROLES)
    np.savez(folder / f'inputs{seed}.npz', **inputs)
  (folder / 'cases.json').write_text(json.dumps(cases(), indent=1))
  print(f'{folder}: weights and inputs of {len(SEEDS)} seeds, and cases.json: what to compute from them')


def main(argv):
  if len(argv) != 2 or argv[0] not in ('export', 'check'):
    print(__doc__, file=sys.stderr)
    return 2
  if argv[0] == 'export':
    _export(argv[1])
    return 0
  try:
    with np.load(argv[1], allow_pickle=False) as file:
      rows = check({name: file[name] for name in file.files})
  except Exception as error:  # of a file that is none: any at all
    print(f'{argv[1]}: is not an .npz file of outputs ({error})', file=sys.stderr)
    return 2
  for name, error, passed in rows:
    print(f'{"ok  " if passed else "FAIL"} {error:9.2e}  {name}')
  failed = sum(not passed for _, _, passed in rows)
  print(f'{len(rows) - failed} of {len(rows)} cases pass')
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
