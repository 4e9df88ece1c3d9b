"""The training loop: one function, read downward. What an update is stands in train_step.py."""

from concurrent import futures
import contextlib
import functools
import os
import time

from absl import logging
from clu import parameter_overview
import jax

from m2l2 import build, compiling, files, sharding
from m2l2.codec.snapshot import Background, save_snapshot
from m2l2.data.pipeline import Ahead
from m2l2.training import checkpoint, goodput, hosts, metrics, preflight, programs, scaling, timing
from m2l2.training.listening import Listener
from m2l2.training.watchdog import COMPUTING, MEASURING, SAVING, WAITING


def train(config, workdir, writers=()) -> int:
  """Trains until `config.train.steps`, SIGTERM, SIGHUP or Ctrl-C; the same call goes on with a run.

  Args:
    config: as `configs/base.py` makes it.
    workdir: gets config.json, metrics.jsonl, goodput.json, checkpoints/ and snapshot/. With several
      processes it lies on a file system that all of them share. The snapshot is written while
      training goes on; several processes that are told to stop, which have little time, leave it
      as it is and write a checkpoint alone.
    writers: where else the first process's log goes: `metrics.Writer`s or functions, such as
      `lambda step, scalars: wandb.log(scalars, step=step)`.

  A script that calls this needs `if __name__ == '__main__':` where processes read the data (`data.num_workers`).

  Returns:
    The number of updates done.

  Raises:
    UserError: a config that cannot work, unusable data, a workdir of another model, or gradients
      that stay non-finite; one line each.
  """
  config, began = scaling.scaled(config), time.time()
  fields, plain = config.train, preflight.plain(config)
  workdir, main = preflight.local(workdir), jax.process_index() == 0
  compiling.use_cache(workdir)

  # ================================================================================================
  # Mesh, a batch that divides, data that are there
  # ================================================================================================
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
  preflight.check(config, shards=sharding.batch_shards(mesh))
  mixture = preflight.find_data(config)
  functions = build.step_functions(config, ravel=sharding.is_one_cpu(mesh))
  init = lambda: functions.init(jax.random.key(config.seed))

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))

    # ==============================================================================================
    # Shapes first: nothing is allocated before it is known where it goes
    # ==============================================================================================
    abstract, placement = programs.abstract_state(functions, init, mesh, preset=config.mesh.preset)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
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
    position: dict = restored.position if restored else {'next_index': 0, 'files': None}
    listener = Listener(plain, sample_rate=functions.sample_rate, workdir=workdir, first=first)

    counting = stack.enter_context(futures.ThreadPoolExecutor(1)).submit(timing.model_flops, config)
    own, blocks = sharding.batch_blocks(mesh)
    data = config.data
    loader = preflight.open_data(
      config, functions, mixture, start_index=position['next_index'], blocks=own, of_blocks=blocks,
      num_workers=data.num_workers, num_threads=data.num_threads, prefetch=data.prefetch,
      worker_buffer=data.worker_buffer,
      demand=timing.peak_flops(config) and timing.demand(config, counting.result()))
    stack.callback(loader.close)
    loader.check()
    corpus = loader.mixture.fingerprint if main else None  # once: it asks for the size of every shard
    batches = Ahead(
      loader, lambda rows: (rows, sharding.put_batch({'audio': rows['audio']}, mesh)),
      ahead=data.device_prefetch)
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
      if main and position['files'] != corpus:
        logging.warning('the files at data.root are not those of the run so far: '
                        'the order of samples changes from here on')
    else:
      start = preflight.load_weights(fields.init_from, abstract.params) if fields.init_from else None
      if start:
        logging.info('weights from step %d of %s', start.step, fields.init_from)
      state = programs.first_state(init, shardings, weights=start and start.params)
      del start
    del restored  # it would hold the first state for the whole run
    state = functions.ravel(state)

    # ==============================================================================================
    # Compile ahead, so that what does not fit says so before the first step
    # ==============================================================================================
    logging.info('compiling; without a cache of earlier runs that takes from half a minute to many')
    compile_began = time.perf_counter()
    spent = goodput.Goodput(
      os.path.join(workdir, 'goodput.json') if main else None, step=first, began=began)
    spent.enter(goodput.COMPILE)
    batch = programs.abstract_batch(functions, mesh, batch_size=fields.batch_size)
    compiled = functools.partial(programs.compiled, options=build.compiler_options(config))
    update = lambda **options: compiled(programs.lower_step(functions, state, batch, mesh, **options))
    updates = {name: update(phase=name) for name, end in functions.phases if first < end}
    probes = fields.probe_every and fields.steps // fields.probe_every > first // fields.probe_every
    probe_step = compiled(
      programs.lower_probe(functions, state.params, batch, mesh, seed=config.seed)) if probes else None
    sharding.fetch(functions.unravel(state.ema), here=False)  # what saving needs of the devices is compiled now, too
    _log_memory([*updates.values()][-1:] + [probe_step], seconds=time.perf_counter() - compile_began)
    hosts.meet('compiled')
    spent.enter(goodput.INIT)

    # ==============================================================================================
    # Logs: written by the first process, cut back to the step the run goes on from; the clocks
    # ==============================================================================================
    if main:
      files.write_json(os.path.join(workdir, 'config.json'), plain)
    log = metrics.make_writers(workdir, resume_step=first, total_steps=fields.steps,
                               others=writers) if main else metrics.Writers()
    stack.callback(log.close)
    trace = timing.Trace(fields.profile if main else '', os.path.join(workdir, 'profile'))
    stack.callback(trace.close)
    speed = timing.Throughput(
      samples_per_step=fields.batch_size,
      seconds_per_sample=functions.crop_samples / functions.sample_rate,
      flops_until=counting.result(), devices=jax.device_count(), peak=timing.peak_flops(config),
      exchange=functools.partial(hosts.exchange, 'input_wait'))
    speed.start(first)
    spent.enter(goodput.UPDATES)

    def write(line):
      """Fetches a step's metrics and writes them; called when the next ones are under way."""
      if line:
        done, scalars = line[0], jax.device_get(line[1])
        log.write(done, {**scalars, **speed.rates(done), **spent.rates()})
        metrics.check_skipped(done, scalars, limit=fields.max_skipped_in_a_row)

    # ==============================================================================================
    # The loop. The order is law: save, measure, then the next batch, then the step, then the log.
    # So the position saved with a state is the position that this state has reached.
    # ==============================================================================================
    step, line, rows, rejected = first, None, None, 0
    values: dict = {}
    busy = lambda: not all(value.is_ready() for value in values.values())
    stop = stack.enter_context(checkpoint.StopSignal(checkpoints))
    snapshots = stack.enter_context(Background())
    progress = stack.enter_context(hosts.watched(workdir))
    while True:
      stopping = step < fields.steps and stop.reached(step)
      hurried = stopping and jax.process_count() > 1  # preempted, most likely: there is time for a checkpoint alone
      due = step % fields.checkpoint_every == 0 or step == fields.steps or stopping
      if due and step:
        progress(step, SAVING)
        write(line)  # a checkpoint never stands before the lines that lead to it
        line, averaged = None, None
        with spent.saving(step, state):
          checkpoints.save(step, functions.unravel(state), config=plain, position={
            'next_index': offset + step * fields.batch_size, 'files': corpus})
          if not hurried:
            averaged = sharding.fetch(functions.unravel(state.ema), here=main)
          if main and averaged:
            snapshots.save(functools.partial(_save_snapshot, workdir, averaged, plain, step))
          if main:
            logging.info('saving step %d: %scheckpoint to go on from', step, 'snapshot, and ' if averaged else '')
          if averaged and log.shows_media and rows:
            progress(step, MEASURING)  # the first time it compiles
            log.write_audio(step, listener.reconstruct(averaged, rows['audio'][0]), sample_rate=functions.sample_rate)
      if listener.is_due(step, last=fields.steps) and not stopping:  # a run that goes on here measures first
        write(line)
        line = None
        progress(step, MEASURING)
        checkpoints.wait()  # whatever measuring does, even to the machine, this step is kept
        snapshots.wait()
        with spent.measuring(state):
          kept = lambda params: sharding.fetch(functions.unravel(params), here=main)
          weights = {'evaluate_ema': kept(state.ema), 'evaluate': kept(state.params) if listener.wants_raw else None}
          if main:
            listener.measure(step, weights, log)
        speed.start(step)  # the time since the last line was not training's
      if stopping or step >= fields.steps:
        break

      progress(step, WAITING)
      with speed.waiting(), spent.waiting(busy):
        rows, batch = next(batches)
      progress(step + 1, COMPUTING)
      rejected += int(rows['rejected'].sum())
      trace.begin(step + 1)
      with jax.transfer_guard('disallow'):
        state, values = updates[functions.phase(step)](state, batch)
      step += 1
      trace.end(step, values)
      probing = fields.probe_every and step % fields.probe_every == 0
      if probing:
        assert probe_step
        for name, weights in (('probe', state.params), ('probe_ema', state.ema)):
          results = probe_step(weights, batch, state.step)
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
    with spent.saving(step, state):
      checkpoints.wait()
      if hurried:
        snapshots.drop()
      else:
        snapshots.wait()
    logging.info('the time since the run began: %s', spent)
    if stopping:
      logging.info('stopped after step %d of %d, all saved: run the same command to go on', step, fields.steps)
    else:
      logging.info('done: %d steps; the model is %s', step, os.path.join(workdir, 'snapshot'))
    return step


# ==================================================================================================
# The stages' small change
# ==================================================================================================


def _save_snapshot(workdir, params, config, step):
  save_snapshot(os.path.join(workdir, 'snapshot'), params=params, config=config, step=step,
                extra=metrics.latent_scale(workdir, step=step))


def _log_memory(programs, *, seconds):
  """programs: the last phase's step and the probe, if any."""
  memories = [program.memory_analysis() for program in programs if program]
  if not memories or None in memories:  # not every backend tells
    logging.info('the step compiled in %.1f s', seconds)
    return
  mib = 2**20
  logging.info('the step compiled in %.1f s; a device holds %.0f MiB of state and batch and %.0f MiB of temporaries%s',
               seconds, memories[0].argument_size_in_bytes / mib, memories[0].temp_size_in_bytes / mib,
               f' ({memories[1].temp_size_in_bytes / mib:.0f} in a probe)' if len(memories) > 1 else '')
