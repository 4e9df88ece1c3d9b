"""The placement table, on the 8 fake devices that conftest.py asks for."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from m2l2 import sharding
from m2l2.errors import UserError


def _shape(*dims):
  return jax.ShapeDtypeStruct(dims, jnp.float32)


def _specs(shapes, names, *, preset, min_size=1, **sizes):
  mesh = sharding.make_mesh(**sizes)
  placed = sharding.param_shardings(shapes, names, mesh=mesh, preset=preset, min_size=min_size)
  return jax.tree.map(lambda s: tuple(s.spec), placed.shardings), placed.unplaced


@pytest.mark.parametrize('sizes, expected', [
  ({}, (8, 1, 1)), ({'fsdp': 4}, (2, 4, 1)), ({'data': 1, 'fsdp': -1}, (1, 8, 1)),
  ({'data': 2, 'fsdp': 2, 'tensor': 2}, (2, 2, 2)), ({'tensor': -1, 'data': 4}, (4, 1, 2))])
def test_mesh_fills_the_open_axis(sizes, expected):
  mesh = sharding.make_mesh(**sizes)
  assert tuple(mesh.shape.values()) == expected
  assert mesh.axis_names == ('data', 'fsdp', 'tensor')
  assert mesh.axis_types == (AxisType.Auto,) * 3


def test_mesh_of_chosen_devices():
  assert sharding.make_mesh(devices=jax.devices()[:2], fsdp=2).shape['fsdp'] == 2


@pytest.mark.parametrize('sizes', [
  {'data': 3}, {'fsdp': 3}, {'data': -1, 'fsdp': -1}, {'tensor': 0}, {'fsdp': 16}, {'data': -2}])
def test_mesh_that_does_not_fit_is_one_clear_line(sizes):
  with pytest.raises(ValueError, match='mesh.data=') as error:
    sharding.make_mesh(**sizes)
  assert '\n' not in str(error.value)


TREE = {
  'attention': _shape(12, 3, 64, 4, 16),
  'mlp': _shape(12, 64, 256),
  'norm': _shape(64),
  'conv': _shape(3, 3, 32, 128),
}
NAMES = {
  'attention': ('layers', 'qkv', 'embed', 'heads', 'head_dim'),
  'mlp': ('layers', 'embed', 'mlp'),
  'norm': ('embed',),
  'conv': ('kernel_f', 'kernel_t', 'conv_in', 'conv_out'),
}


def test_dp_splits_nothing_and_reports_nothing():
  specs, unplaced = _specs(TREE, NAMES, preset='dp', fsdp=4)
  assert all(not any(spec) for spec in specs.values()) and not unplaced


@pytest.mark.parametrize('preset, sizes', [
  ('fsdp', {'data': 1, 'fsdp': -1}), ('hsdp', {'data': 4, 'fsdp': 2})])
def test_fsdp_by_name_then_by_largest_dimension(preset, sizes):
  specs, unplaced = _specs(TREE, NAMES, preset=preset, min_size=100, **sizes)
  assert specs == {
    'attention': (None, None, 'fsdp', None, None),
    'mlp': (None, 'fsdp', None),
    'norm': (None,),                          # below the size floor
    'conv': (None, None, None, 'fsdp'),       # not in the table: its largest dimension
  }
  assert not unplaced


def test_tp_splits_heads_and_mlp_too():
  specs, _ = _specs(TREE, NAMES, preset='tp', min_size=100, data=2, fsdp=2, tensor=2)
  assert specs['attention'] == (None, None, 'fsdp', 'tensor', None)
  assert specs['mlp'] == (None, 'fsdp', 'tensor')


def test_axis_of_size_one_is_left_out():
  specs, _ = _specs(TREE, NAMES, preset='tp', min_size=100, tensor=2)
  assert specs['mlp'] == (None, None, 'tensor')


def test_indivisible_named_axis_falls_back_and_the_homeless_are_reported():
  shapes = {'a': _shape(6, 16), 'b': _shape(6, 7), 'c': _shape(16, 6), 'd': _shape(16, 6)}
  names = {'a': ('embed', 'cond'), 'b': ('embed', 'cond'), 'c': ('layers', 'embed'),
           'd': (None, 'embed')}
  specs, unplaced = _specs(shapes, names, preset='fsdp', data=2, fsdp=4)
  assert specs['a'] == (None, 'fsdp')
  assert not any(specs['b']) and not any(specs['c']) and not any(specs['d'])
  assert dict(unplaced) == {'b': (6, 7), 'c': (16, 6), 'd': (16, 6)}


def test_two_names_on_one_mesh_axis_raise_with_the_path():
  with pytest.raises(ValueError, match="block/w.*one mesh axis"):
    _specs({'block': {'w': _shape(8, 8)}}, {'block': {'w': ('embed', 'embed')}}, preset='fsdp')


def test_names_must_fit_the_shape_and_the_preset_must_exist():
  with pytest.raises(ValueError, match='one name per axis'):
    _specs({'w': _shape(8, 8)}, {'w': ('embed',)}, preset='dp')
  with pytest.raises(ValueError, match='mesh.preset'):
    _specs({'w': _shape(8)}, {'w': ('embed',)}, preset='ddp')


def test_state_takes_the_shardings_of_the_parameters():
  mesh = sharding.make_mesh(fsdp=2)
  params = {'w': _shape(8, 4), 'b': {'v': _shape(4)}}
  names = {'w': ('embed', 'mlp'), 'b': {'v': ('mlp',)}}
  placed = sharding.param_shardings(params, names, mesh=mesh, preset='fsdp', min_size=8)
  state = {'step': _shape(), 'params': params, 'ema': params, 'opt': ((), (_shape(), params))}
  got = sharding.state_shardings(state, placed.shardings, mesh=mesh)
  assert jax.tree.structure(got) == jax.tree.structure(state)
  assert got['ema'] == got['params'] == got['opt'][1][1] == placed.shardings
  assert got['params']['w'].spec == P('fsdp', None)
  assert got['step'] == got['opt'][1][0] == NamedSharding(mesh, P())


def test_init_under_out_shardings_really_splits():
  mesh = sharding.make_mesh(data=1, fsdp=-1)
  placed = sharding.param_shardings(
    {'w': _shape(16, 4)}, {'w': ('embed', 'mlp')}, mesh=mesh, preset='fsdp', min_size=1)
  params = jax.jit(lambda: {'w': jnp.ones((16, 4))}, out_shardings=placed.shardings)()
  assert {s.data.shape for s in params['w'].addressable_shards} == {(2, 4)}


def test_put_batch_splits_rows_over_data_and_fsdp_and_fetch_returns_them():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  assert sharding.batch_shards(mesh) == 4
  rows = {'audio': np.arange(8 * 2 * 5, dtype=np.float32).reshape(8, 2, 5), 'n': np.arange(8)}
  batch = sharding.put_batch(rows, mesh)
  assert batch['audio'].sharding == sharding.batch_sharding(mesh)
  assert {s.data.shape for s in batch['audio'].addressable_shards} == {(2, 2, 5)}
  got = sharding.fetch(batch)
  np.testing.assert_array_equal(got['audio'], rows['audio'])
  np.testing.assert_array_equal(got['n'], rows['n'])


def test_what_was_fetched_stays_when_the_arrays_are_donated():
  bump = jax.jit(lambda x: x + 1, donate_argnums=0)
  for _ in range(3):
    x = jnp.zeros(100_000)
    got = sharding.fetch({'x': x})['x']
    for _ in range(3):
      x = bump(x)
    jax.block_until_ready(x)
    np.testing.assert_array_equal(got, np.zeros(100_000))
    assert got.flags.owndata
  assert sharding.fetch({'x': x}, here=False) == {'x': None}


def test_one_process_feeds_all_rows():
  assert sharding.batch_blocks(sharding.make_mesh(data=2, fsdp=2, tensor=2)) == ((0,), 1)


@pytest.mark.parametrize('rows,joined', [
  ({3}, ((3,), 8)), ({2, 3}, ((1,), 4)), ({4, 5, 6, 7}, ((1,), 2)),
  ({1, 2}, ((1, 2), 8)),          # together, but no block of two
  ({0, 1, 6, 7}, ((0, 1, 6, 7), 8)),  # four neighbours on a torus, counted along its rows
])
def test_rows_of_a_process_are_as_few_blocks_as_can_be(rows, joined):
  assert sharding.joined_blocks(rows, 8) == joined


def test_put_batch_takes_rows_that_do_not_lie_together(monkeypatch):
  mesh = sharding.make_mesh(data=8)
  # This process has the even rows only; what the devices of the odd ones ask for is not at hand.
  monkeypatch.setattr(sharding, 'batch_blocks', lambda mesh: ((0, 2, 4, 6), 8))
  asked = {}
  monkeypatch.setattr(jax, 'make_array_from_callback',
                      lambda shape, sharding, rows_at: asked.update(shape=shape, rows_at=rows_at))
  even = np.arange(32).reshape(16, 2)[[0, 1, 4, 5, 8, 9, 12, 13]]
  sharding.put_batch(even, mesh)
  assert asked['shape'] == (16, 2)
  for first in (0, 4, 8, 12):
    got = asked['rows_at']((slice(first, first + 2), slice(None)))
    np.testing.assert_array_equal(got, np.arange(32).reshape(16, 2)[first:first + 2])


@pytest.mark.parametrize('sizes,slices,parts', [
  ((8, 1, 1), 2, (2, 1, 1)), ((8, 4, 1), 8, (8, 1, 1)), ((2, 16, 1), 4, (2, 2, 1)), ((1, 1, 8), 4, (1, 1, 4))])
def test_slices_lie_along_data_as_far_as_it_divides(sizes, slices, parts):
  assert sharding.split_over_slices(sizes, slices) == parts


def test_a_mesh_that_slices_do_not_divide_is_refused():
  with pytest.raises(UserError, match='5 x 2 x 1 devices cannot be laid over 4 slices: make mesh.data a multiple of 4'):
    sharding.split_over_slices((5, 2, 1), 4)


class Device:
  """Of a slice, as JAX's are; of no known network."""
  platform, device_kind = 'gpu', 'a card'

  def __init__(self, number):
    self.id, self.slice_index, self.process_index = number, number // 4, number // 4


