"""Parameters that know their axes, and the few layers that everything else is made of.

Letters: B batch, S chunk, N = B*S chunks side by side, F frequency, T frame, P token, L latent, Z latent
width, D width, C channel, H head, K head width, M hidden width of an MLP.

Parameters are float32; a layer computes in the dtype of its input. Norms compute in float32.
"""

from collections.abc import Callable
import dataclasses

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from m2l2.kernels.convolution import convolve
from m2l2.model import packing


@dataclasses.dataclass(frozen=True)
class Init:
  """An initialiser with the name that parameter tables show."""
  name: str
  draw: Callable


ZEROS = Init('zeros', lambda key, shape: jnp.zeros(shape, jnp.float32))
ONES = Init('ones', lambda key, shape: jnp.ones(shape, jnp.float32))


def normal(std: float) -> Init:
  return Init(f'normal({std:.4g})', lambda key, shape: std * jax.random.normal(key, shape, jnp.float32))


def xavier(fan_in: int, fan_out: int) -> Init:
  """Xavier uniform; the fans are given because named dimensions hide them."""
  limit = (6 / (fan_in + fan_out)) ** 0.5
  return Init(f'xavier({fan_in}, {fan_out})',
              lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -limit, limit))


def param(rngs: nnx.Rngs, shape, axes, init: Init) -> nnx.Param:
  """A float32 parameter that carries its logical axes and its initialiser's name."""
  if len(shape) != len(axes):
    raise ValueError(f'shape {shape} and axes {axes} differ in length')
  return nnx.Param(init.draw(rngs.params(), tuple(shape)), axes=tuple(axes), init=init.name)


def as_last(x, like):
  """[..., D] -> [1, ..., 1, ..., D] of `like`'s rank: broadcasting over leading axes, said aloud."""
  return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


class Linear(nnx.Module):
  """[..., in] -> [..., *out]; `out` may be several named dimensions."""

  def __init__(self, in_dim, out_dims, *, axes, init=None, bias=True, rngs):
    out_dims = (out_dims,) if isinstance(out_dims, int) else tuple(out_dims)
    size = 1
    for dim in out_dims:
      size *= dim
    self.kernel = param(rngs, (in_dim, *out_dims), axes, init or xavier(in_dim, size))
    self.bias = param(rngs, out_dims, axes[1:], ZEROS) if bias else None

  def __call__(self, x):
    kernel = self.kernel[...].astype(x.dtype)
    out = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return out if self.bias is None else out + as_last(self.bias[...].astype(x.dtype), out)


