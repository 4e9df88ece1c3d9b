"""The sum of gradients over devices in float32, whatever the dtype of activations.

Left to the compiler, that sum stands right behind the product that gives a weight's gradient, and has its dtype:
bfloat16 halves the traffic, and rounds the parts and their sums to 8 bits. Here each device makes the gradients of its
own rows, which are float32 when they leave it, and these are averaged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from m2l2.errors import UserError
from m2l2.sharding import BATCH_AXES

REDUCTIONS = ('activations', 'float32')


def check(reduction: str, *, tensor: int = 1):
  """Raises UserError: there is no such reduction, or it does not go with a split of `tensor` parts."""
  if reduction not in REDUCTIONS:
    raise UserError(f'train.reduction={reduction!r} is not known: choose from {", ".join(REDUCTIONS)}')
  if reduction == 'float32' and tensor > 1:
    raise UserError(f"train.reduction='float32' needs whole rows on each device: set mesh.tensor=1, not {tensor}")


def reduced(gradients: Callable, reduction: str) -> Callable:
  """`gradients` with its sum over the devices of the mesh of `jax.set_mesh` in the dtype that config.train.reduction
  names.

  With 'float32' the metrics are means of what each device makes of its own rows, as they are over microbatches: the
  loss is the same, spreads and ranks of latents are those among a device's chunks. Weights that are split over the mesh
  are gathered whole for the step.

  Args:
    gradients: (params, audio [B, C, N], keys [B], int32[] step) -> (tree like params, {name: f32[]}), means over B.

  Raises:
    UserError: as `check`; when it is called, with the mesh's own size.
  """
  check(reduction)
  if reduction == 'activations':
    return gradients

  def run(params, audio, keys, step):
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1)
    check(reduction, tensor=mesh.shape.get('tensor', 1))
    if not axes:
      return gradients(params, audio, keys, step)

    def on_a_device(*args):
      grads, metrics = gradients(*args)
      mean = lambda x: jax.lax.pmean(x.astype(jnp.float32), axes)
      # A device may hold no draw of a sigma band; any other nan must stay one.
      present = lambda x: jax.lax.psum(jnp.nan_to_num(x), axes) / jax.lax.psum(jnp.float32(~jnp.isnan(x)), axes)
      return jax.tree.map(mean, grads), {
          name: (present if name.startswith('loss/sigma') else mean)(value) for name, value in metrics.items()}

    rows = P(axes)
    return jax.shard_map(on_a_device, in_specs=(P(), rows, rows, P()), out_specs=P(), check_vma=False)(
        params, audio, keys, step)

  return run
