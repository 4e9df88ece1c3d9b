"""The product of activations with weights, with a gradient in the weights' own layout.

JAX's own rule computes the gradient of a weight transposed and transposes it back. XLA's CPU backend does that as a
loop on one thread, which took longer than the products for wide weights.
"""

import functools

import jax
import jax.numpy as jnp

from m2l2.kernels.convolution import split


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def contract(x, kernel, axes: int = 1, dtype=None):
  """[..., *in] by [*in, *out] -> [..., *out] in `dtype`, x's by default; `axes` is the number of `in` dimensions."""
  return _dot(x, kernel, range(x.ndim - axes, x.ndim), range(axes), dtype)


def _forward(x, kernel, axes, dtype):
  return contract(x, kernel, axes, dtype), (x, kernel)


def contract_backward(x, kernel, gradient, axes: int = 1):
  """-> the gradients of x and of the kernel, in their dtypes, for that of contract(x, kernel, axes)."""
  gradient = gradient.astype(x.dtype)
  out, lead = kernel.ndim - axes, x.ndim - axes
  dx = _dot(gradient, kernel, range(lead, lead + out), range(axes, kernel.ndim))
  return dx, _dot(x, gradient, range(lead), range(lead)).astype(kernel.dtype)


def _backward(axes, dtype, saved, gradient):
  x, kernel = saved
  return contract_backward(x, kernel, gradient, axes)


contract.defvjp(_forward, _backward)


def _dot(x, y, of_x, of_y, dtype=None):
  return jax.lax.dot_general(x, y, ((tuple(of_x), tuple(of_y)), ((), ())),
                             preferred_element_type=dtype or jnp.promote_types(x.dtype, y.dtype))


def einsum(formula, x, kernel, dtype):
  """jnp.einsum in x's dtype, whose products read the kernel in `dtype` (None: x's) and x as `convolve` does."""
  dtype = jnp.dtype(dtype or x.dtype)
  multiply = lambda part: jnp.einsum(formula, part, kernel.astype(dtype), preferred_element_type=x.dtype)
  low, *rest = split(x, dtype)
  out = multiply(low)
  return out + jax.lax.stop_gradient(multiply(*rest)) if rest else out
