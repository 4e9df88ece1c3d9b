"""`m2l2 plan`: what it says without the TPU's compiler; with it (marker tpu), a whole plan."""

import collections
import dataclasses
import json
import re
import sys
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2 import cli, sharding
from m2l2.configs import base, nano
from m2l2.errors import UserError
from m2l2.kernels.chunk_causal import compiling_for
from m2l2.model import remat
from m2l2.model.transformer import Transformer
from m2l2.planning import chips, plan
from m2l2.planning.traffic import OperationCost, Traffic, count_traffic
from m2l2.variants.packing import PackedConvBlock


@pytest.mark.parametrize('flags,message', [
    (['--config=nano.py', '--topology=v9:2x2'], 'm2l2: --topology=v9:2x2: the kinds known here are v2, '),
    (['--config=nano.py', '--topology=v5e'], 'm2l2: --topology=v5e: the kinds'),
    (['--topology=v5e:2x2'], 'm2l2: --config=... is missing'),
    (['--config=nano.py', '--topology=v5e:2x2', '--config.nothing=1'],
     "m2l2: --config.nothing: the config has no field 'nothing'"),
    (['--config=nano.py', '--topology=v5e:2x2', 'what'], "m2l2: 'what' is not a flag"),
])
def test_mistakes_are_one_line(flags, message, capsys):
  assert cli.main(['plan', *flags]) == 1
  out, err = capsys.readouterr()
  assert not out and err.startswith(message) and err.count('\n') == 1


def test_help_shows_an_example(capsys):
  assert cli.main(['plan', '--help']) == 0
  assert 'm2l2 plan --config=configs/base.py --topology=v5e:16x16' in capsys.readouterr().out


@pytest.mark.parametrize('known,limit,expected', [
    ({}, 8, 4), ({}, 1, None),            # nothing fits yet
    ({4: 400.0}, None, 25),               # one size: as if all of it grew with the batch
    ({1: 2000.0}, None, 2),               # which it does not
    ({30: 2600.0}, None, None),           # known to within an eighth
    ({20: 1750.0, 30: 2600.0}, None, None),
    ({4: 400.0, 8: 700.0}, None, 32),     # a line: 75 each, up to 90 % of the memory
    ({4: 400.0, 8: 700.0}, 20, 19),       # but not what failed
    ({4: 400.0, 16: 2900.0}, 20, 18),     # nor back to what is known: halve the rest
    ({16: 2900.0}, 18, None),             # known to within an eighth
])
def test_the_search_for_the_largest_batch(known, limit, expected):
  assert plan.next_guess(known, hbm=2831.0, limit=limit) == expected


def test_the_table_for_people():
  report = {
      'topology': 'v5e:2x2', 'devices': 4, 'hosts': 1, 'mesh': {'data': 4, 'fsdp': 1}, 'preset': 'dp', 'batch': 16,
      'fits': True, 'bytes': {'peak': 2**33, 'hbm': 2**34, 'arguments': 2**32, 'temporaries': 2**32, 'probe': 2**31,
                              'accessed': 2**35},
      'flops': {'step': 4e13, 'convolutions': 2e13, 'attention': 4e12, 'executed': 5e13, 'padded': 8e13,
                'padded_convolutions': 4e13, 'padded_attention': 1e13},
      'collectives': {'all-reduce': 2.0**29},
      'bound': {'step_seconds': .1, 'mfu': .5, 'by': 'compute',
                'seconds': {'compute': .1, 'memory': .04, 'links': .003}},
      'estimate': {'step_seconds': .2, 'mfu': .25, 'cycles': 3e8, 'clock': 1.5e9, 'kernels': 3e7,
                   'without': {'sort': {'count': 3., 'bytes': 2.0**28}}},
      'parts': [{'scope': 'student/mlp', 'kind': 'product', 'cycles': 2e8, 'bytes': 2.0**30, 'flops': 2e12, 'mfu': .4},
                {'scope': 'teacher', 'kind': 'copy', 'cycles': 1e6, 'bytes': 2.0**29, 'flops': 0., 'mfu': 0.},
                {'scope': 'teacher', 'kind': 'sort', 'cycles': 0., 'bytes': 2.0**29, 'flops': 0., 'mfu': None}],
      'run': {'steps': 800_000, 'crops': 819_200_000, 'config_crops': 12_800_000,
              'chip_hours': {'bound': 1234.5, 'estimate': 2469.}},
      'crops_per_second_per_host': 160.0}
  text = plan.as_text(report)
  for part in ('4 chips, 1 hosts', '8.00 of 16 GiB', 'temporaries 4.00, of a probe 2.00', 'convolutions 50%',
               'all-reduce 0.50 GiB', '100.0 ms a step by '
               'compute', 'MFU at most 50%', '200.0 ms a step by the compiler (300.0 M cycles at 1.50 GHz): MFU 25%',
               'Pallas kernels 20.0 ms', 'want of an estimate: sort (3 times, 0.25 GiB)',
               '800,000 steps are 819.2 M crops (64 times', '1,234 chip-hours at the bound, 2,469 at the estimate',
               '160 crops/s'):
    assert part in text
  table = [line.split() for line in text.splitlines()[-2:]]
  assert table == [['student/mlp', 'product', '200.00', '1.00', '2.000', '40%'],
                   ['2', 'smaller', 'ones', '1.00', '1.00', '0.000']]
  report['bytes']['probe'] = None
  assert 'of a probe' not in plan.as_text(report)
  assert 'does not fit: too much' in plan.as_text({**report, 'fits': False, 'error': 'too much'})


