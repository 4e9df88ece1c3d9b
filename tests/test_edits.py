"""Mixing and taking apart latents, and pictures of them."""

import dataclasses
import json

import numpy as np
import pytest

from m2l2 import Latents
from m2l2.errors import UserError
from m2l2.evaluation.metrics.pairs import log_mel_db
from m2l2.evaluation.reports import pictures
from m2l2.evaluation.studies import edits

RATE = 44100


def latents(chunks=3, seed=0, **fields):
  z = np.random.default_rng(seed).uniform(-1, 1, (2, chunks, 4, 5)).astype(np.float32)
  return Latents(**{**dict(z=z, sample_rate=RATE, num_samples=1000 * chunks, channels=2, model='m'), **fields})


class Tones:
  """A codec whose embedding k is the loudness of a sine of its own, in every chunk of 2000 samples."""
  hz = (200, 800, 3000, 9000)

  def decode(self, latents, seed, *, refine):
    assert seed == 7 and refine is False
    loud = np.repeat(np.abs(latents.z[:, :, :, 0]), 2000, axis=1)  # [streams, samples, K]
    time = np.arange(loud.shape[1]) / RATE
    return np.einsum('snk,nk->sn', loud, np.sin(2 * np.pi * np.outer(time, self.hz))).astype(np.float32) / 8


def test_interpolation_ends_at_both_and_is_straight():
  first, second = latents(3), latents(5, seed=1)
  ends = [edits.interpolate(first, second, weight) for weight in (0, 0.25, 1)]
  np.testing.assert_array_equal(ends[0].z, first.z)
  np.testing.assert_array_equal(ends[2].z, second.z[:, :3])
  np.testing.assert_allclose(ends[1].z, 0.75 * first.z + 0.25 * second.z[:, :3], rtol=1e-6)
  for end in ends:
    assert end.z.dtype == np.float32 and end.num_samples == 3000 and end.model == 'm'


def test_swap_exchanges_the_named_embeddings_and_twice_is_nothing():
  first, second = latents(), latents(seed=1)
  swapped, two = edits.swap(first, second, [0, 2])
  np.testing.assert_array_equal(swapped.z[:, :, [0, 2]], second.z[:, :, [0, 2]])
  np.testing.assert_array_equal(swapped.z[:, :, [1, 3]], first.z[:, :, [1, 3]])
  for again, before in zip(edits.swap(swapped, two, range(0, 4, 2)), (first, second), strict=True):
    np.testing.assert_array_equal(again.z, before.z)


def test_without_touches_only_the_named_and_not_its_argument():
  whole = latents()
  kept = whole.z.copy()
  zero, mean = (edits.without(whole, [1], fill=fill).z for fill in ('zero', 'mean'))
  np.testing.assert_array_equal(whole.z, kept)
  assert not zero[:, :, 1].any()
  np.testing.assert_allclose(mean[:, :, 1], np.broadcast_to(kept[:, :, 1].mean(axis=1, keepdims=True), (2, 3, 5)))
  for z in (zero, mean):
    np.testing.assert_array_equal(z[:, :, [0, 2, 3]], kept[:, :, [0, 2, 3]])


