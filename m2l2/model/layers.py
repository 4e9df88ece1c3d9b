"""The few layers that everything else is made of.

Letters: B batch, S chunk, N = B*S chunks side by side, F frequency, T frame, P token, L latent, Z latent
width, D width, C channel, H head, K head width, M hidden width of an MLP.

Parameters are float32; a layer computes in the dtype of its input. Norms compute in float32. Products may give float32
of bfloat16: what the denoiser's layers add up is not rounded to bfloat16, only what its products read
(launch/research/rounding.py measures why).
"""

import math

from flax import nnx
import jax.numpy as jnp

from m2l2.kernels import norms
from m2l2.kernels.contraction import contract
from m2l2.kernels.convolution import convolve
from m2l2.model.parameters import ONES, ZEROS, param, xavier
from m2l2.model.remat import product


def as_last(x, like):
  """[..., D] -> [1, ..., 1, ..., D] of `like`'s rank: broadcasting over leading axes, said aloud."""
  return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


class Linear(nnx.Module):
  """[..., in] -> [..., *out]; `out` may be several named dimensions."""

  def __init__(self, in_dim, out_dims, *, axes, init=None, bias=True, rngs):
    out_dims = (out_dims,) if isinstance(out_dims, int) else tuple(out_dims)
    self.kernel = param(rngs, (in_dim, *out_dims), axes, init or xavier(in_dim, math.prod(out_dims)))
    self.bias = param(rngs, out_dims, axes[1:], ZEROS) if bias else None

  def __call__(self, x, dtype=None):
    """In `dtype`, x's by default."""
    kernel = self.kernel[...].astype(x.dtype)
    out = product(contract(x, kernel, 1, dtype))
    return out if self.bias is None else out + as_last(self.bias[...].astype(out.dtype), out)


class Conv3x3(nnx.Module):
  """Same-padded 3x3 convolution on [N, F, T, C]. The result is in x's dtype; products read `dtype`, x's by default, see
  `convolve`."""

  def __init__(self, in_dim, out_dim, *, init=None, bias=False, dtype=None, rngs):
    self.kernel = param(rngs, (3, 3, in_dim, out_dim), ('kernel_f', 'kernel_t', 'conv_in', 'conv_out'),
                        init or xavier(9 * in_dim, 9 * out_dim))
    self.bias = param(rngs, (out_dim,), ('conv_out',), ZEROS) if bias else None
    self.dtype = dtype

  def __call__(self, x):
    kernel = self.kernel[...].astype(self.dtype or x.dtype)
    out = product(convolve(x, kernel, [(1, 1), (1, 1)]))
    return out if self.bias is None else out + as_last(self.bias[...].astype(out.dtype), out)


class Scale(nnx.Module):
  """The gain after a norm: a free vector, or 1 + a zero-initialised projection of the noise embedding."""

  def __init__(self, dim, *, cond_dim=None, axis='embed', rngs):
    self.gain = param(rngs, (dim,), (axis,), ONES) if cond_dim is None else None
    self.cond = None if cond_dim is None else Linear(cond_dim, dim, axes=('cond', axis), init=ZEROS, rngs=rngs)

  def __call__(self, cond=None):
    """-> [D], or [..., D] for cond [..., cond]; float32."""
    if self.gain is not None:
      return self.gain[...]
    assert self.cond is not None
    return 1 + self.cond(cond.astype(jnp.float32))


class LayerNorm(nnx.Module):
  """LayerNorm without bias over the last axis of [B, S, P, D]; noise-conditioned if `cond_dim` is given."""

  def __init__(self, dim, *, cond_dim=None, eps=1e-4, rngs):
    self.scale = Scale(dim, cond_dim=cond_dim, rngs=rngs)
    self.eps = eps

  def __call__(self, x, cond=None):
    scale = self.scale(cond)
    # [B, S, D] meets the tokens here, inside the layer: it is never stored per token.
    return norms.layer_norm(x, as_last(scale, x) if scale.ndim == 1 else scale[:, :, None], eps=self.eps)


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis with a learned gain."""

  def __init__(self, dim, *, axis='head_dim', eps=1e-4, rngs):
    self.gain = param(rngs, (dim,), (axis,), ONES)
    self.eps = eps

  def __call__(self, x):
    return norms.rms_norm(x, as_last(self.gain[...], x), eps=self.eps)


def groups(dim: int) -> int:
  """Groups of a GroupNorm over `dim` channels."""
  return max(1, min(dim // 4, 32))


class GroupNorm(nnx.Module):
  """GroupNorm over [N, F, T, C] with min(C/4, 32) groups; only a gain, free or noise-conditioned."""

  def __init__(self, dim, *, cond_dim=None, eps=1e-5, rngs):
    self.scale = Scale(dim, cond_dim=cond_dim, axis='conv_in', rngs=rngs)
    self.groups = groups(dim)
    self.eps = eps

  def __call__(self, x, cond=None):
    scale = self.scale(cond)
    return norms.group_norm(x, scale[None] if scale.ndim == 1 else scale, groups=self.groups, eps=self.eps)
