"""Latents and tokens between m2l2 and the torch package, in the form of its public functions."""

import numpy as np

from m2l2.codec.latents import Latents
from m2l2.errors import UserError

LATENT_SCALE = 0.8  # public latents are atanh(z) / 0.8
LATENT_WIDTH = 64   # and 16 embeddings of 4 numbers make one of 64


def to_public(latents: Latents, *, width: int = LATENT_WIDTH) -> np.ndarray:
  """Latents -> the form that `EncoderDecoder.encode` of the torch package returns and its `decode` takes.

  Args:
    latents: one stream: continuous z [1, chunks, K, d], or tokens [1, chunks, K].
    width: numbers that one public latent holds; a multiple of d.

  Returns:
    float32 [chunks, K d / width, width]: atanh(z) / 0.8, neighbouring embeddings side by side; tokens are
    unchanged, int32 [chunks, K].

  Raises UserError: several streams, or a width that does not fit.
  """
  if latents.z.shape[0] != 1:
    raise UserError(f'CoDiCodec has one stream of latents, these have {latents.z.shape[0]}')
  z = latents.z[0]
  if np.issubdtype(z.dtype, np.integer):
    return z.astype(np.int32)
  chunks, count, dim = z.shape
  if width < 1 or width % dim or count * dim % width:
    raise UserError(f'width is {width}; it must be a multiple of {dim} that divides {count * dim}')
  return (np.arctanh(z) / np.float32(LATENT_SCALE)).reshape(chunks, -1, width)


def from_public(public, codec, *, sample_rate: int, num_samples: int | None = None) -> Latents:
  """The inverse of `to_public`, for a Codec with CoDiCodec's weights.

  Args:
    public: float [chunks, any, any] as of `to_public`, or int tokens [chunks, K].
    sample_rate, num_samples: of the signal. Without num_samples, at a native rate, all that the chunks decode to is
      the signal, as in the torch package: chunks * 32768 + 1024 samples.

  Raises UserError: numbers that do not make up chunks of this model's latents, NaN, tokens out of range, a length
    that is not these chunks', or a foreign rate without a length.
  """
  arch, rep = codec.network.arch, codec.representation
  public = np.asarray(public)
  tokens = np.issubdtype(public.dtype, np.integer)
  size = arch.num_latents * (1 if tokens else arch.latent_dim)
  if public.ndim != (2 if tokens else 3) or not public.size or public[0].size != size:
    numbers = arch.num_latents * arch.latent_dim
    raise UserError(f'CoDiCodec latents are [chunks, a, b] with a * b = {numbers}, or tokens [chunks, '
                    f'{arch.num_latents}]; these are {list(public.shape)}')
  if tokens:
    codes = arch.fsq_levels ** arch.latent_dim
    if public.min() < 0 or public.max() >= codes:
      raise UserError(f'the tokens reach beyond 0..{codes - 1}')
    z = public.astype(np.int32)[None]
  else:
    z = np.tanh(public.astype(np.float32) * np.float32(LATENT_SCALE))
    z = z.reshape(1, len(public), arch.num_latents, arch.latent_dim)
  if not np.isfinite(z).all():
    raise UserError('the latents hold NaN or infinite numbers')
  if num_samples is None and sample_rate not in codec.native_rates:
    raise UserError(f'sample_rate is {sample_rate}; say num_samples too, or take one of {codec.native_rates}')
  num_samples = rep.crop_samples(len(public)) if num_samples is None else num_samples
  if min(num_samples, sample_rate) < 1 or codec.layout(num_samples, sample_rate).chunks != len(public):
    raise UserError(f'{num_samples} samples at {sample_rate} Hz are not what {len(public)} chunks hold')
  return Latents(z=z, sample_rate=int(sample_rate), num_samples=int(num_samples), channels=rep.channels,
                 model=codec.fingerprint)
