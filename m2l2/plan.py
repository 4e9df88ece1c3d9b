"""What a training run would need on a TPU pod, from the TPU's own compiler, without the pod.

The whole train step is compiled ahead of time for a named topology. Memory, traffic and collectives are the compiled
program's; FLOPs are counted from the traced one; times are bounds from published peaks, not measurements.
"""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np

from m2l2 import build, flops, hlo, sharding
from m2l2.errors import UserError
from m2l2.kernels.chunk_causal import compiling_for

GIB = 2 ** 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of one chip: bfloat16 TFLOP/s, GiB of HBM, GB/s to it, GB/s over all links, width of the unit."""
  tflops: float
  hbm_gib: float
  hbm_gbps: float
  link_gbps: float
  unit: int = 128
  chips_per_host: int = 4


# cloud.google.com/tpu/docs/system-architecture-tpu-vm; HBM is what the compiler lets a program have.
CHIPS = {
    'v4': Chip(275, 32, 1228, 300),
    'v5e': Chip(197, 15.75, 819, 200, chips_per_host=4),
    'v5p': Chip(459, 95.74, 2765, 600),
    'v6e': Chip(918, 31.25, 1640, 448, unit=256, chips_per_host=4),
}


def plan(config, topology: str, *, preset: str | None = None, batch: int | None = None,
         max_batch: bool = False) -> dict:
  """Compiles the train step of a config for a TPU topology; nothing is run.

  Args:
    config: as `configs/base.py` makes it.
    topology: 'v5e:16x16', 'v5p:4x8x8', ...
    preset, batch: instead of the config's mesh.preset and train.batch_size.
    max_batch: bisects for the largest batch (in multiples of the chips) that fits; several compiles.

  Returns:
    the JSON of `m2l2 plan` (design: section 6); bytes are per chip.

  Raises UserError: no TPU compiler, an unknown topology or preset, or a batch that does not divide.
  """
  chip, devices = _topology(topology)
  config = config.copy_and_resolve_references().unlock()
  config.mesh.preset = preset or config.mesh.preset
  config.train.batch_size = batch or config.train.batch_size
  config.model.dtype = 'bfloat16'
  config.model.tile = str(chip.unit) if config.model.tile == 'auto' else config.model.tile
  if config.model.attention == 'auto' and config.model.head_dim % 128:
    config.model.attention = 'xla'
  mesh = _mesh(config, devices)
  shards = sharding.batch_shards(mesh)
  if config.train.batch_size % (shards * config.train.accumulate):
    raise UserError(f'a batch of {config.train.batch_size} does not divide over {shards} chips: '
                    f'--batch={shards * config.train.accumulate * max(1, config.train.batch_size // shards)}')
  if max_batch:
    config.train.batch_size = _largest_batch(config, mesh, chip, step=shards * config.train.accumulate)
  compiled, error = _compile(config, mesh)
  report = {'topology': topology, 'devices': len(devices), 'preset': config.mesh.preset, 'mesh': dict(mesh.shape),
            'batch': config.train.batch_size, 'fits': compiled is not None}
  if compiled is None:
    return {**report, 'error': error}
  return {**report, **_figures(config, compiled, chip, chips=len(devices))}


def _figures(config, compiled, chip, *, chips) -> dict:
  memory = compiled.memory_analysis()
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  peak = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
  work = step_flops(config, unit=chip.unit)
  traffic = hlo.count_traffic(compiled.as_text())
  sent = sum(traffic.collectives.values())
  seconds = {'compute': work.padded / chips / (chip.tflops * 1e12),
             'memory': traffic.accessed / (chip.hbm_gbps * 1e9), 'links': sent / (chip.link_gbps * 1e9)}
  by = max(seconds, key=seconds.get)
  step = seconds[by]
  steps, batch = config.train.steps, config.train.batch_size
  return {
      'bytes': {'arguments': arguments, 'temporaries': temporaries, 'peak': peak, 'hbm': int(chip.hbm_gib * GIB),
                'accessed': traffic.accessed},
      'flops': {'step': work.total, 'padded': work.padded, 'attention': work.attention,
                'convolutions': work.convolutions, 'products': work.products},
      'collectives': dict(sorted(traffic.collectives.items())),
      'bound': {'step_seconds': step, 'mfu': work.total / chips / (chip.tflops * 1e12) / step, 'by': by,
                'seconds': seconds},
      'chip_hours': steps * step * chips / 3600,
      'crops_per_second_per_host': batch / step / max(1, chips // chip.chips_per_host)}


def step_flops(config, *, unit: int = 128) -> flops.Flops:
  """FLOPs of one step, counted on the plain program: rematerialisation and fused kernels left out."""
  plain = config.copy_and_resolve_references().unlock()
  plain.model.remat, plain.model.attention, plain.train.accumulate = 'none', 'xla', 1
  functions = build.step_functions(plain)
  state = jax.eval_shape(functions.init, jax.random.key(0))
  audio = jax.ShapeDtypeStruct((config.train.batch_size, functions.channels, functions.crop_samples), jnp.float32)
  return flops.count_flops(jax.make_jaxpr(functions.train_step)(state, {'audio': audio}).jaxpr, unit=unit)


def _compile(config, mesh):
  """-> (compiled step, '') or (None, why it does not fit)."""
  with compiling_for("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    functions = build.step_functions(config)
    abstract = jax.eval_shape(functions.init, jax.random.key(0))
    placement = sharding.param_shardings(abstract.params, functions.logical_axes, mesh=mesh, preset=config.mesh.preset)
    shardings = sharding.state_shardings(abstract, placement.shardings, mesh=mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    audio = jax.ShapeDtypeStruct((config.train.batch_size, functions.channels, functions.crop_samples), jnp.float32,
                                 sharding=sharding.batch_sharding(mesh))
    step = jax.jit(functions.train_step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    lowered = step.lower(abstract, {'audio': audio})
    try:
      return lowered.compile(), ''
    except Exception as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return None, _first_line(error)


def _largest_batch(config, mesh, chip, *, step) -> int:
  """The largest multiple of `step` that compiles within HBM: doubling, then bisection."""
  def fits(count):
    config.train.batch_size = count * step
    return _compile(config, mesh)[0] is not None

  low, high = 0, 1
  while high <= 1024 and fits(high):
    low, high = high, 2 * high
  while high - low > max(1, low // 8):
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  if not low:
    raise UserError(f'not even a batch of {step} fits the {chip.hbm_gib:g} GiB of a chip')
  return low * step


def _topology(name):
  kind = name.partition(':')[0]
  if kind not in CHIPS:
    raise UserError(f'--topology={name}: the kinds known here are {", ".join(CHIPS)}, as in v5e:16x16')
  # Without these the TPU's library looks for a TPU on this machine, and says so at length.
  for variable, value in {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-256',
                          'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0', 'TPU_STDERR_LOG_LEVEL': '3',
                          'TPU_MIN_LOG_LEVEL': '3', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}.items():
    os.environ.setdefault(variable, value)
  from jax.experimental import topologies
  try:
    import libtpu  # noqa: F401
  except ModuleNotFoundError as error:
    raise UserError("planning needs the TPU's compiler: pip install 'm2l2[tpu]' (no TPU needed)") from error
  extra = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  try:
    topology = topologies.get_topology_desc(platform='tpu', topology_name=name, **extra)
  except Exception as error:
    raise UserError(f'--topology={name} is not a TPU topology ({_first_line(error)})') from error
  return CHIPS[kind], list(topology.devices)


def _mesh(config, devices):
  from jax.experimental import mesh_utils
  sizes = sharding.mesh_sizes(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor,
                              count=len(devices))
  grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(np.asarray(grid), sharding.MESH_AXES)


def _first_line(error) -> str:
  return re.sub(r'\s+', ' ', str(error).strip().splitlines()[0])[:300]


def as_text(report) -> str:
  """The report as lines for people."""
  lines = [f'{report["topology"]}: {report["devices"]} chips, mesh {report["mesh"]}, preset {report["preset"]}, batch '
           f'{report["batch"]}']
  if not report['fits']:
    return '\n'.join([*lines, f'does not fit: {report["error"]}'])
  sizes, bound, work = report['bytes'], report['bound'], report['flops']
  share = {kind: flops / work['step'] for kind, flops in work.items()}
  lines += [
      f'memory per chip: {sizes["peak"] / GIB:.2f} of {sizes["hbm"] / GIB:.2f} GiB (state and batch '
      f'{sizes["arguments"] / GIB:.2f}, temporaries {sizes["temporaries"] / GIB:.2f})',
      f'FLOPs a step: {work["step"] / 1e12:.1f} T ({work["padded"] / work["step"]:.2f}x when padded to the '
      f'matrix unit); convolutions {share["convolutions"]:.0%}, attention {share["attention"]:.0%}',
      f'traffic per chip and step: {sizes["accessed"] / GIB:.1f} GiB; collectives: ' + (', '.join(
          f'{kind} {size / GIB:.2f} GiB' for kind, size in report['collectives'].items()) or 'none'),
      f'bound (not a measurement): {bound["step_seconds"] * 1e3:.1f} ms a step by {bound["by"]}, MFU at most '
      f'{bound["mfu"]:.0%}; {report["chip_hours"]:,.0f} chip-hours for the run; '
      f'{report["crops_per_second_per_host"]:.0f} crops/s per host']
  return '\n'.join(lines)


def main(config, args) -> None:
  """`m2l2 plan`: JSON on stdout, the table on stderr."""
  import sys
  report = plan(config, args.topology, preset=args.preset, batch=args.batch, max_batch=args.max_batch)
  print(as_text(report), file=sys.stderr)
  print(json.dumps(report, indent=2))
