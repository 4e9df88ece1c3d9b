"""m2l2 as a port under test: the kit's weights and inputs in, its outputs out.

    python tests/conformance/port.py OUTPUTS.npz      then: python tests/conformance/kit.py check OUTPUTS.npz

Another port would have a file like this one in its place.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import kit
import numpy as np

from m2l2 import build
from m2l2.codec.codec import Codec
from m2l2.codec.latents import Latents
from m2l2.configs import codicodec as recipe
from m2l2.interop import codicodec as interop


def make_config(dtype='float32'):
  config = json.loads(json.dumps(recipe.get_config().to_dict()))
  config['model']['dtype'] = dtype
  return config


def make_params(seed):
  return interop.convert_weights(kit.weights(seed), build.network(make_config()).arch)


@functools.cache
def compiled(dtype='float32'):
  """A Codec whose weights are still to be set: what it compiles serves every seed."""
  config = make_config(dtype)
  shapes = build.network(config).shapes
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  return Codec(config=config, params=zeros, fingerprint='kit')


@functools.cache
def calls(dtype='float32'):
  """The network calls that the kit looks into: (encode, decode, denoise), jitted."""
  codec = compiled(dtype)
  net = codec.network
  return (jax.jit(lambda params, spec: codec._bottleneck(net.encode(params, spec))), jax.jit(net.decode),
          jax.jit(lambda params, x, sigma, features: codec.sampler.denoiser(params, features)(x, sigma)))


def make_codec(seed):
  codec = compiled()
  codec.params = jax.tree.map(jnp.asarray, make_params(seed))
  return codec


def representation(codec, audio):
  """[C, N] -> [S, F, T, C]; frames that the signal does not fill are silent."""
  rep = codec.representation
  layout = rep.layout(audio.shape[1])
  padded = np.pad(audio, ((0, 2 // len(audio) - 1), (0, rep.crop_samples(layout.chunks) - audio.shape[1])), 'constant')
  padded = np.broadcast_to(padded[:1], padded.shape) if len(audio) == 1 else padded
  spec = np.array(jax.jit(rep.analyse)(padded))
  frames = np.arange(layout.chunks * rep.frames).reshape(layout.chunks, 1, rep.frames, 1)
  return np.where(frames < layout.frames, spec, 0)


def encoder_outputs(codec, seed):
  audio = kit.audio(seed)
  return {f'{seed}/representation': representation(codec, audio),
          f'{seed}/latents': codec.encode(audio, 44100).z[0],
          f'{seed}/latents_mono': codec.encode(kit.audio(seed, channels=1), 44100).z[0],
          f'{seed}/tokens': codec.encode(audio, 44100, discrete=True).z[0]}


def network_outputs(codec, seed):
  _, decode, denoise = calls()
  features = decode(codec.params, kit.latents(seed, chunks=2)[None])
  outputs = {f'{seed}/features/{level}': np.asarray(maps[0]) for level, maps in enumerate(features['maps'])}
  for i, pair in enumerate(kit.LEVEL_PAIRS):
    out = denoise(codec.params, kit.noisy_pair(seed, pair)[None], np.float32([pair]), features)
    outputs[f'{seed}/denoiser/{i}'] = np.asarray(out[0])
  return outputs


def whole(codec, z):
  """z [chunks, K, d] as Latents of a signal that fills the chunks."""
  return Latents(z=z[None], sample_rate=44100, num_samples=codec.representation.crop_samples(len(z)), channels=2,
                 model=codec.fingerprint)


def waveform(codec, decoder, *, chunks):
  """One decoder's waveform [2, samples]."""
  steps, z = kit.DECODERS[decoder], kit.latents(0, chunks=chunks)
  noise = kit.noises(0, chunks=chunks, roles=steps + 1)
  if decoder == 'live':
    pieces = codec.stream(iter(z), steps=steps, noise=noise)
    return np.concatenate([next(pieces) for _ in range(chunks)], axis=1)
  return codec.decode(whole(codec, z), mode=decoder, steps=steps, noise=noise)


def main(argv):
  if len(argv) != 1:
    print(__doc__, file=sys.stderr)
    return 2
  outputs = {}
  for seed in kit.SEEDS:
    codec = make_codec(seed)
    outputs |= encoder_outputs(codec, seed) | network_outputs(codec, seed)
    if seed == 0:
      outputs |= {f'0/{decoder}/{chunks}/waveform': waveform(codec, decoder, chunks=chunks)
                  for decoder in kit.DECODERS for chunks in kit.CHUNKS}
  np.savez(argv[0], **outputs)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
