"""Convolutional patchifier (spectrogram -> tokens) and de-patchifier (tokens -> maps): figure 1's "P".

Maps are [N, F, T, C] with N = B*S: chunks never mix here. Both are ladders of residual conv blocks with residual
resamplers between the levels. A patchifier takes one feature map per conv block and records
one; a de-patchifier does the same in the opposite order, so the lists line up.

Maps stay in the dtype they come in, float32 in the denoiser; products read `dtype`, and a float32 map as the sum of two
numbers of it.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp

from m2l2.kernels.contraction import einsum
from m2l2.kernels.norms import silu
from m2l2.model.layers import Conv3x3, GroupNorm
from m2l2.model.parameters import ZEROS, param
from m2l2.model.patches import depth_to_space, join_patches, space_to_depth, split_patches
from m2l2.model.remat import call
from m2l2.sharding import constrain


class ConvBlock(nnx.Module):
  """x + conv3x3_zero(SiLU(conv3x3(GroupNorm(x)))), no biases."""

  def __init__(self, dim, *, cond_dim=None, dtype=None, rngs):
    self.norm = GroupNorm(dim, cond_dim=cond_dim, rngs=rngs)
    self.conv1 = Conv3x3(dim, dim, dtype=dtype, rngs=rngs)
    self.conv2 = Conv3x3(dim, dim, init=ZEROS, dtype=dtype, rngs=rngs)
    self.dtype = dtype

  def __call__(self, x, cond=None):
    return x + self.conv2(silu(self.conv1(self.norm(x, cond)), self.dtype))


class Resampler(nnx.Module):
  """GN(x) through a zero-initialised strided conv (kernel = stride), beside a path that only averages or repeats."""

  def __init__(self, in_dim, out_dim, *, stride, dtype=None, rngs):
    self.norm = GroupNorm(in_dim, rngs=rngs)
    self.kernel = param(rngs, (*stride, in_dim, out_dim), ('kernel_f', 'kernel_t', 'conv_in', 'conv_out'), ZEROS)
    self.stride = stride
    self.dtype = dtype


class Downsample(Resampler):
  """Patch mean with repeated channels, plus the strided conv."""

  def __call__(self, x):
    learned = einsum('nfatbc,abcd->nftd', split_patches(self.norm(x), self.stride), self.kernel[...], self.dtype)
    mean = split_patches(x, self.stride).mean(axis=(2, 4))
    return jnp.repeat(mean, learned.shape[-1] // x.shape[-1], axis=-1) + learned


class Upsample(Resampler):
  """Nearest replication with averaged channels, plus the transposed conv."""

  def __call__(self, x):
    learned = einsum('nftc,abcd->nfatbd', self.norm(x), self.kernel[...], self.dtype)
    mean = x.reshape(*x.shape[:-1], self.kernel.shape[-1], -1).mean(axis=-1)
    return join_patches(mean[:, :, None, :, None] + learned)


class Ladder(nnx.Module):
  """The conv blocks and resamplers of either direction; `steps` names them in the order they run."""

  def __init__(self, widths, *, blocks, strides, up, cond_dim, remat, dtype, rngs):
    levels = list(range(len(widths)))
    order = levels[::-1] if up else levels
    self.steps: tuple[tuple[str, bool], ...] = ()
    for level, after in zip(order, [*order[1:], None]):
      for i in range(blocks[level]):
        self._add(f'level{level}_block{i}', self.block(
            level, widths[level], cond_dim=cond_dim, dtype=dtype, rngs=rngs), True)
      if after is not None:
        self._add(f'level{level}_{"up" if up else "down"}', self.resampler(
            level, after, widths, stride=strides[min(level, after)], dtype=dtype, rngs=rngs), False)
    self.remat = remat

  def _add(self, name, module, is_block):
    setattr(self, name, module)
    self.steps += ((name, is_block),)

  # What stands at each step; those of variants/ are others.

  def block(self, level, dim, **options):
    return ConvBlock(dim, **options)

  def resampler(self, level, after, widths, **options):
    return (Downsample if after > level else Upsample)(widths[level], widths[after], **options)

  def run(self, x, *, features=None, cond=None):
    """-> (x, outputs of every conv block); `features` are merged before the blocks as (x + f) / sqrt 2."""
    outputs: list[jax.Array] = []
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
  """Map [N, F, T, C] -> tokens [N, P, D] (frequency-major) and each block's output, deepest first.

  stem: (F, T) patch folded into channels before the first conv; (1, 1) is the paper's.
  """

  def __init__(self, in_channels, *, stem, widths, blocks, strides, cond_dim=None, remat='blocks', dtype=None, rngs):
    self.conv_in = Conv3x3(in_channels * stem[0] * stem[1], widths[0], bias=True, rngs=rngs)
    self.stem = tuple(stem)
    super().__init__(widths, blocks=blocks, strides=strides, up=False, cond_dim=cond_dim, remat=remat, dtype=dtype,
                     rngs=rngs)

  def __call__(self, x, *, gain, features=None, cond=None):
    """gain [F'] or [N, F'] scales the rows after the first conv (F' = F / stem)."""
    with jax.default_matmul_precision('highest'):  # what is rounded here, of float32 x, is lost to all that follows
      x = self.enter(space_to_depth(x, self.stem))
    x, outputs = self.run(self.scale_rows(x, gain), features=features, cond=cond)
    return x.reshape(x.shape[0], -1, x.shape[-1]), outputs[::-1]

  def enter(self, x):
    return self.conv_in(x)

  def scale_rows(self, x, gain):
    return scale_rows(x, gain)


class DePatchifier(Ladder):
  """Tokens [N, P, D] -> map [N, F', T', C] and each block's output, finest first."""

  def __init__(self, *, grid, widths, blocks, strides, cond_dim=None, remat='blocks', dtype=None, rngs):
    self.grid = tuple(grid)
    super().__init__(widths, blocks=blocks, strides=strides, up=True, cond_dim=cond_dim, remat=remat, dtype=dtype,
                     rngs=rngs)

  def __call__(self, tokens, *, features=None, cond=None):
    x = tokens.reshape(tokens.shape[0], *self.grid, tokens.shape[-1])
    x, outputs = self.run(x, features=features, cond=cond)
    return x, outputs[::-1]


class OutputHead(nnx.Module):
  """Map [N, F', T', C] -> [N, F, T, out]: norm, row gain, conv3x3 (no activation before it), un-stem."""

  def __init__(self, dim, out_channels, *, stem, cond_dim=None, init=ZEROS, dtype=None, rngs):
    self.norm = GroupNorm(dim, cond_dim=cond_dim, rngs=rngs)
    self.conv_out = Conv3x3(dim, out_channels * stem[0] * stem[1], init=init, bias=True, dtype=dtype, rngs=rngs)
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
