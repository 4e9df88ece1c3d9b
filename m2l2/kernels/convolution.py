"""Convolution of stride 1, with a gradient of its kernel that is fast on CPUs.

XLA computes that gradient as a convolution whose window is a whole map, on a CPU at a third to a half of the speed of
the convolution itself. As a sum over blocks of rows that fit into the cache, one matrix product each, it is about as
fast as the convolution.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m2l2.kernels.chunk_causal import platform

BLOCK = 1024  # most positions of a map in each product; small maps are left to XLA


def convolve(x: Float[Array, 'N F T I'], kernel: Float[Array, 'A B I O'], padding, *,
             dilation=(1, 1)) -> Float[Array, 'N F2 T2 O']:
  """[N, F, T, I] by [A, B, I, O] -> [N, F', T', O] in x's dtype.

  Args:
    kernel: of x's dtype, or bfloat16 where x is float32: the products then read x as the sum of two bfloat16 (twice as
      many forward, none more backward), and their sums are not rounded.
    padding: ((before, after), (before, after)), rows and frames.
    dilation: of the kernel.
  """
  if kernel.dtype == x.dtype and not _blocks_pay(x, dilation):
    return _plain(x, kernel, padding, dilation)
  return _convolve(x, kernel, tuple(tuple(pair) for pair in padding), tuple(dilation))


def split(x, dtype):
  """x, float32, as two numbers of a lower `dtype` whose sum it is up to 2^-16; gradients pass by the first alone. x
  itself, where it is of that dtype."""
  if x.dtype == dtype:
    return (x,)
  info = jnp.finfo(dtype)
  rounded = jax.lax.reduce_precision(x, info.nexp, info.nmant)  # XLA may remove a cast and its inverse
  return x.astype(dtype), jax.lax.stop_gradient(x - rounded).astype(dtype)


def _blocks_pay(x, dilation) -> bool:
  """Whether blocks help: on a single CPU device. On several, each block would wait for all of them."""
  mesh = jax.sharding.get_abstract_mesh()
  return (platform() == 'cpu' and (mesh.empty or mesh.size == 1) and x.shape[1] * x.shape[2] >= BLOCK // 4
          and dilation == (1, 1))


def _plain(x, kernel, padding, dilation, dtype=None):
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, rhs_dilation=dilation, preferred_element_type=dtype,
                                      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, padding, dilation):
  return _forward(x, kernel, padding, dilation)[0]


def _forward(x, kernel, padding, dilation):
  # Not as channels of one convolution: the TPU compiler crashes for some sizes.
  parts = split(x, kernel.dtype)
  out = functools.reduce(jnp.add, [_plain(part, kernel, padding, dilation, x.dtype) for part in parts])
  return out, (parts[0], kernel)


def _backward(padding, dilation, saved, out_gradient):
  x, kernel = saved
  dtype, out_gradient = out_gradient.dtype, out_gradient.astype(x.dtype)
  # Transposed, not by jax.vjp, which would trace the forward pass again (and `count_flops` count it).
  x_gradient, = jax.linear_transpose(lambda x: _plain(x, kernel, padding, dilation), x)(out_gradient)
  if _blocks_pay(x, dilation):
    gradient = kernel_gradient(x, out_gradient, kernel.shape[:2], padding)
  else:
    gradient, = jax.linear_transpose(lambda kernel: _plain(x, kernel, padding, dilation), kernel)(out_gradient)
  return x_gradient.astype(dtype), gradient


_convolve.defvjp(_forward, _backward)


def kernel_gradient(x, out_gradient, size, padding):
  """-> [A, B, I, O] for x [N, F, T, I], the result's gradient [N, F', T', O] and a kernel of size (A, B).

  The taps of a column are shifts of the gradient by rows, those of a row shifts of x by frames: A + B shifted copies
  give all A x B sums in one large product.
  """
  (a, b), (n, f, _, i), (frames, o) = size, x.shape, out_gradient.shape[2:]
  (before, after), columns = padding
  rows = max(r for r in range(1, f + 1) if f % r == 0 and (r == 1 or n * r * frames <= BLOCK))
  x = jnp.pad(x, ((0, 0), (0, 0), columns, (0, 0)))
  out_gradient = jnp.pad(out_gradient, ((0, 0), (a - 1 - before, a - 1 - after), (0, 0), (0, 0)))

  def add_block(total, first):
    block = jax.lax.dynamic_slice_in_dim(x, first, rows, 1)
    gradient = jax.lax.dynamic_slice_in_dim(out_gradient, first, rows + a - 1, 1)
    block = jnp.concatenate([block[:, :, j:j + frames] for j in range(b)], axis=-1)
    gradient = jnp.concatenate([gradient[:, a - 1 - j:a - 1 - j + rows] for j in range(a)], axis=-1)
    places = ((0, 1, 2), (0, 1, 2))
    return total + jax.lax.dot_general(gradient, block, (places, ((), ())),
                                       preferred_element_type=jnp.float32), None

  total, _ = jax.lax.scan(add_block, jnp.zeros((a * o, b * i), jnp.float32), jnp.arange(0, f, rows))
  return total.reshape(a, o, b, i).transpose(0, 2, 3, 1).astype(x.dtype)