def program(**sizes):
  names = ('argument', 'temp', 'output', 'alias')
  memory = types.SimpleNamespace(**{f'{name}_size_in_bytes': sizes.get(name, 0) for name in names})
  return types.SimpleNamespace(memory_analysis=lambda: memory)


def test_a_probe_runs_beside_the_whole_state():
  step = program(argument=100, temp=40, output=90, alias=85)
  assert plan.memory_of(step) == {'arguments': 100, 'temporaries': 40, 'probe': None, 'peak': 145}
  assert plan.memory_of(step, program(argument=30, temp=44, output=2)) == {
      'arguments': 100, 'temporaries': 40, 'probe': 44, 'peak': 146}
  assert plan.memory_of(step, program(argument=30, temp=20, output=2))['peak'] == 145


def test_kernels_are_added_from_what_they_say_of_themselves():
  chip = dataclasses.replace(chips.BY_NAME['v5e'], bf16_flops=1e14, hbm_bytes_per_second=1e12, clock=1e9)
  traffic = Traffic(cycles=4e6)
  traffic.parts['mlp', 'product'] = OperationCost(count=1, cycles=4e6, accessed=1e6, flops=2e11)
  traffic.parts['attention', 'kernel'] = OperationCost(count=12, accessed=1e9, flops=6e11)   # by compute: 6 ms
  traffic.parts['more', 'kernel'] = OperationCost(count=1, accessed=2e9, flops=1e11)         # by memory: 2 ms
  traffic.parts['strange', 'kernel'] = OperationCost(count=1, accessed=2e9)                  # tells nothing
  traffic.unestimated['kernel'] = OperationCost(count=1, accessed=2e9)
  estimate, parts = plan.estimate_step(traffic, chip)
  assert estimate == {'step_seconds': pytest.approx(.012), 'cycles': pytest.approx(12e6), 'clock': 1e9,
                      'kernels': pytest.approx(8e6), 'without': {'kernel': {'count': 1, 'bytes': 2e9}}}
  assert [(part['scope'], part['mfu'] and round(part['mfu'], 3)) for part in parts] == [
      ('attention', 1.), ('mlp', .5), ('more', .5), ('strange', None)]
  with pytest.raises(UserError, match='no estimated_cycles'):
    plan.estimate_step(Traffic(), chip)


# With the TPU's compiler.

@pytest.mark.tpu
@pytest.mark.parametrize('preset,kinds', [('dp', {'all-reduce'}), ('hsdp', {'all-reduce', 'all-gather'})])
def test_a_whole_plan(preset, kinds, capsys):
  flags = ['plan', '--config=nano.py:debug', '--topology=v5e:2x2', f'--preset={preset}', '--config.mesh.fsdp=2']
  assert cli.main(flags) == 0
  report = json.loads(capsys.readouterr().out)
  assert report['fits'] and report['devices'] == 4 and report['batch'] == 8
  assert 0 < report['bytes']['peak'] < report['bytes']['hbm'] and report['bytes']['accessed'] > 0
  assert report['bytes']['probe'] > 0 and report['bytes']['peak'] >= report['bytes']['arguments'] + report['bytes'][
      'probe']
  assert report['flops']['padded'] > report['flops']['executed'] > report['flops']['step'] > 0
  assert 'all-reduce' in report['collectives'] and set(report['collectives']) <= kinds | {'collective-permute'}
  assert 0 < report['estimate']['mfu'] < report['bound']['mfu'] < 1
  assert report['estimate']['cycles'] == pytest.approx(sum(part['cycles'] for part in report['parts']))


