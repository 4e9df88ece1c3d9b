"""Convolutional patchifier (spectrogram -> tokens) and de-patchifier (tokens -> maps), figure 1's "P".

Maps are [N, F, T, C] with N = B*S: chunks never mix here. Those of narrow levels may be packed (packing.py).
Both are ladders of residual conv blocks with residual resamplers between the levels. A patchifier takes one feature
map per conv block and records one; a de-patchifier does the same in the opposite order, so the lists line up.

Maps stay in the dtype they come in, float32 in the denoiser; products read `dtype`. What is averaged there, and what
convolutions of the finest level and of the output read, is not rounded either (`exact`): the others matter little.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from m2l2.kernels.convolution import convolve, split
from m2l2.kernels.norms import silu
from m2l2.model import packing
from m2l2.model.layers import ZEROS, Conv3x3, GroupNorm, call, param, product
from m2l2.model.packing import PLAIN, depth_to_space, join_patches, space_to_depth, split_patches
from m2l2.sharding import constrain


class ConvBlock(nnx.Module):
  """x + conv3x3_zero(SiLU(conv3x3(GroupNorm(x)))), no biases."""

  def __init__(self, dim, *, cond_dim=None, pack=PLAIN, dtype=None, exact=False, rngs):
    self.norm = GroupNorm(dim, cond_dim=cond_dim, rngs=rngs)
    self.conv1 = Conv3x3(dim, dim, dtype=dtype, exact=exact, rngs=rngs)
    self.conv2 = Conv3x3(dim, dim, init=ZEROS, dtype=dtype, exact=exact, rngs=rngs)
    self.pack = pack
    self.dtype = dtype

  def __call__(self, x, cond=None):
    h = silu(self.conv1(self.norm(x, cond), pack=self.pack), self.dtype)
    return x + self.conv2(packing.clear_edges(h, self.pack), pack=self.pack, inward=True)


class Downsample(nnx.Module):
  """Patch mean with repeated channels, plus a zero-initialised strided conv (kernel = stride) of GN(x).

  With `packs` the maps before and after are packed so, and the mean is a matrix product too: TPUs are slow at
  moving neighbouring channels about.
  """

  def __init__(self, in_dim, out_dim, *, stride, packs=None, dtype=None, rngs):
    self.norm = GroupNorm(in_dim, rngs=rngs)
    self.kernel = param(rngs, (*stride, in_dim, out_dim), ('kernel_f', 'kernel_t', 'conv_in', 'conv_out'), ZEROS)
    self.stride = stride
    self.packs = packs
    self.dtype = dtype

  def __call__(self, x):
    if self.packs is None:
      learned = einsum('nfatbc,abcd->nftd', split_patches(self.norm(x), self.stride), self.kernel[...], self.dtype)
      mean = split_patches(x, self.stride).mean(axis=(2, 4))
      return jnp.repeat(mean, learned.shape[-1] // x.shape[-1], axis=-1) + learned
    _, _, c, d = self.kernel.shape
    repeat = np.arange(c)[:, None] == np.arange(d) // (d // c)
    mean = np.broadcast_to(repeat / math.prod(self.stride), self.kernel.shape)
    out = self._project(self.norm(x), self.kernel[...])
    return space_to_depth(out + self._project(x, jnp.asarray(mean, jnp.float32), exact=True), self.packs[1])

  def _project(self, x, kernel, exact=False):
    """The strided conv of a packed map: its rows that fall together side by side, then one dilated conv over them."""
    (a, b), (p, q) = self.stride, self.packs[0]
    rows, frames = a // p, b // q
    n, f, t, c = x.shape
    kernel = jnp.moveaxis(kernel.reshape(rows, p, frames, q, *kernel.shape[2:]), 1, 2)
    kernel = kernel.reshape(1, rows, frames * c, -1).astype(self.dtype or x.dtype)
    t = t // frames
    return product(convolve(x.reshape(n, f // rows, rows * t, frames * c), kernel, ((0, 0), (0, 0)), exact=exact,
                            dilation=(1, t)))


class Upsample(nnx.Module):
  """Nearest replication with averaged channels, plus a zero-initialised transposed conv of GN(x); `packs` as above."""

  def __init__(self, in_dim, out_dim, *, stride, packs=None, dtype=None, rngs):
    self.norm = GroupNorm(in_dim, rngs=rngs)
    self.kernel = param(rngs, (*stride, in_dim, out_dim), ('kernel_f', 'kernel_t', 'conv_in', 'conv_out'), ZEROS)
    self.stride = stride
    self.packs = packs
    self.dtype = dtype

  def __call__(self, x):
    _, _, c, d = self.kernel.shape
    if self.packs is None:
      learned = einsum('nftc,abcd->nfatbd', self.norm(x), self.kernel[...], self.dtype)
      mean = x.reshape(*x.shape[:-1], d, -1).mean(axis=-1)
      return join_patches(mean[:, :, None, :, None] + learned)
    x = depth_to_space(x, self.packs[0])
    (a, b), (p, q) = self.stride, self.packs[1]
    kernel = jnp.moveaxis(self.kernel[...].reshape(a // p, p, b // q, q, c, d), (0, 2, 4), (0, 1, 2))
    kernel = kernel.reshape(a // p, b // q, c, -1)
    average = (np.arange(c)[:, None] // (c // d) == np.arange(d)) * (d / c)
    average = jnp.asarray(np.broadcast_to(np.tile(average, p * q), kernel.shape), jnp.float32)
    learned = einsum('nftc,abcd->nfatbd', self.norm(x), kernel, self.dtype)
    return join_patches(einsum('nftc,abcd->nfatbd', x, average, self.dtype, exact=True) + learned)


class Ladder(nnx.Module):
  """The conv blocks and resamplers of either direction; `steps` names them in the order they run."""

  def __init__(self, widths, *, blocks, strides, up, cond_dim, remat, tile, dtype, rngs):
    levels = list(range(len(widths)))
    self.packs = ladder_packs(widths, strides, tile=tile)
    order = levels[::-1] if up else levels
    self.steps = []
    for n, level in enumerate(order):
      for i in range(blocks[level]):
        name = f'level{level}_block{i}'
        setattr(self, name, ConvBlock(
            widths[level], cond_dim=cond_dim, pack=self.packs[level], dtype=dtype, exact=level == 0, rngs=rngs))
        self.steps.append((name, True))
      if n + 1 < len(order):
        after = order[n + 1]
        name = f'level{level}_{"up" if up else "down"}'
        stride = strides[min(level, after)]
        resample = Upsample if up else Downsample
        packs = (self.packs[level], self.packs[after]) if tile else None
        setattr(self, name, resample(
            widths[level], widths[after], stride=stride, packs=packs, dtype=dtype, rngs=rngs))
        self.steps.append((name, False))
    self.steps = tuple(self.steps)
    self.remat = remat

  def run(self, x, *, features=None, cond=None):
    """-> (x, outputs of every conv block); `features` are merged before the blocks as (x + f) / sqrt 2."""
    outputs = []
    for name, is_block in self.steps:
      with jax.named_scope(name):
        if is_block and features is not None:
          x = merge(x, features[len(outputs)])
        x = call(getattr(self, name), *((x, cond) if is_block else (x,)), remat=self.remat)
        x = constrain(x, 'batch', None, None, None)
      if is_block:
        outputs.append(x)
    return x, outputs


class Patchifier(Ladder):
  """Map [N, F, T, C] -> tokens [N, P, D] (frequency-major) and each block's output, deepest first."""

  def __init__(self, in_channels, *, stem, widths, blocks, strides, cond_dim=None, remat='blocks', tile=0,
               dtype=None, rngs):
    self.conv_in = Conv3x3(in_channels * stem[0] * stem[1], widths[0], bias=True, rngs=rngs)
    self.stem = tuple(stem)
    super().__init__(widths, blocks=blocks, strides=strides, up=False, cond_dim=cond_dim, remat=remat, tile=tile,
                     dtype=dtype, rngs=rngs)

  def __call__(self, x, *, gain, features=None, cond=None):
    """gain [F'] or [N, F'] scales the rows after the first conv (F' = F / stem)."""
    with jax.default_matmul_precision('highest'):  # what is rounded here, of float32 x, is lost to all that follows
      x = self.conv_in.enter(space_to_depth(x, self.stem), self.packs[0])
    x = scale_rows(x, gain, self.packs[0])
    x, outputs = self.run(x, features=features, cond=cond)
    return x.reshape(x.shape[0], -1, x.shape[-1]), outputs[::-1]


