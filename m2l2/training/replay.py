"""`m2l2 train --replay=STEP`: one update of a run again, and what of it was not finite.

The run's own programs go on from the nearest checkpoint before that update, with the run's own samples, and nothing is
written. On the devices that the run had, the digits are the run's own: the log says whether they are.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import os

from absl import logging
import jax
import numpy as np

from m2l2 import build, compiling, files, sharding
from m2l2.data.pipeline import Loader
from m2l2.errors import UserError
from m2l2.model.parameters import by_path
from m2l2.training import checkpoint, examine, hosts, metrics, preflight, programs, scaling
from m2l2.training.train_step import MAIN

MOST = 5  # items and tensors that are told


def replay(config, workdir, step: int) -> tuple[bool, list[str]]:
  """Runs update `step` (1, 2, ...) of the run in `workdir` again.

  Args:
    config: that of the run.
    workdir: where the run is; nothing there is changed.
    step: of train.steps; also one that the run has not reached yet.

  Returns:
    Whether all of it was finite, and lines that say what was not; none on other processes than the first.

  Raises:
    UserError: no such step or run, another run at work there, a checkpoint that cannot be read or is of another model.
  """
  config, workdir = scaling.scaled(config), preflight.local(workdir)
  fields, plain, main = config.train, preflight.plain(config), jax.process_index() == 0
  if not 1 <= step <= fields.steps:
    raise UserError(f'--replay={step}: the steps of this run are 1 to {fields.steps}')
  if not os.path.isfile(os.path.join(workdir, 'config.json')):
    raise UserError(f'--replay={step}: no run has begun in --workdir={workdir}')
  compiling.use_cache(workdir)
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
  preflight.check(config, shards=sharding.batch_shards(mesh))
  mixture = preflight.find_data(config)
  functions = build.step_functions(config, ravel=sharding.is_one_cpu(mesh))

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    if main:  # before Checkpoints, which removes what looks left behind
      stack.enter_context(preflight.locked(workdir))
    state, first, position = _state_before(step, config, functions, mesh, workdir, plain)
    own, blocks = sharding.batch_blocks(mesh)
    loader = stack.enter_context(preflight.open_data(
      config, functions, mixture, start_index=position['next_index'], blocks=own, of_blocks=blocks))
    if main and position['files'] not in (None, mixture.fingerprint):
      logging.warning('the files at data.root are not those of the run: these are other samples')
    state, batch, updates = _lead_up(state, first, step, functions, mesh, loader, config)
    phase = functions.phase(step - 1)
    bad_arrays = _not_finite(functions.unravel(state))
    told = jax.device_get(_compiled(config, programs.lower_examination(functions, state, batch, mesh, phase=phase))(
      state, batch))
    _, values = updates[phase](state, batch)  # donates the state
    values = jax.device_get(values)
    finite = not bad_arrays and not _bad_items(told).any() and bool(
      np.isfinite(values['loss']) and np.isfinite(values['norm/gradients']))
    if not main:
      return finite, []
    sample = position['next_index'] + (step - 1 - first) * fields.batch_size
    names = list(by_path(jax.eval_shape(functions.init, jax.random.key(0)).params))
    return finite, describe(
      step, values, told, bad_arrays, names, _logged(workdir, step), phase=phase,
      name_of=lambda item: _name_of(loader, sample + item))


def _state_before(step, config, functions, mesh, workdir, plain):
  """-> (ravelled state, the step that it is of, data position) of the nearest checkpoint before an update."""
  init = lambda: functions.init(jax.random.key(config.seed))
  abstract, _ = programs.abstract_state(functions, init, mesh, preset=config.mesh.preset)
  folder = os.path.join(workdir, 'checkpoints')
  nearest = checkpoint.latest(folder, before=step)
  if nearest is None:
    logging.info('no checkpoint of a step before %d: from the first state on', step)
    weights = preflight.load_weights(config.train.init_from, abstract.params) if config.train.init_from else None
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state = programs.first_state(init, shardings, weights=weights and weights.params)
    return functions.ravel(state), 0, {'next_index': 0, 'files': None}
  with checkpoint.Checkpoints(
      folder, keep_last=config.train.keep_last, keep_every=config.train.keep_every) as checkpoints:
    restored = checkpoints.restore_at(nearest, abstract, config=plain)
  logging.info('from the checkpoint of step %d on', nearest)
  for difference in checkpoint.config_differences(restored.config, plain):
    logging.warning('this differs from the run in %s', difference)
  return functions.ravel(restored.state), nearest, restored.position


def _lead_up(state, first, step, functions, mesh, loader, config):
  """-> (state before update `step`, its batch, {phase: program of an update})."""
  batch = programs.abstract_batch(functions, mesh, batch_size=config.train.batch_size)
  updates = {phase: _compiled(config, programs.lower_step(functions, state, batch, mesh, phase=phase))
             for phase in dict.fromkeys(functions.phase(done) for done in range(first, step))}
  hosts.meet('compiled')
  for done in range(first, step):
    batch = sharding.put_batch({'audio': next(loader)['audio']}, mesh)
    if done + 1 < step:
      state, values = updates[functions.phase(done)](state, batch)
      if (done + 1) % 100 == 0:
        logging.info('step %d  loss %.4g', done + 1, jax.device_get(values['loss']))
  return state, batch, updates


def _compiled(config, lowered):
  return programs.compiled(lowered, build.compiler_options(config))


def _not_finite(tree) -> list[str]:
  """The names of a tree's arrays, of numbers with fractions, that hold others than finite ones."""
  finite = jax.device_get(jax.jit(examine.whole)(tree))
  return [name for name, good in zip(by_path(tree), finite) if not good]


