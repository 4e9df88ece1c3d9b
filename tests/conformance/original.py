"""The original, CoDiCodec's torch package, run on the kit's weights and inputs; writes reference.npz.

    pip install torch codicodec numpy
    python tests/conformance/original.py   makes reference.npz and tensors.json beside it again (some 5 minutes)

Only its public classes and methods are called; its noise is replaced by the kit's, its mixed precision switched off.
"""

import contextlib
import json
import sys
import time

import codicodec.inference
import codicodec.models
import codicodec.utils
import kit
import numpy as np
import torch

codicodec.utils.mixed_precision = False  # float32 throughout


def load(state):
  """numpy state dict -> the original's network."""
  network = codicodec.models.UNet().eval()
  network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()}, strict=True)
  return network


def package(network):
  """The package's user-facing object around a network; its constructor would fetch the published weights."""
  codec = object.__new__(codicodec.inference.EncoderDecoder)
  codec.device = torch.device('cpu')
  codec.gen = network
  codec.latents_per_timestep, codec.bottleneck_channels = kit.LATENTS, kit.WIDTH
  codec.reset()
  return codec


@contextlib.contextmanager
def injected(arrays):
  """torch.randn and torch.randn_like give these arrays, one after the other, and then zeros."""
  queue = iter(arrays)
  before = torch.randn, torch.randn_like

  def draw(shape, **options):
    array = next(queue, None)
    if array is None:
      return torch.zeros(shape)
    assert tuple(array.shape) == tuple(shape), (array.shape, shape)
    return torch.from_numpy(np.ascontiguousarray(array))

  torch.randn = lambda shape, **options: draw(shape)
  torch.randn_like = lambda like: draw(like.shape)
  try:
    yield
  finally:
    torch.randn, torch.randn_like = before


def to_torch(chunks):
  """[S, F, T, C] -> [1, C, F, S T]."""
  return np.concatenate([np.moveaxis(chunk, -1, 0) for chunk in chunks], axis=-1)[None]


def from_torch(tensor, chunks):
  """[1, C, F, S T] -> [S, F, T, C]."""
  parts = np.split(np.asarray(tensor)[0], chunks, axis=-1)
  return np.stack([np.moveaxis(part, 0, -1) for part in parts])


def join(z):
  """[S, K, d] -> tensor [1, S K, d]."""
  return torch.from_numpy(z.reshape(1, -1, z.shape[-1]))


