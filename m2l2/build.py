"""The only file that turns a config into objects.

A config is a nested mapping: an ml_collections ConfigDict in training, the plain dict of a snapshot's
config.json in inference. Below this file there are only keyword arguments and frozen dataclasses.
"""

from collections.abc import Mapping
import dataclasses

from absl import logging
import jax

from m2l2 import compiling
from m2l2.codec import renamed
from m2l2.consistency import Consistency
from m2l2.errors import UserError
from m2l2.kernels.chunk_causal import check_implementation, platform
from m2l2.model.architecture import Architecture
from m2l2.model.autoencoder import Network, make_network
from m2l2.planning import chips
from m2l2.representation import Representation
from m2l2.variants.autoencoder import Variant
from m2l2.variants.consistency import VariantConsistency

FEW_STEPS = 10  # Runs of so many steps are compiled without optimisation on CPUs.
# Fields of config.model that belong to neither dataclass.
_MODEL_EXTRA = ('native_rates',)
# Settings of variants that training alone knows: those of VariantObjective, which inference does not import.
_OF_TRAINING = ('envelope_weight', 'envelope_bands', 'head_start_share', 'head_start_task', 'nested_chance')


def representation(model: Mapping) -> Representation:
  """config.model -> Representation. Raises UserError for a bad value."""
  return _make(Representation, _select(model, Representation), where='model')


def variants(config: Mapping) -> dict:
  """config.variants -> settings as the classes of m2l2/variants name them: GROUP for GROUP.on, GROUP_FIELD for others.

  A variant that the config does not name is off. Raises UserError for unknown ones.
  """
  known = {*_added(Variant), *_added(VariantConsistency), *_OF_TRAINING}
  settings = {}
  for group, fields in config.get('variants', {}).items():
    for field, value in fields.items():
      name = group if field == 'on' else f'{group}_{field}'
      if name not in known:
        raise UserError(renamed.hint(field, near=f'variants.{group}.{field}')
                        or f'variants.{group}.{field} is not a field (configs/base.py lists them)')
      settings[name] = value
  return settings


def network(config: Mapping) -> Network:
  """config.model and .variants -> Network. Raises UserError for unknown or missing fields and for bad values."""
  model, settings = config['model'], variants(config)
  known = _names(Representation) | _names(Architecture) | set(_MODEL_EXTRA)
  unknown = set(model) - known
  if unknown:
    raise UserError(f'model.{sorted(unknown)[0]} is not a field of the model; it has {", ".join(sorted(known))}')
  fields = _select(model, Architecture) | {name: settings[name] for name in _added(Variant) & set(settings)}
  fields |= {'dtype': activation_dtype(fields['dtype']), 'packing_tile': tile_width(fields.get('packing_tile', 'auto'))}
  arch = _make(Variant, fields, where='model')
  try:
    check_implementation(arch.attention)
    return make_network(arch)
  except ValueError as error:
    raise UserError(f'config.model: {error}') from error


def activation_dtype(asked: str, *, devices=None) -> str:
  """config.model.dtype -> the dtype of activations on what programs are compiled for (`chunk_causal.compiling_for`).

  'auto' is bfloat16 on TPUs and GPUs, else float32. NVIDIA GPUs before compute capability 8.0 (V100, T4) have no
  bfloat16 units: there 'auto' and 'bfloat16' both become float32, with a warning. (Not float16: its gradients vanish
  below 6e-8 and overflow above 65504, and noise levels span 0.002 to 80: it would need loss scaling.)

  Args:
    devices: all devices of the run; by default JAX's.
  """
  here = platform()
  if asked not in ('auto', 'bfloat16') or (asked == 'auto' and here == 'cpu'):
    return 'float32' if asked == 'auto' else asked
  if here == 'gpu':
    for device in jax.devices() if devices is None else devices:  # all, so that every process decides alike
      if device.platform == 'gpu' and _compute_capability(device) < (8, 0):
        logging.log_first_n(logging.WARNING, '%s has no bfloat16 units: activations are float32', 1, device.device_kind)
        return 'float32'
  return 'bfloat16'


def tile_width(asked) -> int:
  """variants.packing.tile -> the width that narrow maps are packed to: of 'auto', a TPU's matrix unit, elsewhere 0."""
  if asked != 'auto':
    return int(asked) if str(asked).isdecimal() else asked
  if platform() != 'tpu':
    return 0
  chip = chips.find_chip(jax.devices()[0].device_kind)
  return chip.matrix_unit if chip else 128