def compiled(topology, make, *inputs):
  """(Traffic, estimate, text) of the module that `make` gives, called on `inputs` forward and backward on one chip."""
  chip, devices = plan._topology(topology)
  on_one_chip = jax.sharding.SingleDeviceSharding(devices[0])
  with compiling_for('tpu'):
    graphdef, params = nnx.split(jax.eval_shape(make))
    loss = lambda params, *inputs: jnp.sum(nnx.merge(graphdef, params)(*inputs).astype(jnp.float32) ** 2)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one_chip), (params, *inputs))
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*placed).compile().as_text()
  traffic = count_traffic(text)
  return traffic, plan.estimate_step(traffic, chip)[0], text


def compiled_transformer(topology, pairs, width, tokens, cond_dim=None, **fields):
  make = lambda: Transformer(width, mlp_mult=4, tokens=tokens, chunks=2, cond_dim=cond_dim, remat='products',
                             rngs=nnx.Rngs(params=jax.random.key(0)), **fields)
  traffic, estimate, text = compiled(
      topology, make, jax.ShapeDtypeStruct((pairs, 2, tokens, width), jnp.bfloat16),
      jax.ShapeDtypeStruct((pairs, 2, cond_dim), jnp.float32) if cond_dim else None)
  assert ' while(' in text and 'known_trip_count' not in text
  return traffic, estimate


@pytest.mark.tpu
def test_each_layer_costs_as_much_as_the_one_before():
  """So large that no layer's activations stay on the chip."""
  def count(layers):
    traffic, estimate = compiled_transformer('v5e:2x2', 64, 256, 128, layers=layers, heads=2)
    return np.array([traffic.cycles, traffic.accessed, estimate['kernels']])

  four, eight, twelve = (count(layers) for layers in (4, 8, 12))
  np.testing.assert_allclose(eight - four, twelve - eight, rtol=.02)
  assert (eight > four).all()


@pytest.mark.tpu
def test_seven_layers_more_of_a_whole_step_cost_as_much_as_the_seven_before():
  """Maps this small may stay on the chip, and with fewer layers more of them do: so bytes are counted wherever the
  arrays lie."""
  def count(layers):
    config = base.get_config('debug').copy_and_resolve_references().unlock()
    config.model.layers = layers
    chip, devices = plan._topology('v5e:2x2')
    config.variants.packing.tile = str(chip.matrix_unit)
    step, _ = plan._compile(config, sharding.make_mesh(devices=devices), lambda *_: None)
    text = step.as_text()
    main = count_traffic(text)
    return np.array([main.cycles, count_traffic(re.sub(r'S\(\d+\)', '', text)).accessed]), main.accessed

  (two, _), (nine, _), (sixteen, _) = counted = [count(layers) for layers in (2, 9, 16)]
  for layers, ((cycles, accessed), main) in zip((2, 9, 16), counted):
    print(f'{layers} layers: {cycles / 1e6:.3f} M cycles, {accessed / 1e6:.1f} MB, {main / 1e6:.1f} in main memory')
  np.testing.assert_allclose(nine - two, sixteen - nine, rtol=.02)
  assert (nine > two).all()


@pytest.mark.tpu
def test_what_the_layers_of_bases_denoiser_cost():
  """12 layers, 4 pairs, on v5p: 22.1 M cycles and 10.8 GiB while float32 copies were kept for the backward pass, 19.9
  and 7.6 while what SwiGLU makes was."""
  traffic, _ = compiled_transformer('v5p:2x2x1', 4, 512, 512, cond_dim=512, layers=12, heads=4, output_norm=False)
  print(f'{traffic.cycles / 1e6:.2f} M cycles, {traffic.accessed / 2**30:.2f} GiB')
  assert traffic.cycles < 17e6 and traffic.accessed < 7.2 * 2**30


