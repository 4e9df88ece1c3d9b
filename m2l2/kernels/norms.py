"""Norms, SiLU and SwiGLU with gradients of their own: two reductions and one pass over the array each way.

JAX's own derivatives store every intermediate for the backward pass and read the array several times. Here only the
input and the moments are stored. All maths is float32; results have the input's dtype.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from m2l2.kernels.contraction import contract, contract_backward


def silu(x: Float[Array, '*shape'], dtype=None) -> Float[Array, '*shape']:
  """x sigmoid(x), rounded once, in x's dtype; for the backward pass x is stored in `dtype`, its own by default."""
  return _silu(x, jnp.dtype(dtype or x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _silu(x, dtype):
  return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def _silu_gradient(x, gradient):
  """float32, of a gradient and an x of any dtypes."""
  x, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
  gate = jax.nn.sigmoid(x)
  return gradient * gate * (1 + x * (1 - gate))


_silu.defvjp(lambda x, dtype: (_silu(x, dtype), keep(x, dtype)),
             lambda dtype, x, gradient: (_silu_gradient(x, gradient).astype(gradient.dtype),))


def swiglu_product(a: Float[Array, '*lead M'], b: Float[Array, '*lead M'], kernel: Float[Array, 'M D'],
                   dtype=None) -> Float[Array, '*lead D']:
  """SiLU(a) b in `dtype` (a's by default), by the kernel of that dtype -> float32.

  For the backward pass a and b are stored in `dtype`; what they make is computed again, which costs less than reading
  it.
  """
  return _swiglu_product(a, b, kernel, jnp.dtype(dtype or a.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _swiglu_product(a, b, kernel, dtype):
  return contract((jax.nn.silu(a.astype(jnp.float32)) * b).astype(dtype), kernel, 1, jnp.float32)


def _swiglu_product_forward(a, b, kernel, dtype):
  return _swiglu_product(a, b, kernel, dtype), (keep(a, dtype), keep(b, dtype), kernel, jnp.zeros((), a.dtype))


def _swiglu_product_backward(dtype, saved, gradient):
  a, b, kernel, like = saved
  gate = jax.nn.silu(a.astype(jnp.float32))
  inner, of_kernel = contract_backward((gate * b).astype(dtype), kernel, gradient)
  inner = inner.astype(jnp.float32)
  return _silu_gradient(a, inner * b).astype(like.dtype), (inner * gate).astype(like.dtype), of_kernel


_swiglu_product.defvjp(_swiglu_product_forward, _swiglu_product_backward)


def keep(x, dtype=None):
  """x in `dtype`, marked to be stored by a rematerialised layer ('product': model/layers.py)."""
  return checkpoint_name(x.astype(dtype or x.dtype), 'product')


def layer_norm(x: Float[Array, '*shape'], scale: Float[Array, '...'], *, eps: float) -> Float[Array, '*shape']:
  """(x - mean) / deviation * scale over the last axis; scale float32 of x's rank, broadcast where its size is 1."""
  return _row_norm(x, scale, eps, True)


def rms_norm(x: Float[Array, '*shape'], scale: Float[Array, '...'], *, eps: float) -> Float[Array, '*shape']:
  """x / root mean square * scale over the last axis; scale as of `layer_norm`."""
  return _row_norm(x, scale, eps, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _row_norm(x, scale, eps, centred):
  return _row_norm_forward(x, scale, eps, centred)[0]


def _row_norm_forward(x, scale, eps, centred):
  y = x.astype(jnp.float32)
  power, mean = jnp.mean(jnp.square(y), axis=-1, keepdims=True), None
  if centred:  # both moments in one pass, as in flax; a mean of ten deviations costs two of seven digits
    mean = jnp.mean(y, axis=-1, keepdims=True)
    power, mean = jnp.maximum(power - jnp.square(mean), 0.0), keep(mean)
    y = y - mean
  inverse = keep(jax.lax.rsqrt(power + eps))
  return (y * inverse * scale).astype(x.dtype), (x, scale, mean, inverse)


def _row_norm_backward(eps, centred, saved, gradient):
  x, scale, mean, inverse = saved
  y, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
  inner = gradient * scale
  # With normal = (y - mean) inverse: inverse (inner - mean(inner) - normal mean(inner normal)), here with few numbers a
  # row, as a TPU spends more on spreading these over the row than on arithmetic.
  along = jnp.mean(inner * y, axis=-1, keepdims=True)
  if centred:
    first = jnp.mean(inner, axis=-1, keepdims=True)
    along = along - mean * first
  slope = along * inverse ** 3
  out, normal = inner * inverse - y * slope, y * inverse
  if centred:
    out, normal = out + (mean * slope - first * inverse), normal - mean * inverse
  shared = tuple(i for i, size in enumerate(scale.shape) if size == 1 and x.shape[i] > 1)
  return out.astype(x.dtype), jnp.sum(gradient * normal, axis=shared, keepdims=True)


_row_norm.defvjp(_row_norm_forward, _row_norm_backward)


def head_norm(x: Float[Array, 'B L H K'], gain: Float[Array, ' K'], *, eps: float,
              dtype=None) -> Float[Array, 'B L H K']:
  """`rms_norm` of each head of queries or keys, in `dtype`, x's by default.

  Before the gain it is rounded to `dtype` too: so it is stored for the backward pass, and neither x nor the result is.
  """
  dtype = jnp.dtype(dtype or x.dtype)
  return (_unit(x, eps, dtype).astype(jnp.float32) * gain[None, None, None]).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _unit(x, eps, dtype):
  return _unit_forward(x, eps, dtype)[0]


def _unit_forward(x, eps, dtype):
  y = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  unit = keep(y * inverse, dtype)
  return unit, (unit, keep(inverse), jnp.zeros((), x.dtype))


def _unit_backward(eps, dtype, saved, gradient):
  unit, inverse, like = saved
  unit, gradient = unit.astype(jnp.float32), gradient.astype(jnp.float32)
  out = (gradient - unit * jnp.mean(gradient * unit, axis=-1, keepdims=True)) * inverse
  return (out.astype(like.dtype),)


_unit.defvjp(_unit_forward, _unit_backward)


def group_norm(x: Float[Array, 'N F T PC'], scale: Float[Array, '#N C'], *, groups: int,
               eps: float) -> Float[Array, 'N F T PC']:
  """GroupNorm of maps [N, F, T, P C] with a gain and no bias.

  Args:
    scale: [1, C] or [N, C] float32.
    groups: of neighbouring channels among the C. In a map with P > 1 positions packed into its channels
      (variants/packing.py), the groups span them.
  """
  packed = x.shape[-1] // scale.shape[-1]
  return _group_norm(x, jnp.tile(scale, (1, packed)), groups, packed, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _group_norm(x, scale, groups, packed, eps):
  return _group_norm_forward(x, scale, groups, packed, eps)[0]


def _group_norm_forward(x, scale, groups, packed, eps):
  y = x.astype(jnp.float32)
  means = functools.partial(_group_means, groups=groups, packed=packed)
  # Both moments in one pass, relative to the mean of the first row: without that the difference of squares would lose
  # the digits of a group whose mean is large.
  shift = means(jnp.mean(y[:, 0], axis=1))
  shifted = y - shift[:, None, None]
  first, second = means(jnp.stack([jnp.mean(shifted, axis=(1, 2)), jnp.mean(jnp.square(shifted), axis=(1, 2))]))
  inverse = keep(jax.lax.rsqrt(jnp.maximum(second - jnp.square(first), 0.0) + eps))
  mean = keep(shift + first)
  out = (y - mean[:, None, None]) * (inverse * scale)[:, None, None]
  return out.astype(x.dtype), (x, scale, mean, inverse)


def _group_norm_backward(groups, packed, eps, saved, gradient):
  x, scale, mean, inverse = saved
  centred, gradient = x.astype(jnp.float32) - mean[:, None, None], gradient.astype(jnp.float32)
  places = x.shape[1] * x.shape[2]
  direct, along = jnp.sum(gradient, axis=(1, 2)), inverse * jnp.sum(gradient * centred, axis=(1, 2))
  first, second = _group_means(jnp.stack([scale * direct, scale * along]) / places, groups=groups, packed=packed)
  out = (gradient * (inverse * scale)[:, None, None] - (inverse * first)[:, None, None]
         - centred * (jnp.square(inverse) * second)[:, None, None])
  along = along if scale.shape[0] > 1 else jnp.sum(along, axis=0, keepdims=True)
  return out.astype(x.dtype), along


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _group_means(x, *, groups, packed):
  """[..., P C] -> each channel's mean over its group."""
  group = np.tile(np.repeat(np.arange(groups), x.shape[-1] // packed // groups), packed)
  average = (group[:, None] == group) * np.float32(groups / x.shape[-1])
  return jax.lax.dot_general(x, average, (((x.ndim - 1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
