"""Lowering of a run's programs, the same for the loop, the plan and the benchmarks."""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp

from m2l2 import sharding
from m2l2.errors import UserError, first_line


def abstract_state(functions, init: Callable, mesh, *, preset: str):
  """Shapes and shardings of a run's state; nothing is allocated.

  Args:
    functions: `train_step.StepFunctions`.
    init: () -> TrainState, only traced.
    preset: of sharding's table of logical axes.

  Returns:
    (TrainState of jax.ShapeDtypeStruct with shardings, the `sharding.Placement` of its parameters).
  """
  state = jax.eval_shape(init)
  placement = sharding.param_shardings(state.params, functions.logical_axes, mesh=mesh, preset=preset)
  shardings = sharding.state_shardings(state, placement.shardings, mesh=mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings), placement


def first_state(init: Callable, shardings, *, weights=None):
  """The state of a new run where it is to lie; with `weights`, a tree like its parameters, in these and the average."""
  state = jax.jit(init, out_shardings=shardings)()
  if weights is None:
    return state

  def replace(state, new):  # a copy for the average, because the step donates both
    return dataclasses.replace(state, params=new, ema=jax.tree.map(jnp.copy, new))

  return jax.jit(replace, out_shardings=shardings, donate_argnums=0)(state, weights)


def abstract_batch(functions, mesh, *, batch_size: int) -> dict:
  """{'audio': float32 [B, C, N]}, split over the mesh's devices."""
  shape = (batch_size, functions.channels, functions.crop_samples)
  return {'audio': jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.batch_sharding(mesh))}


def lower_step(functions, state, batch, mesh, **options):
  """`functions.train_step` with such options, lowered for a ravelled state and a batch.

  Both may be arrays, or shapes with shardings.

  The state is donated, and returned with the same sharding: otherwise step 2 would compile again.
  """
  step = functools.partial(functions.train_step, **options)
  places = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=places).lower(state, batch)


def lower_examination(functions, state, batch, mesh, **options):
  """`functions.examine_step` with such options, lowered for a ravelled state and a batch, which both stay."""
  examine = functools.partial(functions.examine_step, **options)
  return jax.jit(examine, out_shardings=sharding.replicated(mesh)).lower(state, batch)


def lower_probe(functions, params, batch, mesh, *, seed: int):
  """(ravelled params, batch, int32[] step) -> `functions.probe_step` with the noise of (seed, step), lowered."""
  probe = lambda params, batch, step: functions.probe_step(
    params, batch, jax.random.fold_in(jax.random.key(seed), step))
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
  return jax.jit(probe, out_shardings=sharding.replicated(mesh)).lower(params, batch, step)


def compiled(lowered, options: dict):
  """A lowered program, compiled. Raises UserError: XLA knows no such option."""
  try:
    return lowered.compile(compiler_options=options)
  except Exception as error:
    if 'No such compile option' not in str(error):
      raise
    raise UserError(f'train.compiler_options: {first_line(error)}') from error
