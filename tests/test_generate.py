"""The generator of latents (m2l2/examples): what it learns of a corpus whose pieces are known, and mistakes."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from m2l2 import files, sharding
from m2l2.codec.snapshot import save_snapshot
from m2l2.data import latents, storage
from m2l2.errors import UserError
from m2l2.examples import __main__ as commands
from m2l2.examples import generate
from m2l2.training import checkpoint

K, D = 2, 3
LEVELS = {'low': -0.5, 'high': 0.5}
SMALL = generate.Recipe(window=4, dim=16, layers=1, heads=2, cond_dim=16, steps=4, batch_size=8, warmup_steps=1,
                        ema_decay=0.9, checkpoint_every=2, log_every=1)


def write_corpus(folder, *, dtype='float16', pieces=4, chunks=6):
  """Latents as `m2l2 encode-dataset` writes them: each piece stays near the level of its class, the folder it is in."""
  folder.mkdir()
  shape = (K, D) if dtype != 'int32' else (K,)
  features, rng = latents.features(shape=shape, dtype=dtype), np.random.default_rng(0)
  path, sizes = folder / 'latents-train.array_record-00000-of-00001', []
  with storage.ShardWriter(path) as writer:
    for name, level in LEVELS.items():
      for number in range(pieces):
        z = (level + 0.02 * rng.standard_normal((1, chunks, *shape))).astype(latents.DTYPES[dtype])
        writer.write(storage.serialise(features, dict(
            z=z, source=f'{name}/{number}.wav', rate=8000, channels=1, streams=1, chunks=chunks, num_samples=chunks,
            offset=0, starts=chunks)))
        sizes.append([1, chunks])
  np.save(folder / latents.index_name('train'), np.int32(sizes))
  files.write_json(folder / latents.MANIFEST, {'format': latents.FORMAT, 'version': latents.VERSION, 'model': 'm'})
  storage.write_metadata(folder, name=latents.NAME, features=features, description='made here',
                         splits={'train': [len(sizes)]}, num_bytes={'train': path.stat().st_size})
  return folder


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Eight in one process would take turns."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    yield


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp('corpus') / 'latents')


LONGER = dataclasses.replace(SMALL, steps=150, batch_size=16, learning_rate=1e-2, checkpoint_every=50)


@pytest.fixture(scope='module')
def learned(corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('learned')
  assert generate.train(corpus, workdir, LONGER) == LONGER.steps
  return workdir


def test_it_learns_classes_and_goes_on_in_the_piece(learned):
  generator = generate.load(learned)
  assert generator.classes == ('high', 'low') and generator.shape == (K, D) and generator.codec == 'm'
  for name, level in LEVELS.items():
    sampled = generator.sample(6, count=32, label=name, seed=3)  # beyond a window
    assert sampled.shape == (32, 6, K, D) and sampled.dtype == np.float32
    assert np.abs(sampled.mean(axis=(1, 2, 3)) - level).max() < 0.4
    prefix = np.full((2, K, D), level)
    assert np.abs(generator.sample(2, count=32, prefix=prefix).mean(axis=(1, 2, 3)) - level).max() < 0.4
  levels = generator.sample(4, count=32, seed=1).mean(axis=(1, 2, 3))
  assert 4 <= np.sum(levels > 0) <= 28 and np.abs(np.abs(levels) - 0.5).mean() < 0.2  # either, not what lies between


def test_a_stream_is_the_sample_and_a_gap_is_filled(learned):
  generator = generate.load(learned)
  whole = generator.sample(7, seed=5, label='low')[0]
  np.testing.assert_allclose([z for z, _ in zip(generator.stream(seed=5, label='low'), range(7))], whole, atol=1e-6)
  assert np.any(generator.sample(7, seed=6, label='low')[0] != whole)
  piece = np.full((7, K, D), 0.5, np.float32)
  piece[3] = 0
  filled = generator.fill(piece, 3, 4)
  np.testing.assert_array_equal(np.delete(filled, 3, axis=0), np.delete(piece, 3, axis=0))
  assert filled[3].mean() > 0.2
  for start, stop in ((3, 3), (2, 8), (1, 4)):
    with pytest.raises(UserError, match='cannot be filled'):
      generator.fill(piece, start, stop)


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(corpus, learned, tmp_path, monkeypatch):
  for stop in (3, 20):
    monkeypatch.setattr(checkpoint.StopSignal, 'reached', lambda self, step, stop=stop: step == stop)
    assert generate.train(corpus, tmp_path, LONGER) == stop
  whole, parts = ([json.loads(line)['loss'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]
                  for folder in (learned, tmp_path))
  assert parts == whole[:20] and len(set(parts)) == 20


def test_sampling_follows_the_lines_to_what_is_estimated():
  """Where the estimate is known: of one clean window, whatever x_t, that window; given chunks stay."""
  class Known(generate.Flow):
    def estimate(self, params, x, given, t, label):
      return (label[:, None, None] == 0) * params

  clean, label = np.arange(12, dtype=np.float32).reshape(1, 4, 3), np.int32([0, 0])
  known, given = np.full((2, 4, 3), 7, np.float32), np.zeros((2, 4), bool)
  given[1, 2] = True
  got = Known(SMALL, 3, ('one',)).sample(clean, jax.random.key(0), known, given, label, 1.0, steps=5)
  np.testing.assert_allclose(got[0], clean[0], rtol=1e-5)
  np.testing.assert_allclose(got[1], np.where(given[1][:, None], 7, clean[0]), rtol=1e-5)
  beyond = Known(SMALL, 3, ('one',)).sample(clean, jax.random.key(0), known, given, label, 2.0, steps=5)
  np.testing.assert_allclose(beyond[0], 2 * clean[0], rtol=1e-5)  # untold it is 0


def test_temperature_scales_the_noise_that_sampling_begins_with():
  class Still(generate.Flow):
    def estimate(self, params, x, given, t, label):
      return x

  run = lambda temperature: Still(SMALL, 3, ()).sample(
      None, jax.random.key(0), np.zeros((1, 4, 3), np.float32), np.zeros((1, 4), bool), np.int32([0]), 1.0, temperature,
      steps=5)
  np.testing.assert_allclose(run(0.5), run(1.0) / 2, rtol=1e-5)
  assert np.std(run(1.0)) > 0.5


def test_what_is_drawn_leaves_something_to_learn():
  flow = generate.Flow(SMALL, K * D, ())
  draw = jax.jit(jax.vmap(lambda key: flow.draw(key, shape=(4, K * D))))
  t, noise, given, untold = draw(jax.random.split(jax.random.key(0), 500))
  assert 0 < t.min() and t.max() < 1 and noise.shape == (500, 4, K * D)
  assert not given.all(axis=1).any()
  kinds = {tuple(row) for row in np.asarray(given).tolist()}
  assert {(False,) * 4, (True, False, False, False), (True, True, True, False), (True, False, True, True)} <= kinds
  assert 0.05 < untold.mean() < 0.15


def test_mistakes_are_told(corpus, learned, tmp_path, capsys):
  generator = generate.load(learned)
  with pytest.raises(UserError, match="no class 'middle', but high, low"):
    generator.sample(2, label='middle')
  with pytest.raises(UserError, match='a prefix must be'):
    generator.sample(2, prefix=np.zeros((2, D, K)))
  tokens = write_corpus(tmp_path / 'tokens', dtype='int32')
  save_snapshot(tmp_path / 'other', params={'w': np.zeros(1)}, config={'model': {}}, step=1)
  out = str(tmp_path / 'a.wav')
  for line, argv in (
      ('holds tokens', ['train', str(tokens), f'--workdir={tmp_path / "run"}']),
      ('there are no latents there', ['train', str(tmp_path), f'--workdir={tmp_path / "run"}']),
      ('--heads=3 must divide', ['train', str(corpus), f'--workdir={tmp_path / "run"}', '--heads=3']),
      ('no record is as long', ['train', str(corpus), f'--workdir={tmp_path / "run"}', '--window=99']),
      ('makes no latents', ['sample', out, f'--workdir={tmp_path / "other"}', '--checkpoint=tiny']),
      ('makes latents of model m', ['sample', out, f'--workdir={learned}', '--checkpoint=tiny'])):
    assert commands.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith('generate: ') and line in error and error.count('\n') == 1
  assert not (tmp_path / 'a.wav').exists()
