"""The Frechet distance against scipy's matrix root, and musicnn, VGGish and CLAP against their references' outputs."""

import json

import dump_torch_embeddings as reference
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.linalg
from test_layering import ROOT

from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation.embedders import clap, embeddings, musicnn, vggish
from m2l2.evaluation.metrics import frechet, pairs


def normal(n, d, seed, scale=1.):
  rng = np.random.default_rng(seed)
  return scale * rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


def slow_distance(a, b):
  mean = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
  cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  return mean + np.trace(cov_a + cov_b) - 2 * np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real


@pytest.mark.parametrize('n, m, d', [(300, 500, 40), (60, 45, 40), (2000, 100, 8)])
def test_frechet_distance_equals_the_matrix_root(n, m, d):
  a, b = normal(n, d, 0), normal(m, d, 1, scale=1.5)
  assert frechet.frechet_distance(a, b) == pytest.approx(slow_distance(a, b), rel=1e-8)


def test_frechet_distance_with_fewer_windows_than_numbers():
  # The covariances are singular; where both live in the first 12 of 50 numbers, the rest cannot matter.
  a, b = normal(9, 12, 0), normal(11, 12, 1)
  inside = frechet.frechet_distance(a, b)
  rng = np.random.default_rng(2)
  basis = np.linalg.qr(rng.standard_normal((50, 50)))[0][:12]
  assert frechet.frechet_distance(a @ basis, b @ basis) == pytest.approx(inside, rel=1e-9)
  # In one dimension it is known: (difference of means)^2 + (difference of deviations)^2.
  x, y = rng.standard_normal((7, 1)), 3 + 2 * rng.standard_normal((5, 1))
  known = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
  assert frechet.frechet_distance(x, y) == pytest.approx(known, rel=1e-9)


@pytest.mark.parametrize('n, most', [(1000, 1e-6), (30, 1e-3)])
def test_equal_sets_are_at_no_distance(n, most):
  a = normal(n, 200, 0).astype(np.float32)
  assert 0 <= frechet.frechet_distance(a, a.copy()) <= most


def test_bootstrap_draws_the_same_clips_on_both_sides():
  clips = [normal(5, 6, seed) for seed in range(12)]
  shifted = [clip + [3., 0, 0, 0, 0, 0] for clip in clips]
  assert frechet.bootstrap_sd(clips, clips) == pytest.approx(0, abs=1e-6)
  assert frechet.bootstrap_sd(clips, shifted) == pytest.approx(0, abs=1e-6)  # 9 for every draw
  others = [normal(5, 6, seed + 50) for seed in range(12)]
  spread = frechet.bootstrap_sd(clips, others)
  assert spread > .1 and spread == frechet.bootstrap_sd(clips, others)
  assert frechet.bootstrap_sd(clips[:1], others[:1]) is None


def test_a_paired_difference_is_surer_than_its_two_sides():
  clips = [normal(5, 6, seed) * (1 + seed % 4) for seed in range(12)]  # some clips are harder than others
  near = [clip * 1.5 for clip in clips]
  far = [clip * 1.6 for clip in clips]
  joined = [np.concatenate(side) for side in (far, near, clips)]
  difference = frechet.paired_difference(far, near, clips)
  assert difference['mean'] == pytest.approx(
      frechet.frechet_distance(joined[0], joined[2]) - frechet.frechet_distance(joined[1], joined[2]))
  assert 0 < difference['low'] < difference['mean'] < difference['high']
  apart = np.hypot(*(frechet.bootstrap_sd(side, clips) for side in (far, near)))
  assert difference['high'] - difference['low'] < 2 * apart  # 95 % of the difference; two sides apart: 3.9 deviations
  assert frechet.paired_difference(near, far, clips)['high'] < 0
  same = frechet.paired_difference(near, near, clips)
  assert same['low'] == same['high'] == 0
  with pytest.raises(UserError, match='12, 12 and 11 clips'):
    frechet.paired_difference(far, near, clips[:11])


@pytest.mark.parametrize('a, b, message', [
    (np.ones((1, 3)), np.ones((5, 3)), 'two or more embeddings'),
    (np.ones((5, 3)), np.ones((5, 4)), 'of 3 and of 4'),
    (np.full((5, 3), np.nan), np.ones((5, 3)), 'NaN'),
])
def test_what_has_no_distance_is_refused(a, b, message):
  with pytest.raises(UserError, match=message):
    frechet.frechet_distance(a, b)


# ---- networks ------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def clip():
  return audio_io.read(reference.CLIP)


@pytest.mark.parametrize('name', musicnn.NAMES)
def test_musicnn_equals_tensorflows_graph(name):
  with np.load(ROOT / 'tests' / 'goldens' / 'musicnn.npz') as golden:
    clips, expected = list(golden['clips']), golden[f'{name}_penultimate']
  ours = []
  for file in clips:
    audio, rate = audio_io.read(ROOT / 'm2l2' / 'assets' / 'clips' / f'{file}.ogg')
    ours.append(musicnn.embed(audio, sample_rate=rate, name=name))
  assert len(clips) == 5 and all(windows.shape == (4, 200) for windows in ours)
  np.testing.assert_allclose(np.concatenate(ours), expected, atol=1e-4)


