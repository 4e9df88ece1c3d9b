"""Narrow maps in full tiles: neighbouring frames (and bins) of a map side by side in its channels.

A TPU's matrix unit and memory tiles are 128 channels wide (256 on v6e). A map of 64 channels leaves half of every tile
empty and, since both sides of a 64 x 64 convolution do, three quarters of the unit. Packed by (1, 2), a map
[N, F, T, 64] is [N, F, T/2, 128], and a convolution is the same sum with a rearranged kernel:

  aligned pairs   (0 1) (2 3) (4 5) ...        what a ladder's maps are
  shifted pairs   (- 0) (1 2) (3 4) (5 -)      what lies between the two convolutions of a block

From aligned to shifted pairs, and from shifted to aligned, a 3-tap convolution takes two taps of pairs, of which 6 of 8
products are of use. (From aligned to aligned it takes three taps, of which half is.) The same holds for bins, so
that (2, 2) packs fourfold. Weights, and results up to rounding, are those of the plain network.
"""

import math

import jax
import jax.numpy as jnp

PLAIN = (1, 1)


def pack_of(width, *, tile, stride):
  """How a level of `width` channels is packed, (F, T): frames first, then bins, until `tile` channels are full.

  `stride` is that of the resampler below the level: what it divides may be packed.
  """
  frames = 2 if tile >= 2 * width and stride[1] % 2 == 0 else 1
  bins = 2 if tile >= 2 * frames * width and stride[0] % 2 == 0 else 1
  return bins, frames


def split_patches(x, patch):
  """[N, F, T, C] -> [N, F/a, a, T/b, b, C]."""
  n, f, t, c = x.shape
  a, b = patch
  return x.reshape(n, f // a, a, t // b, b, c)


def join_patches(x):
  """[N, F, a, T, b, C] -> [N, F*a, T*b, C]."""
  n, f, a, t, b, c = x.shape
  return x.reshape(n, f * a, t * b, c)


def space_to_depth(x, patch):
  """[N, F, T, C] -> [N, F/a, T/b, a*b*C]; the identity for (1, 1)."""
  if patch == PLAIN:
    return x
  patches = jnp.moveaxis(split_patches(x, patch), 2, 3)  # [N, F/a, T/b, a, b, C]
  return patches.reshape(*patches.shape[:3], -1)


def depth_to_space(x, patch):
  """The inverse of `space_to_depth`."""
  if patch == PLAIN:
    return x
  n, f, t, c = x.shape
  patches = x.reshape(n, f, t, *patch, c // math.prod(patch))
  return join_patches(jnp.moveaxis(patches, 3, 2))


def window_kernel(kernel, pack):
  """3x3 kernel [3, 3, I, O] -> [2+a, 2+b, I, a*b*O]: from a window of a plain map to a whole packed place."""
  a, b = pack
  shifted = [jnp.pad(kernel, ((i, a - 1 - i), (j, b - 1 - j), (0, 0), (0, 0))) for i in range(a) for j in range(b)]
  return jnp.stack(shifted, axis=3).reshape(2 + a, 2 + b, kernel.shape[2], -1)


def packed_kernel(kernel, pack, *, aligned=False):
  """3x3 kernel [3, 3, I, O] -> the kernel between packed maps, [taps, taps, a*b*I, a*b*O].

  A packed axis has two taps, between aligned and shifted places, or three where both are `aligned`.
  """
  edge = [(1, 1) if aligned and p > 1 else (0, 0) for p in pack]
  window = jnp.pad(window_kernel(kernel, pack), (*edge, (0, 0), (0, 0)))
  p, q, i, o = window.shape
  (a, b) = pack
  taps = jnp.moveaxis(window.reshape(p // a, a, q // b, b, i, o), 1, 2)
  return taps.reshape(p // a, q // b, a * b * i, o)


def clear_edges(x, pack):
  """Sets the half-places of a shifted map that lie outside, before the first and after the last, to 0."""
  if pack == PLAIN:
    return x
  _, f, t, c = x.shape
  a, b = pack
  channel = jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, c), 3)
  part = channel // (c // (a * b))  # (bin of the place, frame of the place)
  inside = True
  for axis, size, part_of, count in ((1, f, part // b, a), (2, t, part % b, b)):
    if count > 1:
      shape = [1, 1, 1, 1]
      shape[axis] = size
      place = jax.lax.broadcasted_iota(jnp.int32, tuple(shape), axis)
      inside &= ((place > 0) | (part_of > 0)) & ((place < size - 1) | (part_of < count - 1))
  return jnp.where(inside, x, 0)


def windows(x, pack):
  """Plain map [N, F, T, C] -> the 3x3 neighbourhoods of packed places, [N, F/a, T/b, (2+a)*(2+b)*C].

  For the few channels of a spectrogram: one matrix product then takes the place of nine narrow ones.
  """
  a, b = pack
  f, t = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return jnp.concatenate([x[:, i:i + f:a, j:j + t:b] for i in range(2 + a) for j in range(2 + b)], axis=-1)
