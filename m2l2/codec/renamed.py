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
    'model.magnitude_input': ('magnitude_input.on',),
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

# What is no more, and what to know instead.
_GONE = {
    'variants.lognormal': 'it helped nothing (launch/research/learning.md)',
    'variants.easy': 'it helped nothing (launch/research/learning.md)',
    'variants.local_scale.floor': 'it is 0.004',
    'variants.shortcut.on': 'variants.shortcut.width is above 0 where it is on',
    'consistency.sampling': 'it helped nothing (launch/research/learning.md)',
    'consistency.easy': 'it helped nothing (launch/research/learning.md)',
    'consistency.local_floor': 'it is 0.004',
    'model.shortcut': 'variants.shortcut.width is above 0 where it is on',
}


def current(config: Mapping) -> dict:
  """A config (nested dicts) with the names of today; equal to what is given where it has no other.

  What is no more is left out, unless a network needs it: that stays, so that whoever builds it hears of it.
  """
  new = {group: dict(fields) if isinstance(fields, Mapping) else fields for group, fields in config.items()}
  if isinstance(new.get('variants'), dict):
    new['variants'] = {name: dict(fields) for name, fields in new['variants'].items()}
  for old, (name, *true) in _MOVED.items():
    group, field = old.split('.')
    if isinstance(new.get(group), dict) and field in new[group]:
      value = new[group].pop(field)
      variant, setting = name.split('.')
      new.setdefault('variants', {}).setdefault(variant, {})[setting] = value in true if true else value
  gone = {name: _pop(new, *name.split('.')) for name in _GONE}
  shortcut, local = (new.get('variants', {}).get(name, {}) for name in ('shortcut', 'local_scale'))
  first = lambda *names: next((gone[name] for name in names if gone[name] is not None), None)
  on = first('model.shortcut', 'variants.shortcut.on')
  floor = first('consistency.local_floor', 'variants.local_scale.floor')
  if on and not shortcut.get('width'):
    new.setdefault('variants', {})['shortcut'] = {**shortcut, 'on': True}  # paths that pooled the tokens
  elif on is False and shortcut:
    shortcut['width'] = 0
  if local.get('on') and floor not in (None, 0.004):
    local['floor'] = floor
  return new


def _pop(config, *path):
  """The value at the path of a nested dict, which loses it; None where there is none."""
  *groups, last = path
  for group in groups:
    config = config.get(group) if isinstance(config, dict) else None
  return config.pop(last, None) if isinstance(config, dict) else None


def hint(name: str, *, near: str = '') -> str:
  """'OLD is now NEW' of a field's old name, alone or in the text near it ('model.envelope'); '' where it is none."""
  for old, (new, *true) in _MOVED.items():
    if _says(old, name, near):
      return f'{old} is now variants.{new}' + (f' (True for {true[0]})' if true else '')
  return next((f'{old} is no more: {instead}' for old, instead in _GONE.items() if _says(old, name, near)), '')


def _says(old, name, near):
  return re.search(rf'\b{re.escape(old)}\b', near) or (
      not old.startswith('variants.') and old.endswith(f'.{name}'))