def compiler_options(config) -> dict:
  """What XLA is told when it compiles this run's steps."""
  options: dict = chips.compiler_options(config['train']['compiler_options'])
  if platform() != 'cpu':
    return options
  if config['train']['steps'] <= FEW_STEPS and 'xla_backend_optimization_level' not in options:
    # Compiling then takes longer than all the steps. A matter of the whole run's length, so that a resumed one computes
    # the same digits.
    options = compiling.optimised(0) | options
  if max(config['model']['widths']) < 128:
    # Convolutions of narrow maps by Eigen: twice as fast as by YNNPACK, which is ahead from 128 channels on.
    options.setdefault('xla_cpu_experimental_ynn_fusion_type', 'LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE')
  return options


def _compute_capability(device) -> tuple:
  """(7, 5) of an NVIDIA GPU; of another maker's, which says something else, infinity."""
  try:
    return tuple(int(part) for part in device.compute_capability.split('.'))
  except (AttributeError, ValueError):
    return (float('inf'),)


def consistency(config: Mapping) -> VariantConsistency:
  """config.consistency and .variants -> VariantConsistency. Raises UserError for unknown fields and bad values."""
  fields, settings = dict(config['consistency']), variants(config)
  unknown = set(fields) - _names(Consistency)
  if unknown:
    known = ', '.join(sorted(_names(Consistency)))
    raise UserError(f'consistency.{sorted(unknown)[0]} is not a field; there are {known}')
  fields |= {name: settings[name] for name in _added(VariantConsistency) & set(settings)}
  return _make(VariantConsistency, fields, where='consistency')


def native_rates(model: Mapping) -> tuple:
  """Sample rates processed as they are; others are resampled to the first."""
  rates = tuple(int(rate) for rate in model.get('native_rates', ()))
  if not rates or min(rates) < 1:
    raise UserError(f'model.native_rates is {rates}; it needs at least one sample rate')
  return rates


def step_functions(config, *, ravel=False, data=None):
  """The whole config -> `train_step.StepFunctions` (needs the `train` extra).

  ravel: see ravel.py. data: what stands in the place of the config's Representation, for data that are no sound.
  """
  from m2l2.training import optim, train_step  # here, so that inference never imports optax
  from m2l2.variants import objective as objectives

  train, settings = config['train'], variants(config)
  net, noising = network(config), consistency(config)
  objective = _make(objectives.VariantObjective, {
      'network': net, 'representation': data or representation(config['model']), 'consistency': noising,
      'steps': train['steps'], **{name: settings[name] for name in _OF_TRAINING if name in settings}}, where='train')
  assert isinstance(net.arch, Variant)
  has_envelope = net.arch.envelope and objective.envelope_weight > 0
  if noising.local_scale and not has_envelope:
    raise UserError('variants.local_scale needs the envelope that variants.envelope.on=True predicts and '
                    'variants.envelope.weight > 0 trains')
  if objective.head_start_share and objective.head_start_task == 'envelope' and not has_envelope:
    raise UserError("variants.head_start.task='envelope' trains the envelope alone: it needs "
                    'variants.envelope.on=True and variants.envelope.weight above 0')
  if objective.nested_chance and net.arch.fsq:
    raise UserError('variants.nested needs continuous latents: a token cannot say that it was left out. Set its chance '
                    'to 0, or variants.fsq.on=False')
  for level, width, numbers in net.arch.cramped:
    logging.log_first_n(logging.WARNING, 'model.widths[%d] is %d, and a patch of that level holds %d numbers of the '
                        'noisy sound: partials will break off', 1, level, width, numbers)
  optimizer, schedule = optim.make_optimizer(
      name=train['optimizer'], learning_rate=train['learning_rate'], warmup_steps=train['warmup_steps'],
      total_steps=train['steps'], final_learning_rate=train['final_learning_rate'], b1=train['b1'], b2=train['b2'],
      clip_norm=train['clip_norm'])
  return train_step.make_step_functions(
      objective, optimizer=optimizer, schedule=schedule, ema_max=train['ema_decay'], seed=config['seed'],
      accumulate=train['accumulate'], native_rates=native_rates(config['model']), ravel=ravel,
      reduction=train.get('reduction', 'activations'))  # newer than saved configs


def _names(cls) -> set:
  return {field.name for field in dataclasses.fields(cls)}


def _added(cls) -> set:
  """What a variant's class has beside the fields of the paper's."""
  return _names(cls) - _names(cls.__base__)


def _select(fields: Mapping, cls) -> dict:
  missing = _names(cls) - set(fields)
  if missing:
    raise UserError(f'model.{sorted(missing)[0]} is missing from the config')
  return {name: fields[name] for name in _names(cls)}


def _make(cls, fields: dict, *, where: str):
  try:
    return cls(**{name: _tuples(value) for name, value in fields.items()})
  except (TypeError, ValueError) as error:
    place = '' if str(error).startswith('variants.') else f'config.{where}: '
    raise UserError(f'{place}{error}') from error


def _tuples(value):
  """JSON turns tuples into lists; dataclasses that serve as static arguments need them hashable."""
  return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