def test_carried_finds_the_band_of_each_embedding():
  whole = latents(4)
  whole.z[:, :, 3] = 0  # this one carries nothing
  change = edits.carried(Tones(), whole, seed=7)
  assert change.shape == (4, 128, 1 + 8000 // 512)
  loss = -change.mean(axis=2)
  assert not change[3].any()
  peaks = loss[:3].argmax(axis=1)
  assert list(peaks) == sorted(set(peaks)) and (loss[:3].max(axis=1) > 20).all()
  for k, band in enumerate(peaks):  # what the others lose there is little
    assert loss[k, band] > 5 * np.delete(loss[:, band], k).max()


@pytest.mark.parametrize('call, message', [
    (lambda a: edits.interpolate(a, a, 1.5), 'weight is 1.5'),
    (lambda a: edits.interpolate(a, dataclasses.replace(a, model='n'), 0.5), 'model is m and n'),
    (lambda a: edits.swap(a, dataclasses.replace(a, sample_rate=48000), [0]), 'sample rate is 44100 and 48000'),
    (lambda a: edits.swap(a, dataclasses.replace(a, channels=1), [0]), 'channels is 2 and 1'),
    (lambda a: edits.swap(a, a, [4]), 'no embedding 4: these latents have 0..3'),
    (lambda a: edits.without(a, [-1]), 'no embedding -1'),
    (lambda a: edits.without(a, [0], fill='one'), "fill 'one' is not known"),
    (lambda a: edits.without(dataclasses.replace(a, z=np.zeros((2, 3, 4), np.int32)), [0]), 'are tokens'),
])
def test_mistakes_are_told(call, message):
  with pytest.raises(UserError, match=message):
    call(latents())


def test_pictures_show_their_arguments(tmp_path):
  audio = np.random.default_rng(0).uniform(-1, 1, (2, 4410)).astype(np.float32)
  figure = pictures.spectrograms({'one': (audio, RATE), 'two': (audio, RATE)})
  assert [axis.get_title() for axis in figure.axes] == ['one', 'two']
  assert figure.axes[0].get_xlim() == pytest.approx((0, 0.1))
  named = {label.get_text(): label.get_position()[1] for label in figure.axes[0].get_yticklabels()}
  tone = np.sin(2 * np.pi * 1000 * np.arange(4410) / 44100)  # its name stands at the row that it lights
  row = int(log_mel_db(tone, sample_rate=44100)[:, 4].argmax())
  assert row <= named['1,000'] <= row + 1 and figure.axes[0].get_ylim()[1] <= 128
  pictures.save(figure, tmp_path / 'a.png')
  assert [path.name for path in tmp_path.iterdir()] == ['a.png']
  z = latents()
  shown = pictures.latent_map(z).axes[0].images[0].get_array()
  np.testing.assert_array_equal(shown, z.z[0].reshape(3, 20).T)
  tokens = dataclasses.replace(z, z=np.arange(24, dtype=np.int32).reshape(2, 3, 4))
  np.testing.assert_array_equal(pictures.latent_map(tokens, stream=1).axes[0].images[0].get_array(), tokens.z[1].T)
  change = np.random.default_rng(0).normal(size=(4, 128, 9))
  panels = pictures.change_map(change, seconds=2.0).axes
  np.testing.assert_allclose(panels[0].images[0].get_array(), np.abs(change).mean(axis=2))
  np.testing.assert_allclose(panels[1].images[0].get_array(), np.abs(change).mean(axis=1))


def test_curves_leave_out_what_is_missing_or_half_written(tmp_path):
  lines = [{'step': 1, 'loss': 3.0}, {'step': 2, 'loss': None, 'probe_ema/swap': 0.5}, {'step': 3, 'loss': 1.0}]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + '{"step": 4, "lo')
  loss, swap = pictures.curves(tmp_path, names=['loss', 'probe_ema/swap']).axes
  np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[1, 3], [3, 1]])
  np.testing.assert_array_equal(swap.lines[0].get_xydata(), [[2, 0.5]])
  with pytest.raises(UserError, match='no metrics.jsonl there'):
    pictures.curves(tmp_path / 'nowhere')


def test_a_gap_lies_on_the_line_between_its_neighbours():
  whole = latents(5)
  kept = whole.z.copy()
  filled = edits.inpaint(whole, 1, 3).z
  np.testing.assert_allclose(filled[:, 1], (2 * kept[:, 0] + kept[:, 3]) / 3, rtol=1e-5)
  np.testing.assert_allclose(filled[:, 2], (kept[:, 0] + 2 * kept[:, 3]) / 3, rtol=1e-5)
  np.testing.assert_array_equal(filled[:, [0, 3, 4]], kept[:, [0, 3, 4]])
  np.testing.assert_array_equal(whole.z, kept)
  np.testing.assert_allclose(edits.inpaint(whole, 3, 5).z[:, 3:], np.stack([kept[:, 2]] * 2, axis=1), rtol=1e-6)
  np.testing.assert_allclose(edits.inpaint(whole, 0, 1).z[:, 0], kept[:, 1], rtol=1e-6)
  assert not edits.inpaint(whole, 1, 3, fill='zero').z[:, 1:3].any()
  for start, stop in ((2, 2), (4, 6), (0, 5)):
    with pytest.raises(UserError, match='cannot be made up'):
      edits.inpaint(whole, start, stop)
  with pytest.raises(UserError, match='fill'):
    edits.inpaint(whole, 1, 2, fill='mean')
