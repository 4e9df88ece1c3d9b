"""A stage of the job as a Beam pipeline over its items.

Beam's own parallel local modes assign items beforehand and start a gRPC service for each process (3 s more, and the
slowest process decides). Here the embedded runner has one worker, which passes the items of its bundle to a pool of
threads, each with a child process that decodes (`child`); a free thread takes the next item.
"""

from collections.abc import Callable
from concurrent import futures
import contextlib
import json
import logging
import os
import queue
import shutil
import threading

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
import tqdm

from m2l2.data.audio_io import shown
from m2l2.data.prepare.child import DecodingProcess
from m2l2.data.prepare.items import do, result_name
from m2l2.data.prepare.options import Preparation
from m2l2.data.prepare.place import WORK
from m2l2.errors import UserError


class _Session:
  """Data that the embedded runner's workers, which are threads of this process, share with `prepare`."""

  def __init__(self, advance: Callable):
    self.advance, self.decoders = advance, list[DecodingProcess]()
    self.fault: BaseException | None = None  # the exception that ended it, before Beam wrapped it

  def stop(self):
    for decoder in self.decoders:
      decoder.close()


_session = None  # while the embedded runner runs


def _note(error: BaseException):
  if _session and not _session.fault:
    _session.fault = error


class _Work(beam.DoFn):
  """Processes the items of a bundle in a pool of threads with a decoder each; the results are files."""

  def __init__(self, job: Preparation, stage: str, processes: int):
    self._job, self._stage, self._processes = job, stage, processes

  def setup(self):
    folder = None if '://' in self._job.output else os.path.join(self._job.output, WORK)
    limits = self._job.limits
    decoders = [DecodingProcess(timeout=limits.timeout, memory=limits.memory, folder=folder)
                for _ in range(self._processes)]
    self._decoders, self._free = decoders, queue.SimpleQueue[DecodingProcess]()
    for decoder in decoders:
      self._free.put(decoder)
    if _session:
      _session.decoders += decoders
    self._threads = futures.ThreadPoolExecutor(self._processes)

  def start_bundle(self):
    self._items = []

  def process(self, item: str):
    self._items.append(json.loads(item))

  def finish_bundle(self):
    # the longest first, so that all threads end at about the same time
    self._items.sort(key=lambda item: -item.get('seconds', 0))
    try:
      for done in futures.as_completed([self._threads.submit(self._one, item) for item in self._items]):
        done.result()
    except BaseException as e:
      _note(e)  # also for Ctrl-C and SIGTERM
      self._stop()
      raise

  def teardown(self):
    self._stop()

  def _one(self, item):
    decoder = self._free.get()
    try:
      do(self._job, self._stage, item, decoder, _session.advance if _session else lambda amount: None)
    except BaseException as e:
      _note(e)
      raise
    finally:
      self._free.put(decoder)

  def _stop(self):
    for decoder in self._decoders:
      decoder.close()
    self._threads.shutdown(cancel_futures=True)


def run_stage(place, job, stage, items, *, total, unit, runner, processes, beam_arguments, quiet) -> list[dict]:
  """The results of a stage's items, in order; only items without a result are done."""
  global _session
  done = place.results(stage)
  todo = [item for item in items if result_name(stage, item) not in done]
  if todo:
    work = _Work(job, stage, min(processes, len(todo)))
    with _progress_bar(stage, total, unit, quiet=quiet or bool(runner)) as advance:
      session = _Session(advance)
      try:
        _session = None if runner else session
        options = PipelineOptions([f'--runner={runner}', *beam_arguments] if runner else [])
        with _quiet_beam(), contextlib.ExitStack() as stack:
          pipeline = beam.Pipeline(runner=None if runner else FnApiRunner(), options=options)
          # Beam calls it only in the process that runs the item
          stack.callback(shutil.rmtree, pipeline.local_tempdir, ignore_errors=True)
          stack.enter_context(pipeline)
          # As JSON, since names may contain bytes that Beam's coders refuse. Reshuffle: runners distribute items here.
          keys = pipeline | beam.Create([json.dumps(item) for item in todo])
          keys | beam.Reshuffle() | beam.ParDo(work)
      except BaseException as e:  # each runner of Beam wraps the exceptions of workers differently
        if session.fault:
          raise session.fault from e
        if not isinstance(e, Exception):
          raise
        raise UserError(f'the pipeline failed: {_last_line(e)}') from e
      finally:
        _session = None
        session.stop()
  results = [place.read_json(result_name(stage, item)) for item in items]
  if None in results:
    raise UserError(f'{shown(place.root)}: results of the {stage} stage are missing; is --output on storage that all '
                    'workers share? Run the same command again to go on')
  return results


def _last_line(error) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  ours = [line.partition('UserError: ')[2] for line in lines if 'UserError: ' in line]
  return (ours or lines or [type(error).__name__])[-1]


@contextlib.contextmanager
def _quiet_beam():
  """Silences Beam's log of a failure, which m2l2 reports in one line."""
  log = logging.getLogger('apache_beam')
  level = log.level
  log.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    log.setLevel(level)


@contextlib.contextmanager
def _progress_bar(stage, total, unit, *, quiet):
  """On a terminal only. Work of an earlier run of the same job is not counted."""
  lock = threading.Lock()
  with tqdm.tqdm(total=round(total), desc=stage, unit=unit, leave=False, disable=True if quiet else None,
                 bar_format='{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} {unit}, {remaining} left') as bar:
    def advance(amount):
      with lock:
        bar.update(amount)
    yield advance
