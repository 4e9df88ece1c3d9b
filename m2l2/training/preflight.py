"""Checks of a training run before anything is compiled or initialised; `m2l2 train --check` runs them all."""

from collections.abc import Mapping
import json
import math
import os

import jax

from m2l2 import build, files, sharding
from m2l2.codec.loading import locate
from m2l2.codec.snapshot import Snapshot, load_snapshot
from m2l2.data.pipeline import Loader, make_loader
from m2l2.data.sources import KINDS, Mixture, find_mixture
from m2l2.errors import UserError
from m2l2.training import checkpoint, reduction, scaling, timing
from m2l2.training.listening import Listener

LOCK = '.lock'  # in the workdir


def plain(config) -> dict:
  """The config as JSON types."""
  return json.loads(json.dumps(config.to_dict()))


def local(workdir) -> str:
  """The workdir as an absolute path. Raises UserError: it is a URL."""
  if '://' in str(workdir):
    raise UserError(f'--workdir={workdir}: mount the bucket and give its path in the file system')
  return os.path.abspath(os.path.expanduser(str(workdir)))


def check(config, *, shards: int):
  """Raises UserError for invalid fields or combinations of fields.

  shards: number of devices that share a batch.
  """
  fields = config.train
  if config.data.source not in KINDS:
    raise UserError(f'data.source={config.data.source!r} is not known: it is {" or ".join(KINDS)}')
  if not config.data.root:
    raise UserError('data.root is empty: name a folder of audio files or a dataset, --config.data.root=DIR')
  for name, value in _numbers(config):
    if not math.isfinite(value):
      raise UserError(f'{name}={value}: it must be a finite number')
  timing.trace_range(fields.profile)
  reduction.check(fields.reduction, tensor=config.mesh.tensor)
  for name in ('steps', 'batch_size', 'accumulate', 'log_every', 'checkpoint_every', 'max_skipped_in_a_row'):
    if fields[name] < 1:
      raise UserError(f'train.{name}={fields[name]}: it must be 1 or more')
  if fields.probe_every < 0:
    raise UserError(f'train.probe_every={fields.probe_every}: it must be 0 (never) or more')
  if fields.batch_size % (fields.accumulate * shards):
    raise UserError(
      f'train.batch_size={fields.batch_size} must be a multiple of {fields.accumulate * shards}: '
      f'train.accumulate={fields.accumulate} microbatches, each split over the {shards} devices '
      'of mesh.data x mesh.fsdp')


def _numbers(fields: Mapping, prefix=''):
  for name, value in fields.items():
    if isinstance(value, Mapping) or hasattr(value, 'items'):
      yield from _numbers(value, f'{prefix}{name}.')
    for number in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(number, float):
        yield prefix + name, number


def find_data(config) -> Mixture:
  """The sources at data.root. Raises UserError: there are none, or of an unknown format."""
  return find_mixture(config.data.root, kind=config.data.source, split=config.data.split)


def make_workdir(workdir: str):
  """Creates the workdir. Raises UserError: it cannot be created."""
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as error:
    raise UserError(f'cannot make --workdir={workdir}: {error.strerror}') from error


def locked(workdir: str):
  """A context that locks the workdir for this run. Raises UserError: another run writes there."""
  return files.locked(os.path.join(workdir, LOCK), command='m2l2 train', place=f'--workdir={workdir}')


def open_data(config, functions, mixture, **how) -> Loader:
  """The samples of a run. how: where they start, this process's share of them, and how they are read: `make_loader`."""
  data = config.data
  return make_loader(
    root=mixture, sample_rate=functions.sample_rate, native_rates=functions.native_rates, channels=functions.channels,
    crop_samples=functions.crop_samples, batch_size=config.train.batch_size, seed=config.seed,
    rms_floor=data.rms_floor, gain_db=data.gain_db, mix=data.mix, **how)


def load_weights(path: str, params) -> Snapshot:
  """The snapshot that a new run starts from. params: shapes of this config's parameters.

  Raises UserError: there is none, or it is of another model.
  """
  path = os.path.expanduser(path)
  snapshot = load_snapshot(locate(path))
  shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (snapshot.params, params)]
  if shapes[0] != shapes[1]:
    raise UserError(f'train.init_from={path} is of another model: its arrays do not fit this config')
  return snapshot


