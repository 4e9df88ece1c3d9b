"""What the backward pass keeps and what it computes again."""

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name

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
