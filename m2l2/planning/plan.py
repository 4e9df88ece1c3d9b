"""Estimates the memory and time of a training run on a TPU pod by the TPU compiler, without the pod.

The whole train step is compiled ahead of time for a named topology. Memory, traffic and collectives are the compiled
program's; FLOPs are counted from the traced one. Neither of the two times is a measurement: the bound is from published
peaks, the estimate the compiler's own, in cycles, for each operation alone.
"""

import importlib.util
import json
import os
import sys

import jax

from m2l2 import build, sharding
from m2l2.errors import UserError, first_line
from m2l2.kernels.chunk_causal import compiling_for
from m2l2.planning import chips
from m2l2.planning.traffic import Traffic, count_traffic
from m2l2.training import programs, scaling, timing

MAX_COMPILES = 6
FULL = 0.9  # share of the memory above which the compiler spends half an hour and more on rematerialisation
# Without these the TPU's library searches for a TPU on this machine, with long messages.
_ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-256', 'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0', 'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


def plan(config, topology: str, *, preset: str | None = None, batch: int | None = None, max_batch: bool = False,
         say=lambda line: None) -> dict:
  """Compiles the train step of a config for a TPU topology; nothing is run.

  Args:
    config: as `configs/base.py` makes it; model.dtype, model.attention and variants.packing.tile left at 'auto' become
      what they would be on that TPU.
    topology: 'v5e:16x16', 'v5p:4x8x8', ...
    preset, batch: instead of the config's mesh.preset and train.batch_size.
    max_batch: looks for the largest batch that fits, in at most MAX_COMPILES compilations.
    say: called with a line before each long step.

  Returns:
    dict of JSON types. All bytes and seconds are those of one chip.
      topology, devices, hosts, mesh, preset, batch, fits, and error if it does not fit
      bytes: arguments (state and batch), temporaries of a step, probe (temporaries of a probe, which runs beside state
        and batch; None where train.probe_every is 0), peak (of either), hbm, accessed (a step's memory traffic)
      flops: of the whole step: step (nominal), of it products, convolutions, attention; executed (recomputation
        and packing included), padded (that, padded to the matrix unit), of it padded_convolutions, padded_attention
      collectives: {kind: bytes of results}
      bound: step_seconds, mfu, by, and seconds of compute, memory and links
      estimate: the compiler's own: step_seconds, mfu, cycles, clock in Hz; of these cycles kernels: of Pallas kernels,
        which it has none for: from the FLOPs that they say of themselves and their bytes, at the chip's peaks;
        without: {kind of operation: count, bytes} of all others that it has none for, which are in no time
      parts: by named scope and kind of operation, most cycles first: scope, kind, cycles, bytes, flops (as executed,
        of products and convolutions), mfu (of these)
      run: of train.steps (as they follow this batch where config.scaling says so): steps, crops, config_crops (at the
        config's own batch), and chip_hours of the bound and of the estimate
      crops_per_second_per_host: at the bound

  Raises:
    UserError: no TPU compiler, an unknown topology or preset, a batch that does not divide, or none that fits.
  """
  chip, devices = _topology(topology)
  config = scaling.scaled(config).copy_and_resolve_references().unlock()
  config_crops = config.train.steps * config.train.batch_size
  config.mesh.preset = preset or config.mesh.preset
  if config.variants.packing.tile == 'auto':
    config.variants.packing.tile = str(chip.matrix_unit)  # text, as its type is once references are resolved
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor, devices=devices)
  unit = sharding.batch_shards(mesh) * config.train.accumulate
  # A batch of the paper's size does not divide over a pod: then one crop per chip.
  config.train.batch_size = batch or -(-config.train.batch_size // unit) * unit
  if config.train.batch_size % unit:
    raise UserError(f'--batch={batch} must be a multiple of {unit}: microbatches times the chips that share a batch')

  compiled, error = (_largest_batch(config, mesh, unit, chip.hbm_bytes, say) if max_batch
                     else _compile(config, mesh, say))
  report = {'topology': topology, 'devices': len(devices), 'hosts': len({d.process_index for d in devices}),
            'mesh': dict(mesh.shape), 'preset': config.mesh.preset, 'batch': config.train.batch_size,
            'fits': compiled is not None}
  if compiled is None:
    return {**report, 'error': error}
  probe = None
  if config.train.probe_every:
    probe, error = _compile(config, mesh, say, probe=True)
    if probe is None:
      return {**report, 'fits': False, 'error': f'the probe that train.probe_every asks for: {error}'}
  report |= _figures(config, compiled, probe, chip, report, config_crops=config_crops)
  sizes = report['bytes']
  if probe and sizes['arguments'] + sizes['probe'] > sizes['hbm']:  # the compiler knows of the probe's own alone
    return {**report, 'fits': False, 'error': 'the probe that train.probe_every asks for needs '
            f'{sizes["probe"] / chips.GIB:.2f} GiB beside state and batch of {sizes["arguments"] / chips.GIB:.2f}'}
  return report


def _figures(config, compiled, probe, chip, report, *, config_crops) -> dict:
  count, batch = report['devices'], report['batch']
  traffic = count_traffic(compiled.as_text())
  with compiling_for('tpu'):
    nominal, executed = (timing.step_flops(build.step_functions(variant, ravel=True), batch, unit=chip.matrix_unit)
                         for variant in (timing.plain_model(config), config))
  seconds = {
      'compute': executed.padded / count / chip.bf16_flops,
      'memory': traffic.accessed / chip.hbm_bytes_per_second,
      'links': sum(traffic.collectives.values()) / chip.link_bytes_per_second if chip.link_bytes_per_second else 0.0}
  by = max(seconds, key=lambda name: seconds[name])
  mfu = lambda time: nominal.total / count / chip.bf16_flops / time
  estimate, parts = estimate_step(traffic, chip)
  steps = scaling.scaled(config).train.steps
  return {
      'bytes': {**memory_of(compiled, probe), 'hbm': chip.hbm_bytes, 'accessed': traffic.accessed},
      'flops': {'step': nominal.total, 'products': nominal.products, 'convolutions': nominal.convolutions,
                'attention': nominal.attention, 'executed': executed.total, 'padded': executed.padded,
                'padded_convolutions': executed.padded_convolutions, 'padded_attention': executed.padded_attention},
      'collectives': dict(sorted(traffic.collectives.items())),
      'bound': {'step_seconds': seconds[by], 'mfu': mfu(seconds[by]), 'by': by, 'seconds': seconds},
      'estimate': {'mfu': mfu(estimate['step_seconds']), **estimate},
      'parts': parts,
      'run': {'steps': steps, 'crops': steps * batch, 'config_crops': config_crops, 'chip_hours': {
          name: steps * time * count / 3600
          for name, time in (('bound', seconds[by]), ('estimate', estimate['step_seconds']))}},
      'crops_per_second_per_host': batch / seconds[by] / report['hosts']}


def memory_of(step, probe=None) -> dict:
  """Bytes on a chip of a compiled step and, if there is one, a compiled probe: `bytes` of the report up to peak."""
  memory, probing = step.memory_analysis(), probe and probe.memory_analysis()
  peak = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes)
  if probing:  # the whole state stays while it runs, also the moments that it does not ask for
    peak = max(peak, memory.argument_size_in_bytes + probing.temp_size_in_bytes + probing.output_size_in_bytes)
  return {'arguments': memory.argument_size_in_bytes, 'temporaries': memory.temp_size_in_bytes,
          'probe': probing.temp_size_in_bytes if probing else None, 'peak': peak}


