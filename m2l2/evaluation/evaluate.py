"""Metrics over many pairs: the report behind `m2l2 evaluate`, and behind evaluations in training.

Signal metrics run in other processes, clip by clip, while this process computes embeddings. A metric that is undefined
for a pair (silent, too short, mono) is left out of the mean and named in the report's warnings.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os

import numpy as np
import soxr

from m2l2.data import audio_io, sources
from m2l2.errors import UserError, in_one_line
from m2l2.evaluation.embedders.embeddings import EMBEDDINGS, IN_THE_BOX
from m2l2.evaluation.metrics import checks, frechet, pairs, registry, seams


@dataclasses.dataclass(frozen=True)
class Pair:
  """A reference and its estimate: two audio files, or two float arrays [channels, samples] at `sample_rate` (Hz)."""
  name: str
  reference: str | np.ndarray
  estimate: str | np.ndarray
  sample_rate: int | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A pair as float32 [channels, samples] each, at one rate (the reference's), with warnings about it."""
  reference: np.ndarray
  estimate: np.ndarray
  sample_rate: int
  warnings: tuple[str, ...] = ()


def find_pairs(reference, estimate) -> tuple[list[Pair], list[str]]:
  """Pairs of the audio files in two folders, by relative name, else without its extension; two files are a pair.

  Returns (pairs in the order of their names, one warning for each file without a partner).
  Raises UserError: a folder without audio, or no pair.
  """
  if os.path.isfile(reference) and os.path.isfile(estimate):
    return [Pair(os.path.basename(reference), os.fspath(reference), os.fspath(estimate))], []
  references, estimates = sources.find_audio_files(reference), sources.find_audio_files(estimate)
  by_name = {name: estimates.path(i) for i, name in enumerate(estimates.names)}
  by_stem: dict[str, list[str]] = {}
  for name in by_name:
    by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
  matched, warnings, used = [], [], set()
  for i, name in enumerate(references.names):
    partners = [name] if name in by_name else (
        by_stem.get(name) or by_stem.get(os.path.splitext(name)[0], []))  # song.wav.flac, if there is a song.mp3 too
    if len(partners) == 1 and partners[0] not in used:
      used.add(partners[0])
      matched.append(Pair(name, references.path(i), by_name[partners[0]]))
    else:
      why = f'several estimates ({", ".join(sorted(partners))})' if len(partners) > 1 else 'no estimate'
      warnings.append(f'{name}: partner: {why}; left out')
  warnings += [f'{name}: partner: an estimate without a reference; left out' for name in sorted(set(by_name) - used)]
  if not matched:
    raise UserError(f'no file of {audio_io.shown(estimate)} has the name of one in {audio_io.shown(reference)}: '
                    'nothing to compare')
  return matched, warnings


def load_pair(pair: Pair, *, check: bool = True) -> Loaded:
  """Raises UserError: a file cannot be read, or a side is empty or not finite."""
  if pair.sample_rate is None:
    (r, rate), (x, estimate_rate) = (audio_io.read(path, check_finite=True) for path in (pair.reference, pair.estimate))
  else:
    r, x = (np.atleast_2d(np.asarray(audio, np.float32)) for audio in (pair.reference, pair.estimate))
    rate = estimate_rate = pair.sample_rate
  for audio, what in ((r, 'reference'), (x, 'estimate')):
    if not audio.shape[1]:
      raise UserError(f'the {what} is empty: there is nothing to compare')
    if not np.isfinite(audio).all():
      raise UserError(f'the {what} holds NaN or infinite samples: it cannot be measured')
  warnings = checks.check_pair(r, x, reference_rate=rate, estimate_rate=estimate_rate) if check else []
  if estimate_rate != rate:
    x = soxr.resample(x.T, estimate_rate, rate, quality='HQ').T
  length = min(r.shape[1], x.shape[1])
  return Loaded(r[:, :length], x[:, :length], rate, tuple(warnings))


def measure(loaded: Loaded, metrics: Sequence[registry.Metric], *, chunks: seams.Chunks = seams.Chunks(),
            seed: int = 0) -> tuple[dict[str, float], list[str]]:
  """The signal metrics of one pair that have a finite value, by name, and a warning for each that has none.

  Metrics of stereo are left out without a warning if a side is not stereo.
  """
  compared = pairs.Comparison(loaded.reference, loaded.estimate, loaded.sample_rate, chunks, seed)
  is_stereo = len(loaded.reference) == len(loaded.estimate) == 2
  values, warnings = {}, []
  for metric in metrics:
    if metric.stereo and not is_stereo:
      continue
    name = metric.name
    try:
      value = metric(compared)
    except UserError as error:
      warnings.append(str(error) if name in str(error) else f'{name}: {error}')
    except Exception as error:  # a bad pair must not end the report
      warnings.append(f'{name}: has no value ({type(error).__name__}: {in_one_line(error)})')
    else:
      if math.isfinite(value):
        values[name] = value
      else:
        warnings.append(f'{name}: is {value}, left out')
  return values, warnings


