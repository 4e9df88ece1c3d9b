"""Convolutional patchifier (spectrogram -> tokens) and de-patchifier (tokens -> maps), figure 1's "P".

Maps are [N, F, T, C] with N = B*S: chunks never mix here. Both are ladders of residual conv blocks with
residual resamplers between the levels. A patchifier takes one feature map per conv block and records one;
a de-patchifier does the same in the opposite order, so the lists line up.
"""

import math

from flax import nnx
import jax.numpy as jnp

from m2l2.model.layers import Conv3x3, GroupNorm, ZEROS, param, remat, silu
from m2l2.sharding import constrain


class ConvBlock(nnx.Module):
  """x + conv3x3_zero(SiLU(conv3x3(GroupNorm(x)))), no biases."""

  def __init__(self, dim, *, cond_dim=None, rngs):
    self.norm = GroupNorm(dim, cond_dim=cond_dim, rngs=rngs)
    self.conv1 = Conv3x3(dim, dim, rngs=rngs)
    self.conv2 = Conv3x3(dim, dim, init=ZEROS, rngs=rngs)

  def __call__(self, x, cond=None):
    return x + self.conv2(silu(self.conv1(self.norm(x, cond))))


class Downsample(nnx.Module):
  """Patch mean with repeated channels, plus a zero-initialised strided conv (kernel = stride) of GN(x)."""

  def __init__(self, in_dim, out_dim, *, stride, rngs):
    self.norm = GroupNorm(in_dim, rngs=rngs)
    self.kernel = param(rngs, (*stride, in_dim, out_dim), ('kernel_f', 'kernel_t', 'conv_in', 'conv_out'), ZEROS)
    self.stride = stride

  def __call__(self, x):
    patches = split_patches(self.norm(x), self.stride)
    learned = jnp.einsum('nfatbc,abcd->nftd', patches, self.kernel[...].astype(x.dtype))
    mean = split_patches(x, self.stride).mean(axis=(2, 4))
    return jnp.repeat(mean, learned.shape[-1] // x.shape[-1], axis=-1) + learned


class Upsample(nnx.Module):
  """Nearest replication with averaged channels, plus a zero-initialised transposed conv of GN(x)."""

  def __init__(self, in_dim, out_dim, *, stride, rngs):
    self.norm = GroupNorm(in_dim, rngs=rngs)
    self.kernel = param(rngs, (*stride, in_dim, out_dim), ('kernel_f', 'kernel_t', 'conv_in', 'conv_out'), ZEROS)
    self.stride = stride

  def __call__(self, x):
    out_dim = self.kernel.shape[-1]
    learned = jnp.einsum('nftc,abcd->nfatbd', self.norm(x), self.kernel[...].astype(x.dtype))
    mean = x.reshape(*x.shape[:-1], out_dim, -1).mean(axis=-1)
    return join_patches(mean[:, :, None, :, None] + learned)


class Ladder(nnx.Module):
  """The conv blocks and resamplers of either direction; `steps` names them in the order they run."""

  def __init__(self, widths, *, blocks, strides, up, cond_dim, remat, rngs):
    levels = list(range(len(widths)))
    order = levels[::-1] if up else levels
    self.steps = []
    for n, level in enumerate(order):
      for i in range(blocks[level]):
        name = f'level{level}_block{i}'
        setattr(self, name, ConvBlock(widths[level], cond_dim=cond_dim, rngs=rngs))
        self.steps.append((name, True))
      if n + 1 < len(order):
        after = order[n + 1]
        name = f'level{level}_{"up" if up else "down"}'
        stride = strides[min(level, after)]
        resample = Upsample if up else Downsample
        setattr(self, name, resample(widths[level], widths[after], stride=stride, rngs=rngs))
        self.steps.append((name, False))
    self.steps = tuple(self.steps)
    self.remat = remat != 'none'

  def run(self, x, *, features=None, cond=None):
    """-> (x, outputs of every conv block); `features` are merged before the blocks as (x + f) / sqrt 2."""
    outputs = []
    for name, is_block in self.steps:
      if not is_block:
        x = constrain(remat(getattr(self, name), x, enabled=self.remat), 'batch', None, None, None)
        continue
      if features is not None:
        x = merge(x, features[len(outputs)])
      x = constrain(remat(getattr(self, name), x, cond, enabled=self.remat), 'batch', None, None, None)
      outputs.append(x)
    return x, outputs


class Patchifier(Ladder):
  """Map [N, F, T, C] -> tokens [N, P, D] (frequency-major) and each block's output, deepest first."""

  def __init__(self, in_channels, *, stem, widths, blocks, strides, cond_dim=None, remat='blocks', rngs):
    self.conv_in = Conv3x3(in_channels * stem[0] * stem[1], widths[0], bias=True, rngs=rngs)
    self.stem = tuple(stem)
    super().__init__(widths, blocks=blocks, strides=strides, up=False, cond_dim=cond_dim, remat=remat, rngs=rngs)

  def __call__(self, x, *, gain, features=None, cond=None):
    """gain [F'] or [N, F'] scales the rows after the first conv (F' = F / stem)."""
    x = scale_rows(self.conv_in(space_to_depth(x, self.stem)), gain)
    x, outputs = self.run(x, features=features, cond=cond)
    return x.reshape(x.shape[0], -1, x.shape[-1]), outputs[::-1]


class DePatchifier(Ladder):
  """Tokens [N, P, D] -> map [N, F', T', C] and each block's output, finest first."""

  def __init__(self, *, grid, widths, blocks, strides, cond_dim=None, remat='blocks', rngs):
    self.grid = tuple(grid)
    super().__init__(widths, blocks=blocks, strides=strides, up=True, cond_dim=cond_dim, remat=remat, rngs=rngs)

  def __call__(self, tokens, *, features=None, cond=None):
    x = tokens.reshape(tokens.shape[0], *self.grid, tokens.shape[-1])
    x, outputs = self.run(x, features=features, cond=cond)
    return x, outputs[::-1]


class OutputHead(nnx.Module):
  """Map [N, F', T', C] -> [N, F, T, out]: norm, row gain, conv3x3 (no activation before it), un-stem."""

  def __init__(self, dim, out_channels, *, stem, cond_dim=None, init=ZEROS, rngs):
    self.norm = GroupNorm(dim, cond_dim=cond_dim, rngs=rngs)
    self.conv_out = Conv3x3(dim, out_channels * stem[0] * stem[1], init=init, bias=True, rngs=rngs)
    self.stem = tuple(stem)

  def __call__(self, x, *, gain=None, cond=None):
    x = self.norm(x, cond)
    x = x if gain is None else scale_rows(x, gain)
    return depth_to_space(self.conv_out(x), self.stem)


def scale_rows(x, gain):
  """[N, F, T, C] times gain [F] or [N, F]."""
  gain = gain[None] if gain.ndim == 1 else gain
  return (x.astype(jnp.float32) * gain[:, :, None, None].astype(jnp.float32)).astype(x.dtype)


def merge(x, feature):
  """(x + feature) / sqrt 2, rounded once."""
  return ((x.astype(jnp.float32) + feature.astype(jnp.float32)) * math.sqrt(0.5)).astype(x.dtype)


def split_patches(x, stride):
  """[N, F, T, C] -> [N, F/a, a, T/b, b, C]."""
  n, f, t, c = x.shape
  a, b = stride
  return x.reshape(n, f // a, a, t // b, b, c)


def join_patches(x):
  """[N, F, a, T, b, C] -> [N, F*a, T*b, C]."""
  n, f, a, t, b, c = x.shape
  return x.reshape(n, f * a, t * b, c)


def space_to_depth(x, stem):
  """[N, F, T, C] -> [N, F/a, T/b, a*b*C]; the identity for stem (1, 1)."""
  if stem == (1, 1):
    return x
  patches = jnp.moveaxis(split_patches(x, stem), 2, 3)  # [N, F/a, T/b, a, b, C]
  return patches.reshape(*patches.shape[:3], -1)


def depth_to_space(x, stem):
  """The inverse of `space_to_depth`."""
  if stem == (1, 1):
    return x
  n, f, t, c = x.shape
  patches = x.reshape(n, f, t, *stem, c // math.prod(stem))
  return join_patches(jnp.moveaxis(patches, 3, 2))