def _bad_items(told: Mapping) -> np.ndarray:
  """bool[B]: whose loss, gradient or any array on the way to it is not finite."""
  bad = ~np.isfinite(told['loss']) | ~np.isfinite(told['item_gradients']).all(axis=1)
  return bad | ~np.stack([good.all(axis=1) for good in told['finite'].values()]).all(axis=0)


def _name_of(loader: Loader, index: int) -> str:
  try:
    return f'sample {index}, {loader.origin(index)}'
  except UserError as error:
    return f'sample {index}, {error}'


def _logged(workdir, step) -> dict:
  """The line of metrics.jsonl of that step; {} without one."""
  logged: dict = {}
  for told in files.read_json_lines(os.path.join(workdir, metrics.METRICS)):
    logged = told if told.get('step') == step and 'loss' in told else logged
  return logged


def describe(step, values, told, bad_arrays, names, log, *, phase, name_of) -> list[str]:
  """What happened, in lines.

  Args:
    values: the update's own metrics. told: of `examine.examine`. bad_arrays: of the state before it.
    names: of the parameters. log: what the run logged of this step, {} for nothing.
    phase: of the step; the paper's alone draws noise levels.
    name_of: what to call the item of a number.
  """
  lines = [f'step {step} again: loss {values["loss"]:.6g}, norm of gradients {values["norm/gradients"]:.6g}'
           f'{_compared(values, log)}']
  if bad_arrays:
    lines.append(f'not finite in the state before it: {_some(bad_arrays)}')
  bad = np.flatnonzero(_bad_items(told))
  for item in bad[:MOST]:
    places = [name.split(' ', 1)[1] for name, good in sorted(told['finite'].items()) if not good[item].all()]
    tensors = [name for name, norm in zip(names, told['item_gradients'][item]) if not np.isfinite(norm)]
    lines += [f'item {item} ({name_of(int(item))}) is not finite{_levels(told, item, phase)}:',
              f'  on the way to its loss {told["loss"][item]:.6g}: {_some(places) or "nothing"}',
              f'  in its gradient: {_some(tensors) or "nothing"}']
  if len(bad) > MOST:
    lines.append(f'and {len(bad) - MOST} of {len(told["loss"])} items more')
  if len(bad) or bad_arrays:
    return lines
  if not (np.isfinite(values['loss']) and np.isfinite(values['norm/gradients'])):
    return [*lines, 'not finite, though each item by itself is, and the state: look at what joins them (sums over '
            'items, train.reduction)']
  largest = np.argsort(-np.linalg.norm(told['item_gradients'], axis=1))[:MOST]
  arrays = np.argsort(-told['gradients'])[:MOST]
  return [
    *lines, 'all of it is finite',
    f'  norms: parameters {values["norm/parameters"]:.4g}, updates {values["norm/updates"]:.4g}; gradients of '
    + ', '.join(f'{names[i]} {told["gradients"][i]:.4g}' for i in arrays),
    '  items of the largest gradients:',
    *(f'  {np.linalg.norm(told["item_gradients"][item]):.4g}: item {item} ({name_of(int(item))}), loss '
      f'{told["loss"][item]:.4g}{_levels(told, item, phase)}' for item in largest)]


def _compared(values, log) -> str:
  """Whether the run logged the same digits."""
  if not log:
    return ' (the run logged nothing of this step)'
  differing = [f'{name} {log[name]}' for name in ('loss', 'norm/gradients')
               if name in log and log[name] != metrics.as_number(values[name])]
  return f', not as the run logged it: {", ".join(differing)}' if differing else ', as the run logged it'


def _levels(told, item, phase) -> str:
  if phase != MAIN or 'sigma_high' not in told:
    return ''
  pairs = zip(told['sigma_high'][item], told['sigma_low'][item])
  return '; levels of its chunks, student and teacher: ' + ', '.join(f'{high:.4g} {low:.4g}' for high, low in pairs)


def _some(names) -> str:
  more = f' and {len(names) - MOST} more' if len(names) > MOST else ''
  return ', '.join(names[:MOST]) + more
