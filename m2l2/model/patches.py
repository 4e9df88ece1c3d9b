"""Maps and their patches: reshapes alone."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def split_patches(x: Float[Array, 'N F T C'], patch) -> Float[Array, 'N F2 a T2 b C']:
  """[N, F, T, C] -> [N, F/a, a, T/b, b, C]."""
  n, f, t, c = x.shape
  a, b = patch
  return x.reshape(n, f // a, a, t // b, b, c)


def join_patches(x: Float[Array, 'N F a T b C']) -> Float[Array, 'N a*F b*T C']:
  """[N, F, a, T, b, C] -> [N, F*a, T*b, C]."""
  n, f, a, t, b, c = x.shape
  return x.reshape(n, f * a, t * b, c)


def space_to_depth(x: Float[Array, 'N F T C'], patch) -> Float[Array, 'N F2 T2 D']:
  """[N, F, T, C] -> [N, F/a, T/b, a*b*C]; the identity for (1, 1)."""
  if tuple(patch) == (1, 1):
    return x
  patches = jnp.moveaxis(split_patches(x, patch), 2, 3)  # [N, F/a, T/b, a, b, C]
  return patches.reshape(*patches.shape[:3], -1)


def depth_to_space(x: Float[Array, 'N F T C'], patch) -> Float[Array, 'N F2 T2 D']:
  """The inverse of `space_to_depth`."""
  if tuple(patch) == (1, 1):
    return x
  n, f, t, c = x.shape
  patches = x.reshape(n, f, t, *patch, c // math.prod(patch))
  return join_patches(jnp.moveaxis(patches, 3, 2))
