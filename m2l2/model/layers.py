"""Parameters that know their axes, and the few layers that everything else is made of.

Letters: B batch, S chunk, N = B*S chunks side by side, F frequency, T frame, P token, L latent, Z latent
width, D width, C channel, H head, K head width, M hidden width of an MLP.

Parameters are float32; a layer computes in the dtype of its input. Norms compute in float32. Products may give float32
of bfloat16: what the denoiser's layers add up is not rounded to bfloat16, only what its products read
(launch/research/rounding.py measures why).
"""

from collections.abc import Callable
import contextlib
import contextvars
import dataclasses

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from m2l2.kernels import norms
from m2l2.kernels.contraction import contract
from m2l2.kernels.convolution import convolve
from m2l2.model import packing
from m2l2.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Init:
  """An initialiser: `scale` times what `draw(key, shape)` gives, float32; with the name that parameter tables show."""
  name: str
  draw: Callable
  scale: float = 1.0


def _zeros(key, shape):
  return jnp.zeros(shape, jnp.float32)


def _ones(key, shape):
  return jnp.ones(shape, jnp.float32)


def _uniform(key, shape):
  return jax.random.uniform(key, shape, jnp.float32, -1, 1)


ZEROS = Init('zeros', _zeros)
ONES = Init('ones', _ones)


def normal(std: float) -> Init:
  return Init(f'normal({std:.4g})', jax.random.normal, std)


def xavier(fan_in: int, fan_out: int) -> Init:
  """Xavier uniform; the fans are given because named dimensions hide them."""
  return Init(f'xavier({fan_in}, {fan_out})', _uniform, (6 / (fan_in + fan_out)) ** 0.5)


def draw_all(key, shapes, inits):
  """A tree of float32 arrays: `shapes` (of ShapeDtypeStructs) filled by `inits`, the same tree of Inits.

  All that one distribution gives is drawn as one vector and cut: a generator for each of a hundred arrays took XLA's
  CPU compiler as long as the train step.
  """
  leaves, structure = jax.tree.flatten(shapes)
  inits = structure.flatten_up_to(inits)
  drawn = [None] * len(leaves)
  for i, draw in enumerate((_zeros, _ones, jax.random.normal, _uniform)):
    own = [n for n, init in enumerate(inits) if init.draw is draw]
    if draw in (_zeros, _ones) or not own:
      for n in own:
        drawn[n] = draw(None, leaves[n].shape)
      continue
    ends = np.cumsum([leaves[n].size for n in own]).tolist()
    # On a mesh every device makes its part: rounded up, so that any number of devices divides it.
    vector = constrain(draw(jax.random.fold_in(key, i), (-(-ends[-1] // 2**16) * 2**16,)), 'batch')
    for n, end in zip(own, ends):
      drawn[n] = inits[n].scale * vector[end - leaves[n].size:end].reshape(leaves[n].shape)
  return structure.unflatten(drawn)


_shapes_only = contextvars.ContextVar('shapes_only', default=False)


@contextlib.contextmanager
def shapes_only():
  """Modules made inside have parameters of zeros: where only shapes are asked for, to trace a generator for each
  parameter was most of the time that loading a model takes."""
  before = _shapes_only.set(True)
  try:
    yield
  finally:
    _shapes_only.reset(before)


def param(rngs: nnx.Rngs, shape, axes, init: Init) -> nnx.Param:
  """A float32 parameter that carries its logical axes and its initialiser."""
  if len(shape) != len(axes):
    raise ValueError(f'shape {shape} and axes {axes} differ in length')
  if _shapes_only.get():
    value = _zeros(None, tuple(shape))
  else:
    value = init.scale * init.draw(rngs.params(), tuple(shape))
  return nnx.Param(value, axes=tuple(axes), init=init)


def traced(build: Callable[[], nnx.Module]) -> tuple:
  """Of the module that `build()` makes: (graphdef; of its parameters, as nested dicts: shapes, Inits, logical axes).

  Nothing is allocated. nnx.merge(graphdef, params) is the module again, draw_all(key, shapes, inits) are its params;
  axes: a tuple of names for each, 'layers' where a stack was made by vmap.
  """
  def shaped():
    with shapes_only():
      return build()

  def axes_of(variable):
    axes = variable.get_metadata('axes')
    return ('layers',) * (len(variable.shape) - len(axes)) + axes

  graphdef, abstract = nnx.split(jax.eval_shape(shaped))
  of_each = lambda function: nnx.to_pure_dict(
      jax.tree.map(function, abstract, is_leaf=lambda x: isinstance(x, nnx.Variable)))
  return (graphdef, of_each(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype)),
          of_each(lambda v: v.get_metadata('init')), of_each(axes_of))


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

  def __call__(self, x, dtype=None):
    """In `dtype`, x's by default."""
    kernel = self.kernel[...].astype(x.dtype)
    out = product(contract(x, kernel, 1, dtype))
    return out if self.bias is None else out + as_last(self.bias[...].astype(out.dtype), out)


class Conv3x3(nnx.Module):
  """Same-padded 3x3 convolution on [N, F, T, C], or on maps packed by `pack` (packing.py).

  On packed maps it goes from aligned places to shifted ones, from shifted to aligned with `inward`, or from aligned to
  aligned with `aligned`; `enter` goes from a plain map to aligned places.

  The result is in x's dtype; products read `dtype`, x's by default, see `convolve`.
  """

  def __init__(self, in_dim, out_dim, *, init=None, bias=False, dtype=None, exact=False, rngs):
    self.kernel = param(rngs, (3, 3, in_dim, out_dim), ('kernel_f', 'kernel_t', 'conv_in', 'conv_out'),
                        init or xavier(9 * in_dim, 9 * out_dim))
    self.bias = param(rngs, (out_dim,), ('conv_out',), ZEROS) if bias else None
    self.dtype, self.exact = dtype, exact

  def __call__(self, x, *, pack=packing.PLAIN, inward=False, aligned=False):
    kernel = self.kernel[...]
    if pack != packing.PLAIN:
      kernel = packing.packed_kernel(kernel, pack, aligned=aligned)
    padding = [(0, 0) if inward and p > 1 else (1, 1) for p in pack]
    return self._add_bias(product(convolve(x, kernel.astype(self.dtype or x.dtype), padding, exact=self.exact)))

  def enter(self, x, pack):
    if pack == packing.PLAIN:
      return self(x)
    kernel = packing.window_kernel(self.kernel[...], pack)
    kernel = kernel.reshape(-1, kernel.shape[-1]).astype(x.dtype)
    return self._add_bias(contract(packing.windows(x, pack), kernel))

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
  """GroupNorm over [N, F, T, C] (or packed maps) with min(C/4, 32) groups; only a gain, free or noise-conditioned."""

  def __init__(self, dim, *, cond_dim=None, eps=1e-5, rngs):
    self.scale = Scale(dim, cond_dim=cond_dim, axis='conv_in', rngs=rngs)
    self.groups = groups(dim)
    self.eps = eps

  def __call__(self, x, cond=None):
    scale = self.scale(cond)
    return norms.group_norm(x, scale[None] if scale.ndim == 1 else scale, groups=self.groups, eps=self.eps)


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
