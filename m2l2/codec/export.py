"""A snapshot as portable programs: StableHLO and weights that JAX alone runs, without m2l2.

A folder holds two programs (encode, step: those of `encoding` and `sampler`, lowered for CPU, CUDA and TPU, for any
batch), weights.npz, about.json with the numbers that a caller needs, and load.py, which calls them.
"""

import json
import os

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from m2l2 import files
from m2l2.codec.sampler import REFINE
from m2l2.data.audio_io import shown
from m2l2.errors import UserError
from m2l2.kernels.chunk_causal import compiling_for
from m2l2.model.parameters import by_path

PLATFORMS = ('cpu', 'cuda', 'tpu')

LOADER = '''\
"""Runs an exported Music2Latent2 model; needs jax and flatbuffers. Audio: [batch, channels, samples], float32."""
import json, pathlib
import jax, jax.export, jax.numpy as jnp, numpy as np


class Model:
  def __init__(self, folder):
    folder = pathlib.Path(folder)
    self.about = json.loads((folder / 'about.json').read_text())
    self.weights = {name: jnp.asarray(array) for name, array in np.load(folder / 'weights.npz').items()}
    self.run = {name: jax.jit(jax.export.deserialize((folder / f'{name}.stablehlo').read_bytes()).call)
                for name in ('encode', 'step')}

  def encode(self, audio):  # -> [batch, chunks, K, d]
    a, n = self.about, audio.shape[-1] + self.about['lead']
    frames = -(-n // a['hop']) if a['lead'] else max(1, (n - a['overlap']) // a['hop'])
    chunks = -(-frames // a['frames'])
    size = a['chunk_samples'] + a['overlap']
    audio = jnp.pad(audio, ((0, 0), (0, 0), (a['lead'], chunks * a['chunk_samples'] + a['overlap'])))
    windows = [audio[..., i * a['chunk_samples']:][..., :size] for i in range(chunks)]
    return jnp.stack([self.run['encode'](self.weights, w, np.int32(min(a['frames'], frames - i * a['frames'])))
                      for i, w in enumerate(windows)], axis=1)

  def decode(self, z, seed=0):  # any number of samples may be cut off its end
    seed, sigma = np.uint32(seed), np.float32(self.about['sigma_cond'])
    batch, pieces = z.shape[0], []
    state = [jnp.zeros((batch, *shape), dtype) for shape, dtype in self.about['state']]
    if self.about['refine']:  # a step gives the chunk before, refined: one more for the last
      z = jnp.pad(z, ((0, 0), (0, 1), (0, 0), (0, 0)))
    for i in range(z.shape[1]):  # one chunk a call: play each piece as it comes
      audio, state = self.run['step'](self.weights, state, z[:, i], seed, np.int32(i), sigma)
      pieces.append(audio)
    pieces = pieces[1:] if self.about['refine'] else pieces
    pieces.append(state[self.about['tail']])
    return jnp.clip(jnp.concatenate(pieces, axis=-1)[..., self.about['lead']:], -1, 1)
'''


def portable(config) -> dict:
  """The config of the same model, lowered the same way for every platform."""
  return {**config, 'model': {**config['model'], 'attention': 'xla', 'dtype': 'float32'},
          'variants': {**config.get('variants', {}), 'packing': {'tile': '0'}}}


