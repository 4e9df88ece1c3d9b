"""Writers, the cut on resume and the guard."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from m2l2 import files
from m2l2.errors import UserError
from m2l2.training import metrics


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_holds_float32_digit_for_digit_and_null_for_the_rest(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  values = np.random.default_rng(0).normal(size=50).astype(np.float32) * 10.0**np.arange(-25, 25)
  values = values.astype(np.float32)
  writer = metrics.JsonlWriter(path, resume_step=0)
  for step, value in enumerate(values, start=1):
    writer.write(
      step, {'loss': jnp.float32(value), 'n': np.int32(3), 'bad': np.nan, 'inf': -np.inf})
  assert len(_lines(path)) == 50   # flushed before close
  writer.close()
  np.testing.assert_array_equal(np.array([x['loss'] for x in _lines(path)], np.float32), values)
  assert _lines(path)[0] == {
    'step': 1, 'loss': float(str(values[0])), 'n': 3, 'bad': None, 'inf': None}


def test_float32_is_written_as_its_shortest_decimal(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  writer = metrics.JsonlWriter(path, resume_step=0)
  writer.write(1, {'loss': np.float32(0.1)})
  writer.close()
  assert path.read_text() == '{"step": 1, "loss": 0.1}\n'


def test_resume_cuts_back_to_the_restored_step_and_drops_the_torn_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n'
                  '{"step": 1, "lo')
  writer = metrics.JsonlWriter(path, resume_step=2)
  writer.write(3, {'loss': 1.5})
  writer.close()
  assert _lines(path) == [
    {'step': 1, 'loss': 3.0}, {'step': 2, 'loss': 2.0}, {'step': 3, 'loss': 1.5}]
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_on_a_full_disk_nothing_half_written_is_left(tmp_path, monkeypatch):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')

  def full(*unused):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('os.replace', full)
  for write in (lambda: files.write_json(tmp_path / 'config.json', {}),
                lambda: metrics.cut_back(tmp_path / 'metrics.jsonl', step=0)):
    with pytest.raises(UserError, match='No space .*make room'):
      write()
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('metrics.jsonl', '{"step": 1}\n')]


def test_a_torn_line_that_parses_is_dropped_too(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}')
  metrics.JsonlWriter(path, resume_step=2).close()
  assert _lines(path) == [{'step': 1, 'loss': 3.0}]


def test_console_shows_the_headline_only():
  lines = []
  original, metrics.logging.info = metrics.logging.info, lines.append
  try:
    metrics.ConsoleWriter(total_steps=1000).write(
      100, {'step_size': 0.1, 'loss': 12.3456, 'skipped': 0.0, 'time/steps_per_second': 0.25})
  finally:
    metrics.logging.info = original
  assert lines == ['step 100/1000  loss 12.35  0.25 steps/s  1h00m left']


def test_without_the_extra_there_is_no_tensorboard(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'clu.metric_writers', None)   # import raises ImportError
  assert metrics.tensorboard_writer(tmp_path) is None
  writers = metrics.make_writers(tmp_path, resume_step=0, total_steps=1)
  assert not writers.shows_media
  writers.close()


def test_with_the_extra_scalars_sounds_and_pictures_reach_clu(tmp_path, monkeypatch):
  calls = []

  class SummaryWriter:  # the three methods of clu's own class that are used

    def __init__(self, logdir):
      calls.append(('open', logdir))

    def write_scalars(self, step, scalars):
      calls.append(('scalars', step, scalars))

    def write_audios(self, step, audios, *, sample_rate):
      calls.append(('audios', step, {k: v.shape for k, v in audios.items()}, sample_rate))

    def write_images(self, step, images):
      calls.append(('images', step, {k: v.shape for k, v in images.items()}))

    def flush(self):
      pass

    def close(self):
      calls.append(('close',))

  fake = types.ModuleType('clu.metric_writers')
  fake.SummaryWriter = SummaryWriter
  monkeypatch.setitem(sys.modules, 'clu.metric_writers', fake)
  monkeypatch.setattr('clu.metric_writers', fake, raising=False)
  writers = metrics.make_writers(tmp_path, resume_step=0, total_steps=5)
  assert writers.shows_media
  writers.write(2, {'loss': jnp.float32(1.5)})
  writers.write_audio(2, {'original': np.zeros((2, 4096), np.float32)}, sample_rate=44100)
  writers.close()
  assert calls == [
    ('open', str(tmp_path / 'tensorboard')),
    ('scalars', 2, {'loss': 1.5}),
    ('audios', 2, {'original': (1, 4096, 2)}, 44100),
    ('images', 2, {'original': (1, 513, 13, 1)}),
    ('close',)]


def test_other_writers_get_plain_floats_and_one_that_fails_is_left_out(tmp_path, monkeypatch):
  said, got = [], []
  monkeypatch.setattr(metrics.logging, 'warning', lambda text, *args: said.append(text % args))
  monkeypatch.setattr(metrics, 'tensorboard_writer', lambda logdir: None)

  class Whole:
    closed = 0

    def write(self, step, scalars):
      got.append((step, scalars))

    def close(self):
      self.closed += 1

  def broken(step, scalars):
    got.append('broken')
    raise RuntimeError('no network')

  whole = Whole()
  writers = metrics.make_writers(
    tmp_path, resume_step=0, total_steps=3, others=[broken, whole, lambda step, scalars: got.append(step)])
  for step in (1, 2):
    writers.write(step, {'loss': np.float32(1.5)})
  writers.close()
  assert got == ['broken', (1, {'loss': 1.5}), 1, (2, {'loss': 1.5}), 2] and type(got[1][1]['loss']) is float
  assert said == ["the writer broken failed and is left out from here on: RuntimeError('no network')"]
  assert whole.closed == 1 and len(_lines(tmp_path / 'metrics.jsonl')) == 2


def test_spectrogram_of_a_tone_peaks_at_its_bin_and_silence_is_even():
  n = np.arange(8192)
  picture = metrics.spectrogram(np.sin(2 * np.pi * 100 / 1024 * n)[None])
  assert picture.shape == (513, 29) and picture.min() >= 0 and picture.max() == 1
  assert set(np.argmax(picture, axis=0)) == {512 - 100}
  assert np.ptp(metrics.spectrogram(np.zeros((1, 10)))) == 0


def test_guard_stops_with_the_range_of_steps():
  metrics.check_skipped(20, {'skipped_in_a_row': 4.0, 'loss': np.nan}, limit=5)
  with pytest.raises(UserError, match='steps 16 to 20') as error:
    metrics.check_skipped(20, {'skipped_in_a_row': 5.0, 'loss': np.nan}, limit=5)
  assert '\n' not in str(error.value)


def test_the_scale_of_the_latents_is_the_last_probes(tmp_path):
  assert metrics.latent_scale(tmp_path, step=9) == {}
  lines = [{'step': 1, 'loss': 2.}, {'step': 2, 'probe_ema/latent/mean': .5, 'probe_ema/latent/std': .25},
           {'step': 3, 'probe_ema/latent/mean': .1, 'probe_ema/latent/std': .2}, {'step': 4, 'loss': 1.}]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (tmp_path / 'metrics.jsonl').write_text(text + '{"step": 5, "probe_ema/latent/mean": 0.')  # being written
  for step, expected in ((9, {'mean': .1, 'std': .2}), (3, {'mean': .1, 'std': .2}), (2, {'mean': .5, 'std': .25})):
    assert metrics.latent_scale(tmp_path, step=step) == {'latents': expected}
  assert metrics.latent_scale(tmp_path, step=1) == {}
  (tmp_path / 'metrics.jsonl').write_text('{"step": 2, "probe_ema/latent/mean": null, "probe_ema/latent/std": 1.0}\n')
  assert metrics.latent_scale(tmp_path, step=9) == {}
