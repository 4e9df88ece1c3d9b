"""Decoding on the host: checks the options, then passes blocks of latents and noise through the compiled programs of
the sampler, each with the state that the block before returned.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import types
from typing import Any

import jax
import numpy as np

from m2l2.codec import output, programs
from m2l2.codec.sampler import Sampler
from m2l2.consistency import Consistency
from m2l2.errors import UserError
from m2l2.variants.consistency import VariantConsistency

MODES = ('autoregressive', 'parallel')
MOST_STEPS = 16


def check_options(consistency: Consistency, *, chunks: int, seed: int, mode: str, steps: int | None,
                  sigma_cond: float | None):
  """Raises UserError for options that do not suit a model that denoises `chunks` chunks together."""
  if mode not in MODES:
    raise UserError(f'decoding mode {mode!r} is not known: choose from {", ".join(MODES)}')
  if steps is not None and not 1 <= steps <= MOST_STEPS:
    raise UserError(f'steps is {steps}; it must lie in 1..{MOST_STEPS}')
  if not 0 <= seed < 2 ** 32:
    raise UserError(f'the seed is {seed}; it must lie in 0..{2 ** 32 - 1}')
  if mode == 'parallel' and chunks == 1:
    raise UserError('this model denoises each chunk alone: there are no pairs to decode in parallel')
  if mode == 'parallel' and sigma_cond is not None:
    raise UserError('parallel decoding has no sigma_cond: leave it out, or decode autoregressively')
  if sigma_cond is not None and not consistency.sigma_min <= sigma_cond <= consistency.sigma_max:
    raise UserError(f'sigma_cond is {sigma_cond}; it must lie in '
                    f'{consistency.sigma_min}..{consistency.sigma_max}')


def to_continuous(z, lead: tuple[int, int], *, arch, tokens, nested: bool) -> np.ndarray:
  """Latents [streams, chunks, K, d] or tokens [streams, chunks, K] -> float32 [streams, chunks, K, d], checked.

  Args:
    lead: required streams and chunks.
    arch: of the model, with K and d. tokens: its FSQ bottleneck if it has tokens, else None.
    nested: whether the first few of the K embeddings are enough; the others are set to zero.

  Raises UserError: another shape, tokens for a model that has none, NaN, infinity or numbers out of range.
  """
  z = np.asarray(z)
  discrete = np.issubdtype(z.dtype, np.integer)
  if discrete and tokens is None:
    raise UserError('these latents are tokens, but this model has only continuous ones')
  shape = (*lead, arch.num_latents) if discrete else (*lead, arch.num_latents, arch.latent_dim)
  if nested and z.ndim == 4 and 0 < z.shape[2] < shape[2]:
    z = np.pad(z, [(0, 0), (0, 0), (0, shape[2] - z.shape[2]), (0, 0)])
  if z.shape != shape:
    raise UserError(f'latents of shape {list(z.shape)} do not fit: the signal and this model make them '
                    f'{list(shape)} (streams, chunks, embeddings{"" if discrete else ", numbers"})')
  if not np.isfinite(z).all():
    raise UserError('the latents hold NaN or infinite numbers')
  if not discrete and np.abs(z).max() > 1.001:
    raise UserError(f'the latents reach {np.abs(z).max():.3g}, but lie in [-1, 1]: clip them, or bring them back to '
                    "this scale (CoDiCodec's public latents: m2l2.interop.codicodec.from_public)")
  if discrete:
    codes = tokens.levels ** arch.latent_dim
    if z.min() < 0 or z.max() >= codes:
      raise UserError(f'the latents hold tokens beyond 0..{codes - 1}')
    z = np.asarray(tokens.codes(z, width=arch.latent_dim))
  return z.astype(np.float32)


def side_by_side(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Latents [streams, chunks, K, d] of several signals, at least one -> (all streams in one array float32 [B, most
  chunks, K, d], padded with zeros; each stream's chunks, int32 [B]). B is a power of two, for few shapes."""
  chunks = np.repeat([z.shape[1] for z in values], [len(z) for z in values]).astype(np.int32)
  chunks = np.pad(chunks, (0, (1 << (len(chunks) - 1).bit_length()) - len(chunks)))
  together = np.zeros((len(chunks), chunks.max(), *values[0].shape[2:]), np.float32)
  start = 0
  for z in values:
    together[start:start + len(z), :z.shape[1]] = z
    start += len(z)
  return together, chunks


