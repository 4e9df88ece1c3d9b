"""The training loop: one function, read downward. What an update is stands in train_step.py."""

from concurrent import futures
import contextlib
import dataclasses
import functools
import os
import time

from absl import logging
from clu import parameter_overview
import jax
import jax.numpy as jnp

from m2l2 import build, checkpoint, compilation_cache, hosts, metrics, preflight, sharding, timing
from m2l2.data.pipeline import Ahead, make_loader
from m2l2.listening import Listener
from m2l2.snapshot import save_snapshot


def train(config, workdir, writers=()) -> int:
  """Trains until `config.train.steps`, SIGTERM, SIGHUP or Ctrl-C; the same call goes on with a run.

  Args:
    config: as `configs/base.py` makes it.
    workdir: gets config.json, metrics.jsonl, goodput.json, checkpoints/ and snapshot/. With several
      processes it lies on a file system that all of them share.
    writers: where else the first process's log goes: `metrics.Writer`s or functions, such as
      `lambda step, scalars: wandb.log(scalars, step=step)`.

  A script that calls this needs `if __name__ == '__main__':` where processes read the data (`data.num_workers`).

  Returns:
    The number of updates done.

  Raises:
    UserError: a config that cannot work, unusable data, a workdir of another model, or gradients
      that stay non-finite; one line each.
  """
  fields, plain, began = config.train, preflight.plain(config), time.time()
  workdir, main = preflight.local(workdir), jax.process_index() == 0
  compilation_cache.use(workdir)
  key = jax.random.key(config.seed)

  # ================================================================================================
  # Mesh, a batch that divides, data that are there
  # ================================================================================================
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
  preflight.check(config, shards=sharding.batch_shards(mesh))
  mixture = preflight.find_data(config)
  functions = build.step_functions(config, ravel=sharding.is_one_cpu(mesh))

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))

    # ==============================================================================================
    # Shapes first: nothing is allocated before it is known where it goes
    # ==============================================================================================
    abstract = jax.eval_shape(functions.init, key)
    placement = sharding.param_shardings(
      abstract.params, functions.logical_axes, mesh=mesh, preset=config.mesh.preset)
    shardings = sharding.state_shardings(abstract, placement.shardings, mesh=mesh)
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    if main:
      table = parameter_overview.get_parameter_overview(abstract.params, include_stats=False)
      logging.vlog(1, 'parameters:\n%s', table)  # --v=1 shows it
      for told in preflight.describe(config, functions, abstract.params, mixture, mesh):
        logging.info('%s', told)
    for name, shape in placement.unplaced:
      logging.warning('%s %s fits no axis of the mesh: every device holds all of it', name, shape)

    # ==============================================================================================
    # Where the run goes on from, and data from the first sample that it has not seen
    # ==============================================================================================
    preflight.make_workdir(workdir)
    if main:  # before Checkpoints, which removes what looks left behind
      stack.enter_context(preflight.locked(workdir))
    checkpoints = stack.enter_context(checkpoint.Checkpoints(
      os.path.join(workdir, 'checkpoints'),
      keep_last=fields.keep_last, keep_every=fields.keep_every))
    restored = checkpoints.restore(abstract, config=plain)
    first = restored.step if restored else 0
    position = restored.position if restored else {'next_index': 0, 'files': None}
    listener = Listener(plain, sample_rate=functions.sample_rate, workdir=workdir, first=first)

    counting = stack.enter_context(futures.ThreadPoolExecutor(1)).submit(timing.model_flops, config)
    own, blocks = sharding.batch_blocks(mesh)
    fed = config.data
    loader = make_loader(
      root=mixture, sample_rate=functions.sample_rate,
      native_rates=functions.native_rates, channels=functions.channels, crop_samples=functions.crop_samples,
      batch_size=fields.batch_size, seed=config.seed, start_index=position['next_index'],
      blocks=own, of_blocks=blocks, num_workers=fed.num_workers, num_threads=fed.num_threads,
      prefetch=fed.prefetch, worker_buffer=fed.worker_buffer, rms_floor=fed.rms_floor, gain_db=fed.gain_db, mix=fed.mix,
      demand=timing.peak_flops(config) and timing.demand(config, counting.result()))
    stack.callback(loader.close)
    loader.check()
    batches = Ahead(
      loader, lambda rows: (rows, sharding.put_batch({'audio': rows['audio']}, mesh)),
      ahead=fed.device_prefetch)
    stack.callback(batches.close)
    offset = position['next_index'] - first * fields.batch_size  # not 0 once batch_size has changed

    # ==============================================================================================
    # The state. In this order:
    #   1. the newest readable checkpoint of this workdir: the run goes on;
    #   2. train.init_from, a snapshot: a new run from its weights;
    #   3. from scratch.
    # ==============================================================================================
    if restored:
      state = restored.state
      logging.info('going on from step %d in %s', first, workdir)
      for difference in checkpoint.config_differences(restored.config, plain):
        logging.warning('this run differs from the one it continues in %s', difference)
      if position['files'] != loader.mixture.fingerprint:
        logging.warning('the files at data.root are not those of the run so far: '
                        'the order of samples changes from here on')
    else:
      start = preflight.load_weights(fields.init_from, abstract.params) if fields.init_from else None
      state = jax.jit(functions.init, out_shardings=shardings)(key)
      if start:
        logging.info('weights from step %d of %s', start.step, fields.init_from)
        state = _with_weights_of(start, state, shardings)
      del start
    del restored  # it would hold the first state for the whole run
    state = functions.pack(state)
    packed = jax.tree.map(lambda x: x.sharding, state)

    # ==============================================================================================
    # Compile ahead, so that what does not fit says so before the first step
    # ==============================================================================================
    whole = sharding.replicated(mesh)
    audio = jax.ShapeDtypeStruct(
      (fields.batch_size, functions.channels, functions.crop_samples), jnp.float32,
      sharding=sharding.batch_sharding(mesh))
    logging.info('compiling; without a cache of earlier runs that takes from half a minute to many')
    compiling = time.perf_counter()
    compiled = lambda step: jax.jit(step, donate_argnums=0, out_shardings=(packed, whole)).lower(
      state, {'audio': audio}).compile(compiler_options=build.compiler_options(config))
    train_step = compiled(functions.train_step) if functions.head_start < fields.steps else None
    head_step = compiled(functools.partial(functions.train_step, head=True)) if first < functions.head_start else None
    _log_memory(train_step or head_step, seconds=time.perf_counter() - compiling)
    probe_step = jax.jit(functions.probe_step, out_shardings=whole)
    hosts.meet('compiled')

    # ==============================================================================================
    # Logs: written by the first process, cut back to the step the run goes on from; the clocks
    # ==============================================================================================
    if main:
      metrics.write_json(os.path.join(workdir, 'config.json'), plain)
    log = metrics.make_writers(workdir, resume_step=first, total_steps=fields.steps,
                               others=writers) if main else metrics.Writers()
    stack.callback(log.close)
    trace = timing.Trace(fields.profile if main else '', os.path.join(workdir, 'profile'))
    stack.callback(trace.close)
    goodput = timing.Goodput(
      os.path.join(workdir, 'goodput.json') if main else None, step=first, began=began)
    speed = timing.Throughput(
      samples_per_step=fields.batch_size,
      seconds_per_sample=functions.crop_samples / functions.sample_rate,
      flops_until=counting.result(), devices=jax.device_count(), peak=timing.peak_flops(config),
      exchange=functools.partial(hosts.exchange, 'input_wait'))
    speed.start(first)
    goodput.start()

    def write(line):
      """Fetches a step's metrics and writes them; called when the next ones are under way."""
      if line:
        done, scalars = line[0], jax.device_get(line[1])
        log.write(done, {**scalars, **speed.rates(done), **goodput.rates()})
        metrics.check_skipped(done, scalars, limit=fields.max_skipped_in_a_row)

    # ==============================================================================================
    # The loop. The order is law: save, measure, then the next batch, then the step, then the log.
    # So the position saved with a state is the position that this state has reached.
    # ==============================================================================================
    step, line, rows, rejected = first, None, None, 0
    stop = stack.enter_context(checkpoint.StopSignal(checkpoints))
    while True:
      stopping = step < fields.steps and stop.reached(step)
      due = step % fields.checkpoint_every == 0 or step == fields.steps or stopping
      if due and step:
        write(line)  # a checkpoint never stands before the lines that lead to it
        line = None
        with goodput.saving(step, state):
          checkpoints.save(step, functions.unpack(state), config=plain, position={
            'next_index': offset + step * fields.batch_size, 'files': loader.mixture.fingerprint})
          averaged = sharding.fetch(functions.unpack(state.ema))
          if main:
            save_snapshot(os.path.join(workdir, 'snapshot'), params=averaged, config=plain, step=step,
                          extra=metrics.latent_scale(workdir))
            logging.info('saving step %d: snapshot, and checkpoint to go on from', step)
          if log.shows_media and rows:
            log.write_audio(step, listener.reconstruct(averaged, rows['audio'][0]), sample_rate=functions.sample_rate)
      if listener.is_due(step, last=fields.steps) and not stopping:  # a run that goes on here measures first
        write(line)
        line = None
        checkpoints.wait()  # whatever measuring does, even to the machine, this step is kept
        with goodput.saving(step, state):
          weights = {'evaluate_ema': sharding.fetch(functions.unpack(state.ema)),
                     'evaluate': sharding.fetch(functions.unpack(state.params)) if listener.wants_raw else None}
          if main:
            listener.measure(step, weights, log)
        speed.start(step)  # the time since the last line was not training's
      if stopping or step >= fields.steps:
        break

      with speed.waiting():
        rows, batch = next(batches)
      rejected += int(rows['rejected'].sum())
      trace.begin(step + 1)
      with jax.transfer_guard('disallow'):
        state, values = (head_step if step < functions.head_start else train_step)(state, batch)
      step += 1
      trace.end(step, values)
      probing = fields.probe_every and step % fields.probe_every == 0
      if probing:
        probe_key = jax.random.fold_in(key, step)
        for name, weights in (('probe', state.params), ('probe_ema', state.ema)):
          results = probe_step(weights, batch, probe_key)
          values |= {f'{name}/{part}': value for part, value in results.items()}
      if probing or step in (1, fields.steps) or step % fields.log_every == 0:
        write(line)
        line, rejected = (step, {**values, 'data/rejected': rejected}), 0
      if step % fields.max_skipped_in_a_row == 0:  # the log may be much rarer
        write(line)
        line = None
        metrics.check_skipped(step, jax.device_get(values), limit=fields.max_skipped_in_a_row)

    # ==============================================================================================
    # The end: all is on disk before the last line is printed
    # ==============================================================================================
    checkpoints.wait()
    if stopping:
      logging.info('stopped after step %d of %d, all saved: run the same command to go on',
                   step, fields.steps)
    else:
      logging.info('done: %d steps; the model is %s', step, os.path.join(workdir, 'snapshot'))
    return step


# ==================================================================================================
# The stages' small change
# ==================================================================================================


def _with_weights_of(snapshot, state, shardings):
  """The state with parameters and average from a snapshot; optimizer and step stay new."""
  def replace(state, new):  # a copy for the average, because the step donates both
    return dataclasses.replace(state, params=new, ema=jax.tree.map(jnp.copy, new))

  return jax.jit(replace, out_shardings=shardings, donate_argnums=0)(state, snapshot.params)


def _log_memory(compiled, *, seconds):
  memory = compiled and compiled.memory_analysis()  # no program: a run of head start alone that is at its end
  if memory is None:  # not every backend tells
    logging.info('the step compiled in %.1f s', seconds)
    return
  mib = 2**20
  logging.info('the step compiled in %.1f s; a device holds %.0f MiB of state and batch and '
               '%.0f MiB of temporaries', seconds, memory.argument_size_in_bytes / mib,
               memory.temp_size_in_bytes / mib)