class Blocks(nnx.Module):
  """Blocks of a packed level of 64 channels, one after the other as a ladder runs them."""

  def __init__(self, count, **options):
    rngs = nnx.Rngs(params=jax.random.key(0))
    self.blocks = nnx.List([PackedConvBlock(64, pack=(1, 2), rngs=rngs, **options) for _ in range(count)])

  def __call__(self, x, *cond):
    for block in self.blocks:
      x = remat.call(block, x, *cond, remat='products')
    return x


@pytest.mark.tpu
@pytest.mark.parametrize('dtype,options,most', [
    (jnp.bfloat16, {}, 3.2e6),                                                             # encoder, decoder
    (jnp.float32, {'dtype': jnp.bfloat16, 'cond_dim': 512}, 4.8e6)])                      # denoiser
def test_what_a_block_of_bases_finest_level_costs(dtype, options, most):
  """8 chunks on v5p: what two blocks cost more than one."""
  x = jax.ShapeDtypeStruct((8, 1024, 32, 128), dtype)
  cond = [jax.ShapeDtypeStruct((8, 512), jnp.float32)] if 'cond_dim' in options else []
  one, two = (compiled('v5p:2x2x1', lambda: Blocks(count, **options), x, *cond)[0] for count in (1, 2))
  cycles, accessed = two.cycles - one.cycles, two.accessed - one.accessed
  print(f'{cycles / 1e6:.2f} M cycles, {accessed / 2**30:.2f} GiB')
  assert 0 < cycles < most


@pytest.mark.tpu
@pytest.mark.parametrize('topology,slices,sizes', [
    ('v5e:16x16', 1, {}), ('v5e:16x16', 1, {'fsdp': 4}), ('v5p:4x8x8', 1, {}), ('v6e:16x16', 1, {'fsdp': 4}),
    ('v5p:4x8x8', 1, {'fsdp': 8, 'tensor': 4}), ('v5e:4x4', 2, {}), ('v5e:4x4', 2, {'fsdp': 4})])
def test_the_processes_of_a_pod_share_each_batch(topology, slices, sizes):
  plan._topology(topology)  # sets the environment
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology, num_slices=slices).devices
  mesh = sharding.make_mesh(devices=devices, **sizes)
  count = sharding.batch_shards(mesh)
  places = sharding.batch_sharding(mesh).devices_indices_map((count,))
  items_of = collections.Counter()
  for host in {device.process_index for device in devices}:
    rows = {index[0].start or 0 for device, index in places.items() if device.process_index == host}
    blocks, of = sharding.joined_blocks(rows, count)
    items_of.update(row for block in blocks for row in range(block * count // of, (block + 1) * count // of))
  assert set(items_of) == set(range(count)) and len(set(items_of.values())) == 1  # along 'tensor' several feed the same


@pytest.mark.tpu
def test_too_large_a_batch_does_not_fit():
  report = plan.plan(nano.get_config(), 'v5e:2x2', batch=2**16)
  assert not report['fits'] and 'hbm' in report['error'].lower()


@pytest.mark.tpu
def test_the_denoiser_runs_the_attention_kernel():
  from m2l2 import build
  config = base.get_config('debug').copy_and_resolve_references().unlock()
  config.model.widths, config.model.head_dim, config.model.dtype = (8, 16, 64, 256), 128, 'bfloat16'
  _, devices = plan._topology('v5e:2x2')
  mesh = sharding.make_mesh(devices=devices)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with compiling_for('tpu'), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    network = build.network(config)
    params = network.shapes
    shape = (4, 2, config.model.bins, config.model.frames, 2)
    z = jax.ShapeDtypeStruct((4, 2, config.model.num_latents, config.model.latent_dim), np.float32)
    features = jax.eval_shape(network.decode, params, z)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), (
        params, jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct((4, 2), np.float32), features))
    text = jax.jit(network.denoise).lower(*arguments).compile().as_text()
  assert 'custom_call_target="tpu_custom_call"' in text


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  with pytest.raises(UserError, match=r"pip install 'm2l2\[train,tpu\]'"):
    plan.plan(nano.get_config('debug'), 'v5e:2x2')
