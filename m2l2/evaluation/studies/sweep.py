"""Quality against sigma_cond, the noise added to a chunk before the next is decoded (the paper's figure 3).

With too little noise, errors propagate from chunk to chunk; with too much, the next chunk gets no information from the
one before. Every setting decodes the same latents from the same noise: settings are compared clip by clip.
"""

from collections.abc import Callable, Mapping, Sequence
import os

from m2l2.codec.codec import Codec
from m2l2.codec.snapshot import load_snapshot, save_snapshot, snapshot_place
from m2l2.errors import UserError
from m2l2.evaluation import evaluate
from m2l2.evaluation.embedders.embeddings import remembering
from m2l2.evaluation.excerpts import Excerpt
from m2l2.evaluation.metrics import registry, seams

VALUES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 4.0)
METRICS = ('si_sdr', 'mel_l1_db', 'mrstft', 'ratio', 'seam_db')
EMBEDDED = ('musicnn_mtt', 'musicnn_msd')
# One-step decoding keeps the first sample of each chunk; two-step refines it together with the next chunk.
STEPS = {'one_step': False, 'two_step': True}


def sweep(codec: Codec, clips: Sequence[Excerpt], *, values: Sequence[float] = VALUES,
          metrics: Sequence[str] = METRICS, embedders: Mapping[str, Callable] | None = None, by: str | None = None,
          workers: int = 1, seed: int = 0, progress: Callable[[int], None] = lambda steps: None) -> dict:
  """Decodes the clips with every sigma_cond of `values`, in one and in two steps, and measures each.

  Args:
    metrics, embedders, workers: as for `evaluate.evaluate`.
    by: the metric or embedding that chooses the best setting; by default the first embedding, else the first metric.
    seed: of the noise that decoding starts from.
    progress: called with the number of steps done since the last call; `steps_of` is the total.
  Returns:
    JSON types: {'clips', 'seed', 'settings': [{'sigma_cond', 'steps', 'values': {name: {'mean', 'error'}}}, ...],
    'best': {'by', 'sigma_cond', 'steps', 'value'}, 'warnings'}; 'steps' is 'one_step' or 'two_step', 'error' the
    standard error (of a Frechet distance the bootstrap's deviation), None for one clip.
  Raises:
    UserError: a value that is no noise level of the model, unknown names, or nothing can be measured.
  """
  embedders = {name: remembering(embed) for name, embed in (embedders or {}).items()}
  by = by or next(iter([*embedders, *metrics]), '')
  if by not in (*embedders, *metrics):
    raise UserError(f'the best sigma_cond is to be told by {by!r}, which is not measured: name one of '
                    f'{", ".join([*embedders, *metrics])}')
  if not registry.is_ordered(by):
    raise UserError(f'{by} tells no best sigma_cond: neither high nor low values are good, but those near the original')
  for value in values:
    codec.check_decoding(seed, sigma_cond=value)
  chunks = seams.of_model(codec.representation, rates=codec.native_rates)
  encoded = [codec.encode(clip.audio, clip.sample_rate) for clip in clips]
  settings, warnings = [], []
  for value in sorted(set(values)):
    for steps, refine in STEPS.items():
      pairs = [evaluate.Pair(clip.name, clip.audio, codec.decode(latents, seed, sigma_cond=value, refine=refine),
                             clip.sample_rate) for clip, latents in zip(clips, encoded)]
      progress(len(clips))
      report = evaluate.evaluate(pairs, metrics=metrics, embedders=embedders, workers=workers, chunks=chunks, seed=seed)
      settings.append({'sigma_cond': float(value), 'steps': steps, 'values': means(report)})
      # Warnings about levels differ between settings; those about undefined metrics are the same.
      warnings += [line for line in report['warnings'] if line not in warnings and ': gain: ' not in line]
  return {'clips': len(clips), 'seed': seed, 'settings': settings, 'best': _best(settings, by), 'warnings': warnings}


def steps_of(clips, values) -> int:
  return len(clips) * len(set(values)) * len(STEPS)


def means(report) -> dict:
  """A report of `evaluate.evaluate` without its files: {metric or embedding: {'mean', 'error'}}."""
  return {**{name: {'mean': metric['mean'], 'error': metric['sem']} for name, metric in report['metrics'].items()},
          **{name: {'mean': distance['value'], 'error': distance['bootstrap_sd']}
             for name, distance in report['frechet'].items()}}


def is_better(name: str, new: float, old: float) -> bool:
  """Whether a value of a metric or an embedding's distance is better than another."""
  return registry.badness(name, new) < registry.badness(name, old)


def _best(settings, by):
  best = None
  for setting in settings:
    value = setting['values'].get(by, {}).get('mean')
    if value is not None and (best is None or is_better(by, value, best['value'])):
      best = {'by': by, 'sigma_cond': setting['sigma_cond'], 'steps': setting['steps'], 'value': value}
  if best is None:
    raise UserError(f'{by} could not be measured on any clip, so no sigma_cond is best: take longer clips, or name '
                    'another with --by')
  return best


def write_best(checkpoint, best: Mapping) -> str:
  """Makes the best setting the default of a snapshot's decoding: consistency.sigma_cond and .refine of its config.

  Weights and fingerprint do not change, so existing latents still match. Training that continues in a workdir writes
  its own config again with the next snapshot.

  Args:
    checkpoint: snapshot or workdir. best: of the report.
  Returns:
    The snapshot's path.
  Raises UserError: no snapshot there, or it cannot be written.
  """
  snapshot, place = load_snapshot(checkpoint), snapshot_place(checkpoint)
  chosen = {'sigma_cond': best['sigma_cond'], 'refine': STEPS[best['steps']]}
  config = {**snapshot.config, 'consistency': {**snapshot.config['consistency'], **chosen}}
  save_snapshot(place, params=snapshot.params, config=config, step=snapshot.step, extra=snapshot.extra)
  return os.fspath(place)


def names_of(text: str | None) -> tuple[list[str], list[str]]:
  """As `evaluate.split_names`, with the sweep's own defaults."""
  return (list(METRICS), list(EMBEDDED)) if text is None else evaluate.split_names(text)


def values_of(text: str | None) -> tuple[float, ...]:
  """'0.1,0.3' -> (0.1, 0.3). Raises UserError."""
  try:
    return VALUES if text is None else tuple(float(part) for part in text.split(','))
  except ValueError as error:
    raise UserError(f'--values={text}: give numbers with commas between') from error