def test_a_mesh_of_several_slices():
  devices = [Device(number) for number in range(8)]
  mesh = sharding.make_mesh(fsdp=2, devices=devices)
  assert dict(mesh.shape) == {'data': 4, 'fsdp': 2, 'tensor': 1}
  for row in mesh.devices[:, :, 0]:
    assert len({device.slice_index for device in row}) == 1  # 'fsdp' stays inside one
  assert {device.slice_index for device in mesh.devices[:2].flat} == {0}


def test_put_batch_passes_the_transfer_guard():
  mesh = sharding.make_mesh()
  with jax.transfer_guard('disallow'):
    sharding.put_batch({'audio': np.zeros((8, 1, 4), np.float32)}, mesh)


def test_constrain_without_a_mesh_is_the_identity():
  x = jnp.ones((4, 2))
  assert sharding.constrain(x, 'batch', None) is x


def test_constrain_splits_what_divides():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

  def place(shape, *names):
    with jax.set_mesh(mesh):
      return jax.jit(lambda: sharding.constrain(jnp.ones(shape), *names))().sharding.spec

  assert place((8, 3, 4), 'batch', 'tokens', 'heads') == P(('data', 'fsdp'), None, 'tensor')
  assert not any(place((6, 3), 'batch', None))   # 4 parts do not divide 6 rows
  assert not any(place((3, 5), 'heads', None))


def test_constrain_wants_one_name_per_dimension():
  with jax.set_mesh(sharding.make_mesh()), pytest.raises(ValueError, match='names'):
    sharding.constrain(jnp.ones((8, 2)), 'batch')
