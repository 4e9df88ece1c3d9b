"""Latents to audio: what the device does, as pure functions of (weights, state, latents, noise).

Decoding goes chunk after chunk (`advance`) or, as CoDiCodec's parallel mode, over all chunks at once
(`parallel_block`). Either way a call takes the state that the call before left, so that decoding a file, a stream or an
exported program are the same few functions, and one compiled program serves the first chunk, all others and the end.
Noise belongs to (seed, chunk, role): any way of cutting the work into calls gives the same sound.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from m2l2.consistency import Consistency
from m2l2.model.autoencoder import Network
from m2l2.representation import Arrays, Representation
from m2l2.variants.staggered import sample_staggered

# Roles of a chunk's noise: what it starts from, what is put on it as the next one's left neighbour; from 2 on,
# what is put on it before its second denoising, its third and so on.
FIRST, REFINE, AGAIN = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Samples chunks of audio given their latents.

  Letters: B streams, n chunks, F bins, T frames, C channels of the spectrogram, K x d latents of a chunk; `roles` is
  the number of steps + 1. `sigmas` are the noise levels that the steps start from, a tuple.

  The state of autoregressive decoding is a dict: 'x' the last chunk's estimate [B, F, T, C], its 'features' (leaves
  [B, 1, ...]: each chunk's are computed once), and the 'tail' of the synthesis [B, channels, overlap].
  """
  representation: Representation
  network: Network
  consistency: Consistency

  @property
  def chunk_shape(self) -> tuple:
    """(F, T, C)."""
    return self.representation.chunk_shape

  def noise(self, key: Key[Array, ''], chunk: Int[Arrays, ' n'], *, roles: int) -> Float[Array, 'n {roles} F T C']:
    """Unit noise: a function of (key, chunk, role) alone.

    All streams get the same noise, so that equal channels stay equal.
    """
    def unit_noise(chunk, role):
      key_here = jax.random.fold_in(jax.random.fold_in(key, chunk), role)
      return self.consistency.unit_noise(key_here, self.representation, 1)[0]
    return jax.vmap(lambda c: jax.vmap(functools.partial(unit_noise, c))(jnp.arange(roles)))(chunk)

  def denoiser(self, params, features) -> Callable:
    """The consistency function bound to features whose leaves are [B, S, ...]."""
    return self.consistency.bind(self.network, params, features)

  # Chunk after chunk.

  def state(self, params, shape: tuple) -> dict:
    """What `step` starts from, for latents of `shape` [B, chunks, K, d]: nothing yet."""
    rep = self.representation
    return {'x': np.zeros((shape[0], *self.chunk_shape), np.float32), 'features': self._no_features(params, shape, 1),
            'tail': np.zeros((shape[0], rep.channels, rep.overlap), np.float32)}

  def _no_features(self, params, shape, chunks):
    """Zeros in the place of the features of `chunks` chunks, leaves [B, chunks, ...]."""
    streams, _, *embeddings = shape
    chunk = jax.ShapeDtypeStruct((streams, 1, *embeddings), jnp.float32)
    return jax.tree.map(lambda leaf: np.zeros((streams, chunks, *leaf.shape[2:]), leaf.dtype),
                        jax.eval_shape(self._decode, params, chunk))

  @property
  def _decode(self):
    """network.decode, traced once for all that ask for the same shapes."""
    return _jitted(self.network.decode)

  def step(self, params, state: dict, z: Float[Array, 'B K d'], index, left_noise: Float[Array, 'F T C'],
           noise: Float[Array, 'roles F T C'], sigma_cond, *, sigmas: tuple, refine,
           chunks: Int[Array, '#B'] | None = None) -> tuple[Float[Arrays, 'B channels N'], dict]:
    """Chunk `index`, with the noise of the chunk before and of this one.

    -> (audio of N = chunk_samples of this chunk or, with `refine`, of the chunk before; state). So with
    `refine` a stream of n chunks takes n + 1 steps, the last with whatever latents: a left chunk never sees its right
    one. What the last frames add beyond their chunk is the state's 'tail' then. The audio is silence before chunk 0
    and, with `chunks`, past the end of a stream that is shorter than others. A model that sees one chunk at a
    time denoises both apart. `refine`: a bool, or a traced one: one program serves both.
    """
    rep, consistency = self.representation, self.consistency
    first = index == 0
    spread = lambda eps: jnp.broadcast_to(eps, (z.shape[0], *eps.shape))
    current = self._decode(params, z[:, None])
    noises = [spread(eps) for eps in _of_steps(noise, sigmas)]
    if self.network.arch.chunks == 1:
      refined = jax.lax.cond(refine, lambda x: self._refined(params, state['features'], x, left_noise, sigma_cond),
                             lambda x: x, state['x'])
      x = consistency.sample(self.denoiser(params, current), [eps[:, None] for eps in noises], sigmas)[:, 0]
    else:
      pair = jax.tree.map(lambda left, right: jnp.concatenate([jnp.where(first, right, left), right], axis=1),
                          state['features'], current)
      refined, x = consistency.sample_pair(self.denoiser(params, pair), state['x'], left_noise=spread(left_noise),
                                       right_noises=noises, sigma_cond=sigma_cond, sigmas=sigmas, first=first)
    done, position = jnp.where(refine, refined, x), index - jnp.int32(refine)
    is_inside = (position >= 0) & (True if chunks is None else position < chunks)
    done = jnp.where(jnp.reshape(is_inside, (-1, 1, 1, 1)), done, 0.0)
    audio, tail = rep.synthesise(done[:, None], state['tail'])
    return audio, {'x': x, 'features': current, 'tail': tail}

  def _refined(self, params, features, x: Float[Array, 'B F T C'], noise: Float[Array, 'F T C'], sigma_cond
               ) -> Float[Array, 'B F T C']:
    """x with noise put on it, denoised again alone."""
    noisy = self.consistency.add_noise(x, jnp.broadcast_to(noise, x.shape), sigma_cond)[:, None]
    level = jnp.full(noisy.shape[:2], sigma_cond, jnp.float32)
    return self.denoiser(params, features)(noisy, level)[:, 0]

  def advance(self, params, state: dict, z: Float[Array, 'B n K d'], start, count, chunks: Int[Array, '#B'],
              noise: Float[Array, 'n+1 roles F T C'], sigma_cond, *, sigmas: tuple, refine
              ) -> tuple[Float[Array, 'B n channels N'], dict]:
    """The next `count` <= n chunks, from chunk `start` on; noise is from one before on; `chunks` are the streams' own.

    -> (audio, of which `count` are filled, as by `step`; state).
    """
    rep = self.representation
    b, n = z.shape[:2]

    def body(i, carry):
      state, audio = carry
      here = jax.lax.dynamic_index_in_dim(z, i, axis=1, keepdims=False)
      out, state = self.step(params, state, here, start + i, noise[i, REFINE], noise[i + 1], sigma_cond,
                             sigmas=sigmas, refine=refine, chunks=chunks)
      return state, audio.at[:, i].set(out)

    audio = jnp.zeros((b, n, rep.channels, rep.chunk_samples), jnp.float32)
    state, audio = jax.lax.fori_loop(0, count, body, (state, audio))
    return audio, state

  # All chunks at once. The state: what `sample_staggered` carries, the 'features' of the last chunks (those that
  # later steps still need), and the 'tail' of the synthesis.

  def parallel_state(self, params, shape: tuple, lag: int) -> dict:
    """Nothing yet, for latents of `shape` [B, chunks, K, d] and `lag` + 1 steps."""
    rep = self.representation
    return {'carried': tuple(np.zeros((shape[0], *self.chunk_shape), np.float32) for _ in range(lag)),
            'features': self._no_features(params, shape, lag),
            'tail': np.zeros((shape[0], rep.channels, rep.overlap), np.float32)}

  def parallel_block(self, params, state: dict, z: Float[Array, 'B M K d'], start, chunks,
                     noise: Float[Array, 'M+{len(sigmas)-1} roles F T C'], *, sigmas: tuple
                     ) -> tuple[Float[Arrays, 'B channels N'], dict]:
    """z of the chunks from `start` on, noise from start - lag on: lag = len(sigmas) - 1.

    -> (audio of the M chunks from start - lag on, silent outside 0 ... chunks - 1, with
    chunks an int or int [B]; state).
    """
    rep, lag = self.representation, len(sigmas) - 1
    b, m = z.shape[:2]
    features = jax.tree.map(lambda *two: jnp.concatenate(two, axis=1), state['features'],
                            self.network.decode(params, z))
    noises = [jnp.broadcast_to(noise[lag - k:lag - k + m, role], (b, m, *noise.shape[2:]))
              for k, role in enumerate(_roles(sigmas))]
    x, carried = sample_staggered(
        self.consistency, functools.partial(self.denoiser, params), features, noises, sigmas, carried=state['carried'],
        first=start == 0)
    position = (start - lag + jnp.arange(m)).reshape(1, m, 1, 1, 1)
    x = jnp.where((position >= 0) & (position < jnp.reshape(chunks, (-1, 1, 1, 1, 1))), x, 0.0)
    audio, tail = rep.synthesise(x, state['tail'])
    last = jax.tree.map(lambda leaf: leaf[:, m:], features)
    return audio, {'carried': carried, 'features': last, 'tail': tail}


@functools.lru_cache(maxsize=8)
def _jitted(function):
  return jax.jit(function)


def _roles(sigmas):
  """The roles of the noise that each step starts with."""
  return [FIRST, *range(AGAIN, AGAIN + len(sigmas) - 1)]


def _of_steps(noise, sigmas):
  """noise [roles, ...] -> that of each step."""
  return [noise[role] for role in _roles(sigmas)]