def test_musicnn_windows_are_their_own(clip):
  """Neither the other windows of a batch nor the padding of the last one show."""
  audio, rate = clip
  frames = musicnn.log_mel(audio, sample_rate=rate)
  assert frames.shape == (376, 96)  # 1 + 96000 // 256
  start = 2 * musicnn.WINDOW_HOP
  alone = musicnn.penultimate(musicnn.weights('mtt'), frames[None, start:start + musicnn.WINDOW_FRAMES])
  np.testing.assert_allclose(alone[0], musicnn.embed(audio, sample_rate=rate, name='mtt')[2], atol=1e-5)
  with pytest.raises(UserError, match='3.0 s or more'):
    musicnn.embed(audio[:, :2 * rate], sample_rate=rate, name='mtt')
  with pytest.raises(UserError, match="no musicnn called 'big'"):
    musicnn.embed(audio, sample_rate=rate, name='big')


@pytest.fixture(scope='module')
def torch_golden():
  with np.load(ROOT / 'tests' / 'goldens' / 'torch_embeddings.npz') as golden:
    shapes = {name: {key: tuple(shape) for key, shape in json.loads(str(golden[f'{name}_shapes'])).items()}
              for name in ('vggish', 'clap')}
    return {name: (shapes[name], golden[name]) for name in shapes}


def on_device(weights):
  return {name: jnp.asarray(values) for name, values in weights.items()}


def test_vggish_equals_torchvggish_on_made_up_weights(torch_golden, clip):
  shapes, expected = torch_golden['vggish']
  assert shapes == vggish.SHAPES
  audio, rate = clip
  ours = vggish.embed(on_device(reference.made_weights(shapes)), audio, sample_rate=rate)
  assert ours.shape == (6, 128)
  np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.soak
def test_clap_equals_laion_clap_on_made_up_weights(torch_golden, clip):
  shapes, expected = torch_golden['clap']
  assert shapes == clap.shapes()
  audio = pairs.prepared(clip[0], sample_rate=clip[1], to_rate=48000, what='clip').astype(np.float32)
  audio = np.pad(audio, (0, clap.SAMPLES - len(audio)))
  weights = on_device(reference.made_weights(shapes))
  ours = clap.embed(weights, audio, sample_rate=48000)
  assert ours.shape == (1, 512)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_ten_seconds_are_cropped_or_repeated():
  time = np.arange(15 * 48000, dtype=np.float32) / 1e6
  np.testing.assert_array_equal(clap.ten_seconds(time, sample_rate=48000), time[2 * 48000 + 24000:12 * 48000 + 24000])
  short = clap.ten_seconds(time[:200000] + 1, sample_rate=48000)
  np.testing.assert_array_equal(short[200000:400000], short[:200000])
  assert short.shape == (480000,) and short[:400000].all() and not short[400000:].any()


def test_weights_of_clap_are_told_from_others(tmp_path):
  weights = {name: np.zeros(shape, np.float32) for name, shape in clap.shapes().items()}
  file = tmp_path / 'clap.safetensors'

  def save(tensors):
    safetensors.numpy.save_file(tensors, file)
    return file
  more = {**weights, 'text_branch.x': np.zeros(3)}
  read = clap.load(save({f'module.{name}': tensor for name, tensor in more.items()}))
  assert set(read) == set(weights)
  with pytest.raises(UserError, match='with fusion'):
    clap.load(save({**weights, 'audio_branch.patch_embed.fusion_model.x': np.zeros(3)}))
  with pytest.raises(UserError, match=r'bn0.bias is \[3\], and in LAION-CLAP it is \[64\]'):
    clap.load(save({**weights, 'audio_branch.bn0.bias': np.zeros(3)}))
  with pytest.raises(UserError, match='holds no tensor audio_projection.0.bias'):
    clap.load(save({name: tensor for name, tensor in weights.items() if name != 'audio_projection.0.bias'}))
  with pytest.raises(UserError, match='holds no tensor features'):
    embeddings.make_embedder('vggish', save(weights))
  base = clap.shapes(width=128, depths=(2, 2, 12, 2))
  small = {name: np.zeros(shape, np.float16) for name, shape in base.items()}
  assert clap.load(save(small))['audio_branch.norm.weight'].shape == (1024,)


def test_embeddings_by_name(tmp_path):
  with pytest.raises(UserError, match="called 'inception'"):
    embeddings.make_embedder('inception')
  with pytest.raises(UserError, match='--clap=FILE'):
    embeddings.make_embedder('clap')
  with pytest.raises(UserError, match='no such file .*vggish-10086976.pth'):
    embeddings.make_embedder('vggish', tmp_path / 'none.pth')