def programs(codec) -> dict:
  """{name: jax.export.Exported} of a codec made from a `portable` config, for any batch b.

  weights is a flat dict of float32 arrays, state a list of arrays [b, ...], zeros at first (`first_state`);
  seed uint32, index int32 and sigma_cond float32 are scalars.

    encode(weights, audio [b, channels, chunk_samples + overlap], frames int32) -> z [b, K, d]
    step(weights, state, z [b, K, d], seed, index, sigma_cond) -> (audio [b, channels, chunk_samples], state)

  A step is `Sampler.step`: with `refine` it returns the chunk before, and one more step returns the last.
  """
  sampler, consistency, arch = codec.sampler, codec.consistency, codec.network.arch
  names, treedef = list(by_path(codec.params)), jax.tree.structure(codec.params)
  sigmas, refine = consistency.schedule(consistency.steps), bool(consistency.refine)
  roles = len(sigmas) + 1

  def nested(weights):
    return jax.tree.unflatten(treedef, [weights[name] for name in names])

  def noise(seed, index):
    return sampler.noise(jax.random.key(seed), index[None], roles=roles)[0]

  def encode(weights, audio, frames):
    return codec.encode_fn(nested(weights), audio, frames)[:, 0]

  first, structure = jax.tree.flatten(first_state(codec))

  def step(weights, state, z, seed, index, sigma_cond):
    left_noise = noise(seed, jnp.maximum(index - 1, 0))[REFINE]
    audio, state = sampler.step(nested(weights), jax.tree.unflatten(structure, state), z, index, left_noise,
                                noise(seed, index), sigma_cond, sigmas=sigmas, refine=refine)
    return audio, jax.tree.leaves(state)

  rep = codec.representation
  batch, = jax.export.symbolic_shape('b')
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  weights = {name: f32(*leaf.shape) for name, leaf in by_path(codec.params).items()}
  audio, z = f32(batch, rep.channels, rep.crop_samples(1)), f32(batch, arch.num_latents, arch.latent_dim)
  seed, index, sigma = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32), f32()
  exported = {}

  def export(function, *args):
    exported[function.__name__] = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*args)

  with compiling_for('cpu'):
    export(encode, weights, audio, index)
    state = [jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype) for leaf in first]
    export(step, weights, state, z, seed, index, sigma)
  return exported


def first_state(codec) -> dict:
  """The state that decoding of one stream starts from."""
  arch = codec.network.arch
  return codec.sampler.state(codec.params, (1, 1, arch.num_latents, arch.latent_dim))


def export_stablehlo(codec, target):
  """Writes the folder `target`. Raises UserError: it exists, or cannot be written."""
  check_target(target)
  rep, consistency = codec.representation, codec.consistency
  state = by_path(first_state(codec))
  about = {
      'fingerprint': codec.fingerprint, 'sample_rate': codec.native_rates[0], 'native_rates': list(codec.native_rates),
      'channels': rep.channels, 'latents': [codec.network.arch.num_latents, codec.network.arch.latent_dim],
      'chunk_samples': rep.chunk_samples, 'overlap': rep.overlap, 'hop': rep.hop, 'frames': rep.frames,
      'lead': rep.layout(1).lead, 'sigma_cond': consistency.sigma_cond, 'steps': consistency.steps,
      'refine': consistency.refine,
      'state': [[list(leaf.shape[1:]), str(leaf.dtype)] for leaf in state.values()],
      'tail': list(state).index('tail'), 'platforms': list(PLATFORMS)}
  exported = programs(codec)
  with files.whole(target) as aside:
    os.makedirs(aside)
    for name, program in exported.items():
      _write(aside, f'{name}.stablehlo', program.serialize())
    np.savez(os.path.join(aside, 'weights.npz'), **jax.tree.map(np.asarray, by_path(codec.params)))
    _write(aside, 'about.json', (json.dumps(about, indent=2) + '\n').encode())
    _write(aside, 'load.py', LOADER.encode())


def check_target(target):
  """Raises UserError if `export_stablehlo` could not write; deletes temporary files of a killed one."""
  if os.path.lexists(target):
    raise UserError(f'{shown(target)}: is there already; name another folder, or remove it')
  folder = os.path.dirname(os.path.realpath(target))
  if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
    raise UserError(f'{shown(target)}: cannot be written: {shown(folder)} is no directory that may be written to')
  files.remove_leftovers(os.path.realpath(target))


def _write(folder, name, data: bytes):
  with open(os.path.join(folder, name), 'wb') as file:
    file.write(data)
