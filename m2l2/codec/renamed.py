"""Names that fields of a config had before, so that what was saved under them loads and resumes."""

from collections.abc import Mapping
import re

# Old name -> new name under `variants`, and the old value that is its True where that was one of several.
_MOVED: dict[str, tuple] = {
    'model.envelope': ('envelope.on',),
    'train.envelope_weight': ('envelope.weight',),
    'train.envelope_bands': ('envelope.bands',),
    'model.linear_sketch': ('sketch.cells',),
    'consistency.local': ('local_scale.on',),
    'consistency.local_floor': ('local_scale.floor',),
    'model.magnitude_input': ('magnitude_input.on',),
    'model.shortcut': ('shortcut.on',),
    'model.shortcut_width': ('shortcut.width',),
    'model.latent_norm': ('latent_norm.on',),
    'model.feature_norm': ('feature_norm.on',),
    'consistency.skip': ('flow_skip.on', 'flow'),
    'consistency.noise': ('signal_noise.on', 'signal'),
    'train.head_start': ('head_start.share',),
    'train.head_start_on': ('head_start.task',),
    'train.nested': ('nested.chance',),
    'model.bottleneck': ('fsq.on', 'fsq'),
    'model.fsq_levels': ('fsq.levels',),
    'model.fsq_dropout': ('fsq.dropout',),
    'model.latents_in_denoiser': ('denoiser.latents',),
    'model.denoiser_registers': ('denoiser.registers',),
    'consistency.renoise': ('variance_renoise.on', 'variance'),
    'consistency.parallel_steps': ('staggered.steps',),
    'model.embeddings': ('local_embeddings.on', 'local'),
    'model.cross_connections': ('no_cross_connections.on', False),
    'model.tile': ('packing.tile',),
}

# Settings of training that are no more, because they moved no rung of the ladder (launch/research/learning.md).
_GONE = ('consistency.sampling', 'consistency.easy', 'variants.lognormal', 'variants.easy')


def current(config: Mapping) -> dict:
  """A config (nested dicts) with the names of today; equal to what is given where it has no other."""
  new = {group: dict(fields) if isinstance(fields, Mapping) else fields for group, fields in config.items()}
  for old, (name, *true) in _MOVED.items():
    group, field = old.split('.')
    if isinstance(new.get(group), dict) and field in new[group]:
      value = new[group].pop(field)
      variant, setting = name.split('.')
      fields = new.setdefault('variants', {})
      fields[variant] = {**fields.get(variant, {}), setting: value in true if true else value}
  for old in _GONE:
    group, field = old.split('.')
    if isinstance(new.get(group), dict):
      new[group].pop(field, None)
  return new


def hint(name: str, *, near: str = '') -> str:
  """'OLD is now NEW' of a field's old name, alone or in the text near it ('model.envelope'); '' where it is none."""
  for old, (new, *true) in _MOVED.items():
    if re.search(rf'\b{re.escape(old)}\b', near) or old.endswith(f'.{name}'):
      return f'{old} is now variants.{new}' + (f' (True for {true[0]})' if true else '')
  gone = [old for old in _GONE if re.search(rf'\b{re.escape(old)}\b', near)]
  return f'{gone[0]} is no more: it helped nothing (launch/research/learning.md)' if gone else ''
