"""Gradients summed over devices in float32: the same update, and float32 on the way."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from test_train_step import _batch, _close, _functions, _gradients, _jit

from m2l2 import sharding
from m2l2.errors import UserError
from m2l2.kernels.contraction import contract
from m2l2.planning import plan
from m2l2.training.reduction import reduced


@pytest.fixture(scope='module')
def alone():
  functions = _functions()
  state = _jit(functions.init)(jax.random.key(0))
  return state, *_jit(functions.train_step)(state, _batch())


@pytest.fixture(scope='module')
def spread():
  """(state, batch) -> an update in two microbatches on 8 devices."""
  mesh = sharding.make_mesh(data=4, fsdp=2)
  whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  step = _jit(_functions(accumulate=2, reduction='float32').train_step, out_shardings=whole)

  def run(state, batch):
    with jax.set_mesh(mesh):
      return step(jax.device_put(state, whole), jax.device_put(batch, rows))
  return run


def test_the_update_is_the_same_on_any_mesh(alone, spread):
  state, after, metrics = alone
  got, seen = spread(state, _batch())
  _close(_gradients(state, got), _gradients(state, after))
  for name in ('loss', 'loss/envelope', 'norm/gradients'):
    _close(seen[name], metrics[name])
  # Each device sees one chunk pair a microbatch: few hold a draw of each band, and none that is there is lost.
  bands = {name for name, value in metrics.items() if name.startswith('loss/sigma') and np.isfinite(value)}
  assert bands and all(np.isfinite(seen[name]) for name in bands)


def _sum_of_rows(params, audio, keys, step):
  loss = lambda params: jnp.mean(audio[:, 0].astype(jnp.bfloat16) @ params['w'].astype(jnp.bfloat16)).astype(float)
  return jax.grad(loss)(params), {'loss': loss(params), 'loss/sigma_0_1': jnp.where(step > 0, 1., jnp.nan)}


def test_what_devices_exchange_is_float32():
  mesh = sharding.make_mesh()
  args = ({'w': jnp.ones((4, 3))}, jnp.ones((8, 1, 4)), jax.random.split(jax.random.key(0), 8), jnp.int32(0))
  with jax.set_mesh(mesh):
    text = jax.jit(reduced(_sum_of_rows, 'float32')).lower(*args).as_text()
    results = re.findall(r'all_reduce"?.*?-> tensor<([\dx]*)(\w+)>', text, flags=re.S)
    assert ('4x3x', 'f32') in results and {dtype for _, dtype in results} == {'f32'}
    # One row of 256 and seven of 1: in bfloat16, 8 bits, the seven would be lost one by one.
    audio = jnp.ones((8, 1, 4)).at[3].set(256.)
    audio = jax.device_put(audio, NamedSharding(mesh, P(sharding.BATCH_AXES)))
    grads, metrics = jax.jit(reduced(_sum_of_rows, 'float32'))(args[0], audio, *args[2:])
  np.testing.assert_array_equal(grads['w'], np.full((4, 3), np.float32(jnp.bfloat16(1 / 3)) * 263 / 8))
  assert np.isnan(metrics['loss/sigma_0_1'])


def test_a_bad_row_makes_the_loss_bad(alone, spread):
  after, metrics = spread(alone[0], {'audio': _batch()['audio'].at[3, 0, 5].set(np.nan)})
  assert np.isnan(metrics['loss']) and int(after.skipped) == 1


def test_without_a_mesh_nothing_is_exchanged():
  args = ({'w': jnp.ones((4, 3))}, jnp.ones((8, 1, 4)), jax.random.split(jax.random.key(0), 8), jnp.int32(0))
  of_rows = functools.partial(_sum_of_rows)
  assert reduced(of_rows, 'activations') is of_rows
  text = jax.jit(reduced(of_rows, 'float32')).lower(*args).as_text()
  assert 'all_reduce' not in text


def test_what_cannot_be_is_one_clear_line():
  with pytest.raises(UserError, match="^train.reduction='bf16' is not known: choose from activations, float32$"):
    reduced(_sum_of_rows, 'bf16')
  with jax.set_mesh(sharding.make_mesh(tensor=2)), pytest.raises(UserError, match='set mesh.tensor=1, not 2'):
    jax.eval_shape(reduced(_sum_of_rows, 'float32'), {'w': jnp.ones((4, 3))}, jnp.ones((8, 1, 4)),
                   jax.random.split(jax.random.key(0), 8), jnp.int32(0))


@pytest.mark.tpu
@pytest.mark.parametrize('reduction, dtype', [('activations', 'bf16'), ('float32', 'f32')])
def test_tpus_sum_in_the_dtype_that_is_asked_for(reduction, dtype):
  _, devices = plan._topology('v5e:2x2')
  mesh = sharding.make_mesh(devices=devices)
  whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)

  def of_rows(params, audio, keys, step):
    x = audio[:, 0].astype(jnp.bfloat16)
    loss = lambda params: jnp.mean(contract(x, params['w'].astype(jnp.bfloat16)).astype(jnp.float32) ** 2)
    return jax.grad(loss)(params), {'loss': loss(params)}

  shape = lambda *sizes, dtype, place: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
  args = ({'w': shape(512, 512, dtype=jnp.float32, place=whole)}, shape(64, 1, 512, dtype=jnp.float32, place=rows),
          shape(64, dtype=jnp.uint32, place=rows), shape(dtype=jnp.int32, place=whole))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = jax.jit(reduced(of_rows, reduction), out_shardings=whole).lower(*args).compile().as_text()
  sums = re.findall(r'= \(?(\w+)\[512,512\].* all-reduce', text)
  assert set(sums) == {dtype}, sums