@dataclasses.dataclass(frozen=True)
class BlockDecoder:
  """Decodes blocks of chunks with one set of weights.

  Letters: B streams, K x d latents of a chunk, F bins, T frames and C channels of its spectrogram. `sigmas` are the
  noise levels that the steps start from, a tuple; `chunks` int32 [B] are the numbers of chunks of each stream.

  Attributes:
    sampler: the functions; consistency: with the schedule and the defaults.
    compiled: the sampler's `programs.compiled_programs`; params: the weights, nested dict.
  """
  sampler: Sampler
  consistency: VariantConsistency
  compiled: types.SimpleNamespace
  params: dict

  def sampling(self, seed: int, *, mode: str, steps: int | None, noise, chunks: int | None) -> tuple[Callable, tuple]:
    """-> (draw, sigmas). draw(first, count, needed) is the noise [count, steps + 1, F, T, C] of `count` chunks from
    `first` on, of which `needed` are used; chunks before 0 are not.

    Args:
      noise: to be used in place of the seed's, float32 [chunks, steps + 1, F, T, C], or None.
      chunks: the required number of chunks of the noise; None if not known yet.

    Raises UserError: noise of another shape; from `draw`: more chunks than the noise has.
    """
    if steps is None:
      steps = self.consistency.steps if mode == 'autoregressive' else self.consistency.staggered_steps
    if noise is None:
      return (lambda first, count, needed: self.compiled.noise(
          np.uint32(seed), np.int32(first), count=count, roles=steps + 1)), self.consistency.schedule(steps)
    noise = np.asarray(noise, np.float32)
    if noise.shape[1:] != (steps + 1, *self.sampler.chunk_shape) or chunks not in (None, len(noise)):
      wanted = ['chunks' if chunks is None else chunks, steps + 1, *self.sampler.chunk_shape]
      raise UserError(f'noise must have shape {wanted}, not {list(noise.shape)}')

    def draw(first, count, needed):
      if chunks is None and first + needed > len(noise):
        raise UserError(f'there is noise for {len(noise)} chunks, and more have come')
      return noise[np.clip(first + np.arange(count), 0, len(noise) - 1)]
    return draw, self.consistency.schedule(steps)

  def autoregressive(self, blocks: Iterable[np.ndarray], draw: Callable, chunks: np.ndarray, *, sigmas: tuple,
                     sigma_cond: float | None, refine: bool | None, width: int
                     ) -> Iterator[output.Blocks | jax.Array]:
    """blocks of z [B, n <= width, K, d] -> audio [B, channels, samples] on the device."""
    level = np.float32(self.consistency.sigma_cond if sigma_cond is None else sigma_cond)
    refine = self.consistency.refine if refine is None else bool(refine)
    state: dict[str, Any] = {}
    position = 0

    def advance(z, needed):
      count = z.shape[1]
      z = np.pad(z, ((0, 0), (0, width - count), (0, 0), (0, 0)))
      noise = draw(position - 1, width + 1, needed)
      return self.compiled.advance(self.params, state, z, np.int32(position), np.int32(count), chunks, noise,
                                   level, np.bool_(refine), sigmas=sigmas)

    lag = self.sampler.representation.chunk_samples if refine else 0  # before the first chunk there is no audio
    for z in blocks:
      if not state:
        state = self.sampler.state(self.params, z.shape)
      audio, state = advance(z, z.shape[1] + 1)
      yield output.Blocks(audio, z.shape[1], skip=0 if position else lag)
      position += z.shape[1]
    if position and refine:
      audio, state = advance(np.zeros_like(z[:, :1]), 1)
      yield output.Blocks(audio, 1, tail=state['tail'])
    elif position:
      yield state['tail']

  def parallel(self, z: np.ndarray, draw: Callable, chunks: np.ndarray, *, sigmas: tuple
               ) -> Iterator[output.Blocks | jax.Array]:
    """z [B, n, K, d] -> blocks of audio [B, channels, samples] on the device, then the tail."""
    lag, longest = len(sigmas) - 1, z.shape[1]
    # The even width, not below the steps, that pads the last block least.
    widths = range(lag + 1 + (lag + 1) % 2, max(programs.block_chunks(), lag + 2) + 1, 2)
    width = min(widths, key=lambda width: (-(-(longest + lag) // width) * width, -width))
    state = self.sampler.parallel_state(self.params, z.shape, lag)
    for start in range(0, longest + lag, width):
      block = z[:, start:start + width]
      block = np.pad(block, ((0, 0), (0, width - block.shape[1]), (0, 0), (0, 0)))
      noise = draw(start - lag, width + lag, width + lag)
      audio, state = self.compiled.parallel_block(
          self.params, state, block, np.int32(start), chunks, noise, sigmas=sigmas)
      before = max(lag - start, 0) * self.sampler.representation.chunk_samples  # audio before chunk 0
      yield output.Blocks(audio, skip=before)
    yield state['tail']
