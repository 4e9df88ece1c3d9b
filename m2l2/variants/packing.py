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
import numpy as np

from m2l2.kernels.contraction import contract, einsum
from m2l2.kernels.convolution import convolve
from m2l2.kernels.norms import silu
from m2l2.model.layers import as_last
from m2l2.model.patches import depth_to_space, join_patches, space_to_depth
from m2l2.model.patchify import ConvBlock, DePatchifier, Downsample, OutputHead, Patchifier, Upsample
from m2l2.model.remat import product

PLAIN = (1, 1)


def pack_of(width, *, tile, stride):
  """How a level of `width` channels is packed, (F, T): frames first, then bins, until `tile` channels are full.

  `stride` is that of the resampler below the level: what it divides may be packed.
  """
  frames = 2 if tile >= 2 * width and stride[1] % 2 == 0 else 1
  bins = 2 if tile >= 2 * frames * width and stride[0] % 2 == 0 else 1
  return bins, frames


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


def scale_rows(x, gain, pack):
  """A packed map [N, F, T, C] times gain [F] or [N, F] of the plain map's rows."""
  gain = gain[None] if gain.ndim == 1 else gain
  gain = space_to_depth(jnp.broadcast_to(gain[:, :, None, None], (*gain.shape, pack[1], 1)), pack)
  gain = jnp.repeat(gain, x.shape[-1] // gain.shape[-1], axis=-1) if pack != PLAIN else gain
  return (x.astype(jnp.float32) * gain.astype(jnp.float32)).astype(x.dtype)


# Layers of model/patchify.py on packed maps: their parameters are the same.


def convolve_packed(conv, x, pack, *, inward=False, aligned=False):
  """A Conv3x3 from aligned places to shifted ones; from shifted to aligned with `inward`, or from aligned to aligned
  with `aligned`."""
  if pack == PLAIN:
    return conv(x)
  kernel = packed_kernel(conv.kernel[...], pack, aligned=aligned).astype(conv.dtype or x.dtype)
  padding = [(0, 0) if inward and p > 1 else (1, 1) for p in pack]
  return _add_bias(conv, product(convolve(x, kernel, padding)))


def enter(conv, x, pack):
  """A Conv3x3 from a plain map to aligned places."""
  if pack == PLAIN:
    return conv(x)
  kernel = window_kernel(conv.kernel[...], pack)
  return _add_bias(conv, contract(windows(x, pack), kernel.reshape(-1, kernel.shape[-1]).astype(x.dtype)))


def _add_bias(conv, out):
  if conv.bias is None:
    return out
  bias = jnp.tile(conv.bias[...], out.shape[-1] // conv.bias.shape[0])
  return out + as_last(bias.astype(out.dtype), out)


class PackedConvBlock(ConvBlock):
  def __init__(self, dim, *, pack, **options):
    super().__init__(dim, **options)
    self.pack = pack

  def __call__(self, x, cond=None):
    h = silu(convolve_packed(self.conv1, self.norm(x, cond), self.pack), self.dtype)
    return x + convolve_packed(self.conv2, clear_edges(h, self.pack), self.pack, inward=True)


class PackedDownsample(Downsample):
  """Its mean is a matrix product, too: TPUs are slow at moving neighbouring channels about."""

  def __init__(self, in_dim, out_dim, *, packs, **options):
    super().__init__(in_dim, out_dim, **options)
    self.packs = packs

  def __call__(self, x):
    _, _, c, d = self.kernel.shape
    repeat = np.arange(c)[:, None] == np.arange(d) // (d // c)
    mean = np.broadcast_to(repeat / math.prod(self.stride), self.kernel.shape)
    out = self._project(self.norm(x), self.kernel[...])
    return space_to_depth(out + self._project(x, jnp.asarray(mean, jnp.float32)), self.packs[1])

  def _project(self, x, kernel):
    """The strided conv of a packed map: its rows that fall together side by side, then one dilated conv over them."""
    (a, b), (p, q) = self.stride, self.packs[0]
    rows, frames = a // p, b // q
    n, f, t, c = x.shape
    kernel = jnp.moveaxis(kernel.reshape(rows, p, frames, q, *kernel.shape[2:]), 1, 2)
    kernel = kernel.reshape(1, rows, frames * c, -1).astype(self.dtype or x.dtype)
    t = t // frames
    return product(convolve(x.reshape(n, f // rows, rows * t, frames * c), kernel, ((0, 0), (0, 0)),
                            dilation=(1, t)))


class PackedUpsample(Upsample):
  def __init__(self, in_dim, out_dim, *, packs, **options):
    super().__init__(in_dim, out_dim, **options)
    self.packs = packs

  def __call__(self, x):
    _, _, c, d = self.kernel.shape
    x = depth_to_space(x, self.packs[0])
    (a, b), (p, q) = self.stride, self.packs[1]
    kernel = jnp.moveaxis(self.kernel[...].reshape(a // p, p, b // q, q, c, d), (0, 2, 4), (0, 1, 2))
    kernel = kernel.reshape(a // p, b // q, c, -1)
    average = (np.arange(c)[:, None] // (c // d) == np.arange(d)) * (d / c)
    average = jnp.asarray(np.broadcast_to(np.tile(average, p * q), kernel.shape), jnp.float32)
    learned = einsum('nftc,abcd->nfatbd', self.norm(x), kernel, self.dtype)
    return join_patches(einsum('nftc,abcd->nfatbd', x, average, self.dtype) + learned)


class _PackedSteps:
  """What a packed ladder has at its steps. `packs` are its levels', set before they are made."""
  packs: tuple

  def block(self, level, dim, **options):
    return PackedConvBlock(dim, pack=self.packs[level], **options)

  def resampler(self, level, after, widths, **options):
    kind = PackedDownsample if after > level else PackedUpsample
    return kind(widths[level], widths[after], packs=(self.packs[level], self.packs[after]), **options)


class PackedPatchifier(_PackedSteps, Patchifier):
  def __init__(self, in_channels, *, packs, **options):
    self.packs = packs
    super().__init__(in_channels, **options)

  def enter(self, x):
    return enter(self.conv_in, x, self.packs[0])

  def scale_rows(self, x, gain):
    return scale_rows(x, gain, self.packs[0])


class PackedDePatchifier(_PackedSteps, DePatchifier):
  def __init__(self, *, packs, **options):
    self.packs = packs
    super().__init__(**options)


class PackedOutputHead(OutputHead):
  def __init__(self, dim, out_channels, *, pack, **options):
    super().__init__(dim, out_channels, **options)
    self.pack = pack

  def __call__(self, x, *, gain=None, cond=None):
    x = self.norm(x, cond)
    x = x if gain is None else scale_rows(x, gain, self.pack)
    return depth_to_space(depth_to_space(convolve_packed(self.conv_out, x, self.pack, aligned=True), self.pack),
                          self.stem)


def ladder_packs(widths, strides, *, tile):
  """How each level's maps are packed; the deepest, whose places are tokens, never is."""
  return (*(pack_of(width, tile=tile, stride=stride) for width, stride in zip(widths, strides)), PLAIN)