def estimate_step(traffic: Traffic, chip: chips.Chip) -> tuple[dict, list]:
  """-> (`estimate` of the report but for its mfu, `parts`): cycles of a step on one chip, and where they are.

  Raises:
    UserError: the compiler gave no estimate at all.
  """
  if not traffic.cycles:
    raise UserError("the TPU's compiler printed no estimated_cycles, which a plan stands on: take the libtpu that goes "
                    "with m2l2 (pip install 'm2l2[train,tpu]')")
  assert chip.clock, 'TPUs have one'
  parts, of_kernels = [], 0.0
  for (scope, kind), cost in traffic.parts.items():
    cycles = cost.cycles
    if kind == 'kernel' and cost.flops and not cycles:
      cycles = chip.clock * max(cost.flops / chip.bf16_flops, cost.accessed / chip.hbm_bytes_per_second)
      of_kernels += cycles
    parts.append({'scope': scope, 'kind': kind, 'cycles': cycles, 'bytes': cost.accessed, 'flops': cost.flops,
                  'mfu': cost.flops / chip.bf16_flops * chip.clock / cycles if cycles else None})
  cycles = traffic.cycles + of_kernels
  without = {kind: {'count': cost.count, 'bytes': cost.accessed}
             for kind, cost in sorted(traffic.unestimated.items(), key=lambda entry: -entry[1].accessed)}
  return ({'step_seconds': cycles / chip.clock, 'cycles': cycles, 'clock': chip.clock, 'kernels': of_kernels,
           'without': without}, sorted(parts, key=lambda part: -part['cycles']))