@torch.no_grad()
def representation(audio):
  """[C, N] -> [S, F, T, C], padded as its encoder pads."""
  audio = np.repeat(audio, 2, axis=0) if len(audio) == 1 else audio
  spec = codicodec.inference.to_representation_encoder(torch.from_numpy(audio)[None])
  missing = -spec.shape[-1] % kit.FRAMES
  spec = torch.nn.functional.pad(spec, (0, missing))
  return from_torch(spec, spec.shape[-1] // kit.FRAMES)


def latents(codec, audio):
  """Continuous latents [S, K, d], from the package's public ones."""
  public = codec.encode(audio)
  return codec.dim2latents(torch.tanh(public * 0.8)).numpy()


@torch.no_grad()
def features(network, z):
  """Ten maps [S, F, T, C], finest first."""
  return [from_torch(level, len(z)) for level in network.pre_decoder_forward(join(z))]


@torch.no_grad()
def denoise(network, noisy, z, levels):
  """[2, F, T, C] at two noise levels -> denoised."""
  out = network.decoder_forward(torch.from_numpy(to_torch(noisy)), join(z), sigma_left=levels[0], sigma_right=levels[1])
  return from_torch(out, 2)


def _drawn_autoregressively(noises, steps):
  """The noise in the order in which the original's autoregressive decoders draw it."""
  for i, chunk in enumerate(noises):
    yield to_torch(chunk[:1])
    if i:
      yield to_torch(noises[i - 1][1:2])
    for k in range(2, steps + 1):
      yield to_torch(chunk[k:k + 1])
    yield np.zeros_like(to_torch(chunk[:1]))  # drawn after the last step, at sigma_min: never used


@torch.no_grad()
def autoregressive(network, z, noises, steps):
  with injected(_drawn_autoregressively(noises, steps)):
    spec = network.decode_autoregressive(join(z), denoising_steps=steps)
  return from_torch(spec, len(z)), _waveform(spec)


@torch.no_grad()
def parallel(network, z, noises, steps):
  chunks = len(z)
  odd = chunks % 2
  z = np.concatenate([z, np.zeros_like(z[:1])]) if odd else z
  noises = np.concatenate([noises, np.zeros_like(noises[:1])]) if odd else noises
  with injected(to_torch(noises[:, role]) for role in (0, *range(2, steps + 1))):
    spec = network.decode_parallel(join(z), denoising_steps=steps)[..., :chunks * kit.FRAMES]
  return from_torch(spec, chunks), _waveform(spec)


@torch.no_grad()
def live(network, z, noises, steps):
  """Chunk by chunk; the waveform has 32768 samples a chunk."""
  specs, pieces, past, past_z = [], [], None, None
  with injected(_drawn_autoregressively(noises, steps)):
    for chunk in z:
      chunk = torch.from_numpy(chunk)[None]
      spec = network.decode_autoregressive_step(chunk, past_repr=past, past_latents=past_z, denoising_steps=steps)
      past, past_z = spec[..., -kit.FRAMES:], chunk
      specs.append(from_torch(past, 1)[0])
      pieces.append(_waveform(spec)[:, kit.FRAMES * kit.HOP:-kit.HOP])
  return np.stack(specs), np.concatenate(pieces, axis=1)


DECODERS = {'autoregressive': autoregressive, 'parallel': parallel, 'live': live}


def _waveform(spec):
  return codicodec.inference.to_waveform(spec)[0].numpy()


def outputs(seed, network):
  """Every case of a seed, (name, array) one by one."""
  codec, audio = package(network), kit.audio(seed)
  yield f'{seed}/representation', representation(audio)
  yield f'{seed}/latents', latents(codec, audio)
  yield f'{seed}/latents_mono', latents(codec, kit.audio(seed, channels=1))
  yield f'{seed}/tokens', codec.encode(audio, discrete=True).numpy()
  z = kit.latents(seed, chunks=2)
  for level, maps in enumerate(features(network, z)):
    yield f'{seed}/features/{level}', maps
  for i, pair in enumerate(kit.LEVEL_PAIRS):
    yield f'{seed}/denoiser/{i}', denoise(network, kit.noisy_pair(seed, pair), z, pair)
  if seed:
    return
  for decoder, steps in kit.DECODERS.items():
    for chunks in kit.CHUNKS:
      # Its autoregressive decoder fails on a single chunk, where it reads the next one's latents: live decoding,
      # which sees nothing of the future, gives that chunk.
      run = live if decoder == 'autoregressive' and chunks == 1 else DECODERS[decoder]
      noises = kit.noises(0, chunks=chunks, roles=kit.ROLES)
      spec, waveform = run(network, kit.latents(0, chunks=chunks), noises, steps)
      if run is live and decoder != 'live':
        waveform = _waveform(torch.from_numpy(to_torch(spec)))
      yield f'0/{decoder}/{chunks}/waveform', waveform


def main():
  start, stored = time.time(), {}
  shapes = {name: list(tensor.shape) for name, tensor in codicodec.models.UNet().state_dict().items()}
  lines = ',\n'.join(f'  {json.dumps(name)}: {shape}' for name, shape in shapes.items())
  (kit.HERE / 'tensors.json').write_text(f'{{\n{lines}\n}}\n')
  for seed in kit.SEEDS:
    network = load(kit.weights(seed))
    for name, array in outputs(seed, network):
      stored |= kit.record(name, array)
      print(f'{time.time() - start:6.1f} s  {name} {list(array.shape)} rms {np.sqrt(np.mean(np.square(array))):.3g} '
            f'peak {np.abs(array).max():.3g}', flush=True)
  np.savez_compressed(kit.REFERENCE, **stored)
  print(f'{kit.REFERENCE}: {kit.REFERENCE.stat().st_size / 1e6:.2f} MB')
  return 0


if __name__ == '__main__':
  sys.exit(main())
