"""The compiled programs of a Codec, and how many chunks one call of them takes."""

import functools
import types

import jax
import jax.numpy as jnp

from m2l2 import compiling
from m2l2.codec import encoding
from m2l2.codec.sampler import Sampler


@functools.lru_cache(maxsize=8)
def compiled_programs(sampler: Sampler, bottleneck) -> types.SimpleNamespace:
  """The jitted functions of a Codec, each compiled when a shape first comes: one for encoding, one a mode of decoding,
  and the noise of the chunks that a call of these needs.

  Models that differ in their weights alone, as those of one run, share them.
  """

  def noise(seed, first, *, count, roles):
    return sampler.noise(jax.random.key(seed), jnp.maximum(first + jnp.arange(count), 0), roles=roles)

  def advance(params, state, z, first, count, chunks, noise, sigma_cond, refine, *, sigmas):
    return sampler.advance(params, state, z, first, count, chunks, noise, sigma_cond, sigmas=sigmas, refine=refine)

  def parallel_block(params, state, z, first, chunks, noise, *, sigmas):
    return sampler.parallel_block(params, state, z, first, chunks, noise, sigmas=sigmas)

  def encode_block(params, audio, frames):
    return encoding.encode_chunks(params, audio, frames, representation=sampler.representation,
                                  network=sampler.network, bottleneck=bottleneck)

  # What these two do is in products and convolutions, or little; decoding takes a seventh longer with such loops.
  soon = compiling.optimised(1)
  programs = dict(
      encode_block=jax.jit(encode_block, compiler_options=soon),
      noise=jax.jit(noise, static_argnames=('count', 'roles'), compiler_options=soon),
      advance=jax.jit(advance, static_argnames='sigmas'),
      parallel_block=jax.jit(parallel_block, static_argnames='sigmas'))
  return types.SimpleNamespace(**{name: compiling.Told(program) for name, program in programs.items()})


def block_chunks() -> int:
  """Chunks a device call. On CPUs two: the maps of eight leave the caches, a chunk of `base` took 17 % longer."""
  return 2 if jax.default_backend() == 'cpu' else 8