class DePatchifier(Ladder):
  """Tokens [N, P, D] -> map [N, F', T', C] and each block's output, finest first."""

  def __init__(self, *, grid, widths, blocks, strides, cond_dim=None, remat='blocks', tile=0, dtype=None,
               rngs):
    self.grid = tuple(grid)
    super().__init__(widths, blocks=blocks, strides=strides, up=True, cond_dim=cond_dim, remat=remat, tile=tile,
                     dtype=dtype, rngs=rngs)

  def __call__(self, tokens, *, features=None, cond=None):
    x = tokens.reshape(tokens.shape[0], *self.grid, tokens.shape[-1])
    x, outputs = self.run(x, features=features, cond=cond)
    return x, outputs[::-1]


def einsum(formula, x, kernel, dtype, *, exact=False):
  """jnp.einsum in x's dtype, whose products read `dtype` (None: x's); `exact` as of `convolve`."""
  dtype = jnp.dtype(dtype or x.dtype)
  parts = split(x, dtype) if exact and dtype != x.dtype else (x.astype(dtype),)
  return sum(jnp.einsum(formula, part, kernel.astype(dtype), preferred_element_type=x.dtype) for part in parts)


def split_slots(x, grid, slots):
  """Tokens [N, P, D] of a (F, T) grid -> [N * slots, P / slots, D], each slot its own stretch of frames."""
  n, tokens, d = x.shape
  x = x.reshape(n, grid[0], slots, grid[1] // slots, d)
  return jnp.moveaxis(x, 2, 1).reshape(n * slots, tokens // slots, d)


def join_slots(x, grid, slots):
  """The inverse of `split_slots`."""
  n, tokens, d = x.shape
  x = x.reshape(n // slots, slots, grid[0], grid[1] // slots, d)
  return jnp.moveaxis(x, 1, 2).reshape(n // slots, tokens * slots, d)


class OutputHead(nnx.Module):
  """Map [N, F', T', C] -> [N, F, T, out]: norm, row gain, conv3x3 (no activation before it), un-stem."""

  def __init__(self, dim, out_channels, *, stem, pack=PLAIN, cond_dim=None, init=ZEROS, dtype=None, rngs):
    self.norm = GroupNorm(dim, cond_dim=cond_dim, rngs=rngs)
    self.conv_out = Conv3x3(dim, out_channels * stem[0] * stem[1], init=init, bias=True, dtype=dtype, exact=True,
                            rngs=rngs)
    self.stem = tuple(stem)
    self.pack = pack

  def __call__(self, x, *, gain=None, cond=None):
    x = self.norm(x, cond)
    x = x if gain is None else scale_rows(x, gain, self.pack)
    return depth_to_space(depth_to_space(self.conv_out(x, pack=self.pack, aligned=True), self.pack), self.stem)


def ladder_packs(widths, strides, *, tile):
  """How each level's maps are packed; the deepest, whose places are tokens, never is."""
  return (*(packing.pack_of(width, tile=tile, stride=stride) for width, stride in zip(widths, strides)), PLAIN)


def scale_rows(x, gain, pack=PLAIN):
  """[N, F, T, C], packed or not, times gain [F] or [N, F]."""
  gain = gain[None] if gain.ndim == 1 else gain
  gain = space_to_depth(jnp.broadcast_to(gain[:, :, None, None], (*gain.shape, pack[1], 1)), pack)
  gain = jnp.repeat(gain, x.shape[-1] // gain.shape[-1], axis=-1) if pack != PLAIN else gain
  return (x.astype(jnp.float32) * gain.astype(jnp.float32)).astype(x.dtype)


def merge(x, feature):
  """(x + feature) / sqrt 2, rounded once."""
  return ((x.astype(jnp.float32) + feature.astype(jnp.float32)) * math.sqrt(0.5)).astype(x.dtype)