def report(config, workdir, *, places: bool = True) -> list[str]:
  """What `train(config, workdir)` would do, in lines of text; nothing is compiled or written.

  places: whether data, workdir and weights are checked, too; they may be on another machine.

  Raises UserError: those that `train` would raise before its first step.
  """
  config = scaling.scaled(config)
  workdir, fields = local(workdir), config.train
  if places:
    _check_place(workdir)
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
  shards = sharding.batch_shards(mesh)
  check(config, shards=shards)
  mixture = find_data(config) if places else None
  functions = build.step_functions(config)
  with jax.set_mesh(mesh):
    params = jax.eval_shape(functions.init, jax.random.key(config.seed)).params
    sharding.param_shardings(params, functions.logical_axes, mesh=mesh, preset=config.mesh.preset)
  about = describe(config, functions, params, mixture, mesh)
  if not places:
    return [*about, f'run         {fields.steps} steps, saved every {fields.checkpoint_every}']
  with open_data(config, functions, mixture, num_threads=0) as loader:
    loader.check()
  done = checkpoint.latest(os.path.join(workdir, 'checkpoints'))
  if done is not None:
    start = f'resumes from step {done} of {fields.steps}'
  elif fields.init_from:
    start = f'new, from the weights of step {load_weights(fields.init_from, params).step} of {fields.init_from}'
  else:
    start = 'new, from random weights'
  listener = Listener(plain(config), sample_rate=functions.sample_rate, workdir=workdir, first=done or 0)
  return [
    *about,
    f'run         {start}; {fields.steps} steps, saved every {fields.checkpoint_every}',
    f'evaluation  {f"every {config.evaluate.every} steps" if listener.measures else "none (evaluate.root is empty)"}',
    f'workdir     {workdir}']


def describe(config, functions, params, mixture: Mixture | None, mesh) -> list[str]:
  """A run in a few lines of text: devices, model, data, batch.

  functions: `train_step.StepFunctions`. params: shapes. mixture: None if data were not checked.
  """
  places = [f'{len(source):,} items at {source.place}' for source in mixture.sources] if mixture else [config.data.root]
  fields, shards = config.train, sharding.batch_shards(mesh)
  kinds = sorted({device.device_kind for device in mesh.devices.flat})
  sizes = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  seconds = functions.crop_samples / functions.sample_rate
  parts = f' in {fields.accumulate} parts' if fields.accumulate > 1 else ''
  processes = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
  return [
    f'devices     {mesh.size} {jax.default_backend()} ({", ".join(kinds)}){processes}, mesh {sizes}, '
    f'preset {config.mesh.preset}',
    f'model       {count / 1e6:.3g} M parameters, {"mono" if functions.channels == 1 else "stereo"}, '
    f'{functions.sample_rate} Hz',
    f'data        {", ".join(places)}',
    f'batch       {fields.batch_size} crops of {seconds:.2f} s, {fields.batch_size // shards} a device{parts}',
    *_recipe(config)]


def _recipe(config) -> list[str]:
  """What follows the batch (scaling.py), where anything does."""
  fields, rules = config.train, config.scaling
  average = f', average with a half-life of {rules.ema_half_life:,} crops' if rules.ema_half_life else ''
  if not rules.batch:
    return [f'recipe      {average[2:]}'] if average else []
  return [f'recipe      for this batch: {fields.steps:,} steps, {fields.warmup_steps:,} of them warm-up to a rate of '
          f'{fields.learning_rate:.3g}{average}']


def _check_place(workdir):
  """Raises UserError: the workdir cannot be created or written, or another run writes there."""
  there = workdir
  while not os.path.lexists(there):
    there = os.path.dirname(there)
  longest = os.pathconf(there, 'PC_NAME_MAX') if os.path.isdir(there) else 255
  if any(len(os.fsencode(part)) > longest for part in workdir.split(os.sep)):
    raise UserError(f'cannot make --workdir={workdir}: a name in it is longer than {longest} bytes')
  if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
    raise UserError(f'cannot make --workdir={workdir}: {there} is not a directory that you may write in')
  files.check_lock(os.path.join(workdir, LOCK), command='m2l2 train', place=f'--workdir={workdir}')
