"""Reconstructions during training: sounds for the writers, and metrics on held-out clips."""

from collections.abc import Mapping
from concurrent import futures
import os

from absl import logging

from m2l2 import files
from m2l2.codec.codec import Codec
from m2l2.codec.snapshot import load_snapshot, save_snapshot
from m2l2.errors import UserError, in_one_line
from m2l2.evaluation import evaluate, excerpts
from m2l2.evaluation.embedders import embeddings
from m2l2.evaluation.metrics import registry, seams
from m2l2.evaluation.studies import sweep
from m2l2.training.metrics import METRICS

SEED = 0  # seed of the noise of every decoding, so that only the weights differ


class Listener:
  """Reconstructs sounds with weights of a run, and measures held-out clips if config.evaluate asks for it.

  Works on this process's own devices, in a thread without the run's mesh: the other processes do not take part.

  Args:
    plain: the resolved config, JSON types.
    sample_rate: of the model (Hz). workdir: best/, a snapshot, is written there. first: the step that the run resumes
      from.

  Raises:
    UserError: invalid fields of config.evaluate.
  """

  def __init__(self, plain: Mapping, *, sample_rate: int, workdir, first: int):
    self._plain, self._rate = plain, sample_rate
    self._codec: Codec | None = None
    self._best_path = os.path.join(workdir, 'best')
    self._fields = fields = plain['evaluate']
    self.measures = bool(fields['root']) and fields['every'] > 0
    if fields['every'] < 0:
      raise UserError(f'evaluate.every={fields["every"]}: it must be 0 (never) or more')
    if not self.measures:
      return
    metrics, names = evaluate.split_names(fields['metrics'])
    if fields['best'] and fields['best'] not in (*metrics, *names):
      raise UserError(f'evaluate.best={fields["best"]!r} is not among evaluate.metrics={fields["metrics"]}')
    if not registry.is_ordered(fields['best']):
      raise UserError(f"evaluate.best={fields['best']!r}: neither its high nor its low values are good; name another")
    self._metrics, self._measured = metrics, _last_measured(workdir, most=first)
    self._embedders = {name: embeddings.remembering(embeddings.make_embedder(name), most=2 * fields['clips'] + 1)
                       for name in names}
    self._clips, warnings = excerpts.take_excerpts(fields['root'], seconds=fields['seconds'], most=fields['clips'])
    for line in warnings:
      logging.warning('evaluate.root: %s', line)

  def is_due(self, step: int, *, last: int) -> bool:
    """Whether to measure after `step` updates: never twice, also if the run resumes from that step."""
    return self.measures and step > self._measured and (step % self._fields['every'] == 0 or step == last)

  @property
  def wants_raw(self) -> bool:
    return self._fields['raw']

  def reconstruct(self, params, audio) -> dict:
    """A sound [C, N] at the model's rate -> its reconstruction."""
    return {'original': audio, 'reconstruction': self._alone(self._decode, params, audio, self._rate)}

  def measure(self, step: int, weights: Mapping[str, Mapping], log):
    """Measures {'evaluate_ema': params, 'evaluate': params or None}; keeps the first as best/ if it is the best.

    Writes 'evaluate_ema/NAME' and so on, and the first clip's reconstruction, to `log`, a `metrics.Writers`. Errors
    are logged: a failed evaluation must not end a run.
    """
    try:
      self._measure_all(step, weights, log)
    except Exception as error:
      logging.warning('the evaluation at step %d failed, training continues: %s: %s', step, type(error).__name__,
                      in_one_line(error))

  def _measure_all(self, step, weights, log):
    scalars, clip = dict[str, float](), self._clips[0]
    for name, params in weights.items():
      if params is not None:
        values, sound = self._alone(self._measure, params)
        scalars |= {f'{name}/{metric}': value['mean'] for metric, value in values.items()}
        absent = [metric for metric in (*self._metrics, *self._embedders) if metric not in values]
        if absent:
          logging.warning('evaluation at step %d: %s has no value on any of the clips', step, ', '.join(absent))
        if name == 'evaluate_ema':
          self._keep_best(step, params, values)
          log.write_audio(step, {'held_out/original': clip.audio, 'held_out/reconstruction': sound},
                          sample_rate=clip.sample_rate)
    log.write(step, scalars)
    logging.info('held-out clips at step %d: %s', step,
                 '  '.join(f'{name} {value:.4g}' for name, value in scalars.items()))

  def _measure(self, params):
    decoded = [self._decode(params, clip.audio, clip.sample_rate) for clip in self._clips]
    items = [evaluate.Pair(clip.name, clip.audio, sound, clip.sample_rate)
             for clip, sound in zip(self._clips, decoded)]
    assert self._codec
    chunks = seams.of_model(self._codec.representation, rates=self._codec.native_rates)
    report = evaluate.evaluate(items, metrics=self._metrics, embedders=self._embedders, chunks=chunks, seed=SEED)
    return sweep.means(report), decoded[0]

  def _decode(self, params, audio, sample_rate):
    self._codec = self._codec or Codec(config=self._plain, params=params, fingerprint='')
    self._codec.params = params
    return self._codec.decode(self._codec.encode(audio, sample_rate), SEED)

  def _alone(self, function, *args):
    with futures.ThreadPoolExecutor(1) as thread:  # jax.set_mesh is per thread
      return thread.submit(function, *args).result()

  def _keep_best(self, step, params, values):
    by = self._fields['best']
    if not by or by not in values:
      return
    value = values[by]['mean']
    try:
      before = load_snapshot(self._best_path).extra.get('best', {})
    except UserError:  # none yet
      before = {}
    if before.get('by') != by or sweep.is_better(by, value, before['value']):
      save_snapshot(self._best_path, params=params, config=self._plain, step=step,
                    extra={'best': {'by': by, 'value': value, 'step': step}})


def _last_measured(workdir, *, most: int) -> int:
  """The last step up to `most` with measurements in the run's log; 0 without any."""
  lines = files.read_json_lines(os.path.join(workdir, METRICS), having='"evaluate_ema/')
  return max((line['step'] for line in lines if line['step'] <= most), default=0)