class Conv3x3(nnx.Module):
  """Same-padded 3x3 convolution on [N, F, T, C], or on maps packed by `pack` (packing.py).

  On packed maps it goes from aligned places to shifted ones, from shifted to aligned with `inward`, or from aligned to
  aligned with `aligned`; `enter` goes from a plain map to aligned places.
  """

  def __init__(self, in_dim, out_dim, *, init=None, bias=False, rngs):
    self.kernel = param(rngs, (3, 3, in_dim, out_dim), ('kernel_f', 'kernel_t', 'conv_in', 'conv_out'),
                        init or xavier(9 * in_dim, 9 * out_dim))
    self.bias = param(rngs, (out_dim,), ('conv_out',), ZEROS) if bias else None

  def __call__(self, x, *, pack=packing.PLAIN, inward=False, aligned=False):
    kernel = self.kernel[...]
    if pack != packing.PLAIN:
      kernel = packing.packed_kernel(kernel, pack, aligned=aligned)
    padding = [(0, 0) if inward and p > 1 else (1, 1) for p in pack]
    return self._add_bias(product(convolve(x, kernel.astype(x.dtype), padding)))

  def enter(self, x, pack):
    if pack == packing.PLAIN:
      return self(x)
    kernel = packing.window_kernel(self.kernel[...], pack)
    kernel = kernel.reshape(-1, kernel.shape[-1]).astype(x.dtype)
    return self._add_bias(jnp.einsum('nftw,wc->nftc', packing.windows(x, pack), kernel))

  def _add_bias(self, out):
    if self.bias is None:
      return out
    bias = jnp.tile(self.bias[...], out.shape[-1] // self.bias.shape[0])
    return out + as_last(bias.astype(out.dtype), out)


class Scale(nnx.Module):
  """The gain after a norm: a free vector, or 1 + a zero-initialised projection of the noise embedding."""

  def __init__(self, dim, *, cond_dim=None, axis='embed', rngs):
    self.gain = param(rngs, (dim,), (axis,), ONES) if cond_dim is None else None
    self.cond = None if cond_dim is None else Linear(cond_dim, dim, axes=('cond', axis), init=ZEROS, rngs=rngs)

  def __call__(self, cond=None):
    """-> [D], or [..., D] for cond [..., cond]; float32."""
    if self.cond is None:
      return self.gain[...]
    return 1 + self.cond(cond.astype(jnp.float32))


class LayerNorm(nnx.Module):
  """LayerNorm without bias over the last axis of [B, S, P, D]; noise-conditioned if `cond_dim` is given."""

  def __init__(self, dim, *, cond_dim=None, eps=1e-4, rngs):
    self.scale = Scale(dim, cond_dim=cond_dim, rngs=rngs)
    self.eps = eps

  def __call__(self, x, cond=None):
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    scale = self.scale(cond)
    # [B, S, D] meets the tokens here, inside the layer: it is never stored per token.
    return (y * (as_last(scale, y) if scale.ndim == 1 else scale[:, :, None])).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis with a learned gain."""

  def __init__(self, dim, *, axis='head_dim', eps=1e-4, rngs):
    self.gain = param(rngs, (dim,), (axis,), ONES)
    self.eps = eps

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    return (y * as_last(self.gain[...], y)).astype(x.dtype)


def silu(x):
  """x sigmoid(x), computed in float32 and rounded once."""
  return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def groups(dim: int) -> int:
  """Groups of a GroupNorm over `dim` channels."""
  return max(1, min(dim // 4, 32))


class GroupNorm(nnx.Module):
  """GroupNorm over [N, F, T, C] (or packed maps) with min(C/4, 32) groups; only a gain, free or noise-conditioned."""

  def __init__(self, dim, *, cond_dim=None, eps=1e-5, rngs):
    self.scale = Scale(dim, cond_dim=cond_dim, axis='conv_in', rngs=rngs)
    self.groups = groups(dim)
    self.eps = eps

  def __call__(self, x, cond=None):
    scale = self.scale(cond)
    packed = x.shape[-1] // scale.shape[-1]

    def mean(y):
      """[N, F, T, C] -> [N, 1, 1, C], the mean of each channel's group; over the map first, which is cheap."""
      channels = jnp.mean(y, axis=(1, 2)).reshape(y.shape[0], packed, self.groups, -1)
      shared = jnp.broadcast_to(jnp.mean(channels, axis=(1, 3), keepdims=True), channels.shape)
      return shared.reshape(y.shape[0], 1, 1, -1)

    # Mean and variance in one pass over the map, about the mean of its first row: without that shift the difference
    # of squares would lose the digits of a group whose mean is large.
    y = x.astype(jnp.float32) - jax.lax.stop_gradient(mean(x[:, :1].astype(jnp.float32)))
    first = mean(y)
    variance = jnp.maximum(mean(jnp.square(y)) - jnp.square(first), 0.0)
    y = (y - first) * jax.lax.rsqrt(variance + self.eps)
    scale = jnp.tile(scale, (1,) * (scale.ndim - 1) + (packed,))
    return (y * (as_last(scale, y) if scale.ndim == 1 else scale[:, None, None])).astype(x.dtype)


REMATS = ('none', 'products', 'blocks', 'full')
_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names('product'))


def product(x):
  """Marks the result of a convolution or of attention as one that remat='products' keeps."""
  return checkpoint_name(x, 'product')


def rematerialised(function, remat: str):
  """`function`, of whose inside the backward pass finds all ('none'), the results of convolutions, matrix products and
  attention ('products'; norms and activations are computed again), or nothing ('blocks', 'full')."""
  if remat == 'none':
    return function
  return jax.checkpoint(function, policy=_PRODUCTS if remat == 'products' else None)


def call(module: nnx.Module, *args, remat: str):
  """module(*args), rematerialised."""
  if remat == 'none':
    return module(*args)
  graphdef, state = nnx.split(module)
  return rematerialised(lambda state, *args: nnx.merge(graphdef, state)(*args), remat)(state, *args)