def _compile(config, mesh, say, *, probe=False):
  """-> (compiled step or probe, '') or (None, the reason why it does not fit)."""
  say(f'compiling{" the probe" if probe else ""} for a batch of {config.train.batch_size}')
  # An abstract mesh: with jax.set_mesh the few arrays made while tracing would go to the TPUs that are not there.
  with compiling_for('tpu'), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    functions = build.step_functions(config)
    state, _ = programs.abstract_state(functions, lambda: functions.init(jax.random.key(0)), mesh,
                                       preset=config.mesh.preset)
    batch = programs.abstract_batch(functions, mesh, batch_size=config.train.batch_size)
    lowered = (programs.lower_probe(functions, state.params, batch, mesh, seed=config.seed) if probe
               else programs.lower_step(functions, state, batch, mesh))
    try:
      return programs.compiled(lowered, chips.compiler_options(config.train.compiler_options)), ''
    except Exception as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return None, first_line(error)


def _largest_batch(config, mesh, unit, hbm, say):
  """-> `_compile` of the largest batch found to fit, which config.train.batch_size then is.

  Memory grows nearly linearly with the batch: two sizes give an estimate, which the compiler then checks.
  """
  known, best = {}, (0, None)  # {multiple of unit: bytes}
  limit = None                 # smallest multiple that does not fit
  guess = max(1, config.train.batch_size // unit)
  error = ''
  for _ in range(MAX_COMPILES):
    config.train.batch_size = guess * unit
    compiled, error = _compile(config, mesh, say)
    if compiled is None:
      limit = min(guess, limit or guess)
    else:
      memory = compiled.memory_analysis()
      known[guess] = memory.temp_size_in_bytes
      available = memory.argument_size_in_bytes
      best = max(best, (guess, compiled), key=lambda candidate: candidate[0])
    guess = next_guess(known, hbm=hbm - available if known else 0, limit=limit)
    if guess is None:
      break
  if best[1] is None:
    return None, error
  config.train.batch_size = best[0] * unit
  return best[1], ''


def next_guess(known: dict, *, hbm: float, limit: int | None) -> int | None:
  """The multiple to try next, given {multiple: bytes of temporaries}, the bytes there are for them, and the smallest
  multiple that did not fit.

  None when the largest that fits is known to within an eighth: a compilation takes minutes.
  """
  if not known:
    assert limit is not None
    return limit // 2 or None
  low = max(known)
  if limit is not None and limit - low <= max(1, low // 8):
    return None
  if len(known) == 1:  # a part does not grow with the batch, so this is too few rather than too many
    predicted = max(2, int(low * FULL * hbm / known[low]))
  else:
    first = min(known)
    slope = max(1.0, (known[low] - known[first]) / (low - first))
    predicted = int(low + (FULL * hbm - known[low]) / slope)
  if limit is not None:
    return min(predicted, limit - 1) if predicted > low else (low + limit) // 2
  return predicted if predicted - low > low // 8 else None


def _topology(name):
  """-> (chip, devices) of 'v5e:16x16'. Raises UserError."""
  kind = name.partition(':')[0]
  known = [chip.name for chip in chips.CHIPS if chip.platform == 'tpu']
  if kind not in known or ':' not in name:
    raise UserError(f'--topology={name}: the kinds known here are {", ".join(known)}, as in v5e:16x16 or v5p:4x8x8')
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  from jax.experimental import topologies
  if importlib.util.find_spec('libtpu') is None:  # a clearer message than JAX's
    raise UserError("planning needs the TPU's compiler: pip install 'm2l2[train,tpu]' (no TPU is needed)")
  cores = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  try:
    topology = topologies.get_topology_desc(platform='tpu', topology_name=name, **cores)
  except Exception as error:
    raise UserError(f'--topology={name} is no TPU topology ({first_line(error)})') from error
  devices = list(topology.devices)
  return chips.find_chip(devices[0].device_kind) or chips.BY_NAME[kind], devices


def as_text(report: dict) -> str:
  """The report of `plan` as text."""
  gib = chips.GIB
  mesh = ' x '.join(f'{name} {size}' for name, size in report['mesh'].items())
  lines = [f'{report["topology"]}: {report["devices"]} chips, {report["hosts"]} hosts; {report["preset"]}, {mesh}; '
           f'batch {report["batch"]}']
  if not report['fits']:
    return '\n'.join([*lines, f'does not fit: {report["error"]}'])
  sizes, bound, work = report['bytes'], report['bound'], report['flops']
  estimate, run = report['estimate'], report['run']
  collectives = ', '.join(f'{kind} {size / gib:.2f} GiB' for kind, size in report['collectives'].items()) or 'none'
  seconds = ', '.join(f'{kind} {1e3 * value:.1f} ms' for kind, value in bound['seconds'].items())
  lines += [
      f'memory     {sizes["peak"] / gib:.2f} of {sizes["hbm"] / gib:.0f} GiB a chip: state and batch '
      f'{sizes["arguments"] / gib:.2f}, temporaries {sizes["temporaries"] / gib:.2f}'
      + (f', of a probe {sizes["probe"] / gib:.2f}' if sizes['probe'] is not None else ''),
      f'FLOPs      {work["step"] / 1e12:.1f} T a step (convolutions {work["convolutions"] / work["step"]:.0%}, '
      f'attention {work["attention"] / work["step"]:.0%}); executed {work["executed"] / work["step"]:.2f}x, padded to '
      f'the matrix unit {work["padded"] / work["step"]:.2f}x (convolutions '
      f'{work["padded_convolutions"] / work["padded"]:.0%} of that, attention '
      f'{work["padded_attention"] / work["padded"]:.0%})',
      f'traffic    {sizes["accessed"] / gib:.1f} GiB a chip and step; collectives: {collectives}',
      f'bound      {1e3 * bound["step_seconds"]:.1f} ms a step by {bound["by"]} ({seconds}): MFU at most '
      f'{bound["mfu"]:.0%}. From published peaks',
      f'estimate   {1e3 * estimate["step_seconds"]:.1f} ms a step by the compiler ({estimate["cycles"] / 1e6:.1f} M '
      f'cycles at {estimate["clock"] / 1e9:.2f} GHz): MFU {estimate["mfu"]:.0%}. Neither is a measurement',
      f'           of it Pallas kernels {1e3 * estimate["kernels"] / estimate["clock"]:.1f} ms, not by the compiler '
      "but from the FLOPs that they say of themselves and their bytes, at the chip's peaks",
      f'           not in it, for want of an estimate: {_without(estimate)}',
      f'run        {run["steps"]:,} steps are {run["crops"] / 1e6:,.1f} M crops '
      f'({run["crops"] / run["config_crops"]:.4g} times those of the config\'s own batch): '
      f'{run["chip_hours"]["bound"]:,.0f} chip-hours at the bound, {run["chip_hours"]["estimate"]:,.0f} at the '
      'estimate',
      f'input      {report["crops_per_second_per_host"]:.0f} crops/s for each host to feed, at the bound',
      *_table(report['parts'], estimate)]
  return '\n'.join(lines)


def _without(estimate) -> str:
  return ', '.join(f'{kind} ({of["count"]:.0f} times, {of["bytes"] / chips.GIB:.2f} GiB)'
                   for kind, of in estimate['without'].items()) or 'nothing'


def _table(parts, estimate) -> list:
  """Lines: scope and kind, M cycles, GiB, TFLOP, MFU; the rest, below a hundredth of the cycles, in one."""
  row = lambda scope, kind, of, mfu: (f'  {scope:44} {kind:14} {of["cycles"] / 1e6:9.2f} '
                                      f'{of["bytes"] / chips.GIB:7.2f} {of["flops"] / 1e12:7.3f} {mfu:>5}')
  large = [part for part in parts if part['cycles'] >= estimate['cycles'] / 100]
  small = [part for part in parts if part['cycles'] < estimate['cycles'] / 100]
  rest = {name: sum(part[name] for part in small) for name in ('cycles', 'bytes', 'flops')}
  lines = [f'  {"scope":44} {"operation":14} {"M cycles":>9} {"GiB":>7} {"TFLOP":>7} {"MFU":>5}   as executed']
  for part in large:
    lines.append(row(part['scope'], part['kind'], part, f'{part["mfu"]:.0%}' if part['flops'] else ''))
  return [*lines, row(f'{len(small)} smaller ones', '', rest, '')]


def main(config, *, topology, preset=None, batch=None, max_batch=False):
  """`m2l2 plan`: JSON on stdout, all else on stderr. Raises UserError."""
  say = lambda text: print(text, file=sys.stderr, flush=True)
  report = plan(config, topology, preset=preset, batch=batch, max_batch=max_batch, say=say)
  say(as_text(report))
  print(json.dumps(report, indent=2))