def evaluate(items: Sequence[Pair], *, metrics: Sequence[str] | None = None,
             embedders: Mapping[str, Callable] | None = None, workers: int = 1, chunks: seams.Chunks = seams.Chunks(),
             seed: int = 0, progress: Callable[[int], None] = lambda steps: None) -> dict:
  """The report on all pairs, a tree of JSON types.

  Args:
    items: pairs with unique names.
    metrics: names of the registry; None: its defaults. embedders: name -> function, see `embeddings.make_embedder`.
    workers: processes for the signal metrics; up to 1, they run in this one.
    chunks: the model's chunk borders, for seam_db. seed: of the noise in `ratio`, and of the bootstrap.
    progress: called with the number of steps done since the last call; `steps_of` is the total.
  Returns:
    {'pairs': n measured, 'metrics': {name: {'mean', 'sem', 'per_file'}},
     'frechet': {embedding: {'value', 'bootstrap_sd', 'clips', 'windows'}}, 'warnings': ['file: what: ...']}.
    A metric that no pair has is absent; sem is None for one pair.
  Raises:
    UserError: unknown name, or no pair can be measured.
  """
  metrics = registry.by_default() if metrics is None else metrics
  embedders = embedders or {}
  # The registry's entries go with the job, since another process may have registered fewer.
  entries = tuple(registry.named(metrics, beside=EMBEDDINGS))
  job = functools.partial(_measured, metrics=entries, chunks=chunks, seed=seed)
  with _mapped(job, items, workers) as results:
    embedded, embedding_warnings = _embed_all(items, embedders, progress)
    per_file, warnings = {}, []
    for item, (values, pair_warnings) in zip(items, results):
      progress(1)
      warnings += [f'{item.name}: {line}' for line in pair_warnings]
      if values is not None:
        per_file[item.name] = values
  if not per_file:
    raise UserError(f'no pair can be measured; the first: {warnings[0]}')
  distances, frechet_warnings = _distances(embedded, seed)
  absent = [f'{name}: only {count} of {len(per_file)} pairs have it' for name in metrics
            if 0 < (count := sum(name in values for values in per_file.values())) < len(per_file)]
  return {'pairs': len(per_file), 'metrics': _summary(per_file, metrics), 'frechet': distances,
          'warnings': warnings + embedding_warnings + frechet_warnings + absent}


def steps_of(items, embedders) -> int:
  return len(items) * (1 + len(embedders or {}))


def _measured(pair: Pair, *, metrics, chunks, seed) -> tuple[dict[str, float] | None, list[str]]:
  """(values, warnings); values is None for a pair that cannot be read."""
  try:
    loaded = load_pair(pair)
  except UserError as error:
    return None, [f'unreadable: {error}; left out']
  values, warnings = measure(loaded, metrics, chunks=chunks, seed=seed)
  return values, [*loaded.warnings, *warnings]


_THREADS = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


@contextlib.contextmanager
def _mapped(job, items, workers):
  """Context of an iterator over job(item), in order, computed by `workers` processes from the start."""
  workers = min(workers, len(items))
  if workers <= 1:
    yield map(job, items)
    return
  # Not forked: this process may hold JAX's threads.
  pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context('spawn'))
  try:
    before = {name: os.environ.get(name) for name in _THREADS}
    # one thread per worker: their matrix products would compete for the cores
    os.environ.update(dict.fromkeys(_THREADS, '1'))
    try:
      futures = [pool.submit(job, item) for item in items]  # which starts the processes
    finally:
      for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    yield (future.result() for future in futures)
  except concurrent.futures.process.BrokenProcessPool as error:
    raise UserError('a worker died, most likely for lack of memory: try --workers=1') from error
  finally:
    pool.shutdown(cancel_futures=True)


def _embed_all(items, embedders, progress):
  """({embedding: [(reference [windows, d], estimate [windows, d]), ...] by clip}, warnings)."""
  embedded: dict[str, list] = {name: [] for name in embedders}
  warnings = []
  for item in items if embedders else ():
    try:
      loaded = load_pair(item, check=False)
    except UserError:  # reported by the worker
      progress(len(embedders))
      continue
    for name, embed in embedders.items():
      try:
        embedded[name].append(tuple(embed(audio, loaded.sample_rate) for audio in (loaded.reference, loaded.estimate)))
      except UserError as error:
        warnings.append(f'{item.name}: {name}: {error}')
      except Exception as error:  # as in `measure`
        warnings.append(f'{item.name}: {name}: has no value ({type(error).__name__}: {in_one_line(error)})')
      progress(1)
  return embedded, warnings


def _distances(embedded, seed):
  distances, warnings = {}, []
  for name, clips in embedded.items():
    try:
      if not clips:
        raise UserError('no clip could be embedded')
      references, estimates = zip(*clips)
      distances[name] = {
          'value': frechet.frechet_distance(np.concatenate(references), np.concatenate(estimates)),
          'bootstrap_sd': frechet.bootstrap_sd(references, estimates, seed=seed),
          'clips': len(clips), 'windows': sum(map(len, references))}
    except (UserError, ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
      warnings.append(f'{name}: {error}')
  return distances, warnings


def _summary(per_file, metrics) -> dict:
  summary = {}
  for name in metrics:
    values = {file: values[name] for file, values in per_file.items() if name in values}
    if values:
      array = np.array(list(values.values()))
      sem = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
      summary[name] = {'mean': float(array.mean()), 'sem': sem, 'per_file': values}
  return summary


def split_names(names: str | None, *, with_files: Iterable[str] = ()) -> tuple[list[str], list[str]]:
  """(signal metrics, embeddings) of a comma-separated list; of None: the registry's defaults that are installed, the
  embeddings in the box, and those in `with_files`, whose weights were given.

  Raises UserError: an unknown name, or a metric whose package is not installed.
  """
  if names is None:
    return registry.by_default(), [*IN_THE_BOX, *with_files]
  picked = [name.strip() for name in names.split(',') if name.strip()] or [names]
  for metric in registry.named([name for name in picked if name not in EMBEDDINGS], beside=EMBEDDINGS):
    metric.require()
  return [name for name in registry.METRICS if name in picked], [name for name in EMBEDDINGS if name in picked]
