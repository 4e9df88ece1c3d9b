"""The same updates under every preset, on 8 fake devices; and where each preset puts base's parameters.

`UPDATE_GOLDEN=1 python -m pytest tests/test_presets.py` rewrites tests/goldens/sharding/.
"""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2 import build, sharding
from m2l2.configs import base

GOLDENS = Path(__file__).parent / 'goldens' / 'sharding'
MESHES = {  # preset: the mesh of the equality test, the mesh of the golden
    'dp': (dict(data=8), dict(data=8)), 'fsdp': (dict(data=1, fsdp=8), dict(data=1, fsdp=8)),
    'hsdp': (dict(data=4, fsdp=2), dict(data=4, fsdp=2)), 'tp': (dict(data=2, fsdp=2, tensor=2),) * 2}
STEPS = 5
_OPTIONS = {'xla_backend_optimization_level': 0}  # compiling is what these tests cost


@functools.cache
def functions():
  config = base.get_config('debug')
  with config.unlocked():
    config.model.update(stem=(4, 2), bins=64, frames=8, widths=(16,), head_dim=8, blocks=(1,), strides=(), remat='none')
    config.train.update(steps=100, warmup_steps=1, learning_rate=1e-3)
  return build.step_functions(json.loads(json.dumps(config.to_dict())))


@functools.cache
def batches():
  fns = functions()
  rng = np.random.default_rng(0)
  shape = (8, fns.channels, fns.crop_samples)
  return [rng.uniform(-0.5, 0.5, shape).astype(np.float32) for _ in range(STEPS)]


def losses(mesh, preset):
  """Losses and last parameters of a few steps; everything that can be split is split."""
  fns = functions()
  with jax.set_mesh(mesh):
    key = jax.random.key(0, impl='unsafe_rbg')  # compiles in no time
    abstract = jax.eval_shape(fns.init, key)
    placed = sharding.param_shardings(abstract.params, fns.logical_axes, mesh=mesh, preset=preset, min_size=1)
    shardings = sharding.state_shardings(abstract, placed.shardings, mesh=mesh)
    whole = sharding.replicated(mesh)
    # Drawn whole, then laid out: this generator's numbers depend on the layout.
    state = jax.jit(fns.init, out_shardings=whole, compiler_options=_OPTIONS)(key)
    state = jax.device_put(state, shardings)
    step = jax.jit(fns.train_step, donate_argnums=0, out_shardings=(shardings, whole), compiler_options=_OPTIONS)
    values = []
    for audio in batches():
      state, metrics = step(state, sharding.put_batch({'audio': audio}, mesh))
      values.append(float(metrics['loss']))
    assert step._cache_size() == 1  # the second step did not compile again
    return np.asarray(values), placed, sharding.fetch(state.params)


@functools.cache
def alone():
  return losses(sharding.make_mesh(data=1, devices=jax.devices()[:1]), 'dp')


# tp splits by all that the others split by.
@pytest.mark.parametrize('preset', [
    pytest.param(preset, marks=pytest.mark.soak) for preset in sharding.PRESETS])
def test_five_steps_are_those_of_one_device(preset):
  values, placed, params = losses(sharding.make_mesh(**MESHES[preset][0]), preset)
  expected, _, expected_params = alone()
  split = sum(any(s.spec) for s in jax.tree.leaves(placed.shardings))
  assert split > 20 or preset == 'dp' and not split
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  assert len(set(values)) == STEPS
  moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params))]
  assert max(moved) < 1e-4


@functools.cache
def base_shapes():
  fns = build.step_functions(json.loads(json.dumps(base.get_config().to_dict())))
  return jax.eval_shape(fns.init, jax.random.key(0)).params, fns.logical_axes


@pytest.mark.parametrize('preset', sharding.PRESETS)
def test_where_base_lies(preset):
  """Golden tables of the full size; what finds no place is listed at the end."""
  params, logical_axes = base_shapes()
  placed = sharding.param_shardings(
      params, logical_axes, mesh=sharding.make_mesh(**MESHES[preset][1]), preset=preset)
  lines = [f'{jax.tree_util.keystr(path, simple=True, separator="/")}  {"x".join(map(str, x.shape))}  {tuple(s.spec)}'
           for (path, x), s in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(placed.shardings))]
  lines += [f'whole on every device: {name} {shape}' for name, shape in placed.unplaced]
  golden = GOLDENS / f'{preset}.txt'
  if os.environ.get('UPDATE_GOLDEN') == '1':
    golden.parent.mkdir(exist_ok=True)
    golden.write_text('\n'.join(lines) + '\n')
  assert lines == golden.read_text().splitlines(), f'{golden} differs: UPDATE_GOLDEN=1 rewrites it'


def test_activations_are_told_only_what_divides():
  mesh = sharding.make_mesh(data=4, tensor=2)
  with jax.set_mesh(mesh):
    spec = functools.partial(sharding.activation_spec, (8, 3, 2, 5))
    assert spec('batch', None, 'heads', None) == jax.P(('data', 'fsdp'), None, 'tensor', None)
    assert sharding.activation_spec((6, 3, 3, 5), 'batch', None, 'heads', None) == jax.P(None, None, None, None)
  assert sharding.activation_spec((8, 3), 'batch', None) is None
  assert sharding.constrain(x := jnp.zeros((2, 2)), 'batch', None) is x
