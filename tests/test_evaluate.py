"""`m2l2 evaluate` end to end, and each mix-up found and named."""

import base64
import csv
import io
import json
import os
import re
import shutil
import sys
import types

import numpy as np
import pytest
import soundfile
import soxr
from test_codec import load_once, make_snapshot
from test_layering import ROOT

from m2l2 import cli
from m2l2.codec import codec
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation import evaluate
from m2l2.evaluation.metrics import checks, pairs, registry, seams, stereo, visqol
from m2l2.evaluation.reports import report
from m2l2.evaluation.studies import sweep
from m2l2.representation import Representation

CLIPS = ROOT / 'm2l2' / 'assets' / 'clips' / 'train'
RATE = 44100
QUICK = ('si_sdr', 'mel_l1_db', 'lsd_db')


@pytest.fixture(scope='module')
def music():
  """Two clips, float32 [2, 4 s]."""
  names = ('obsidian-shell-ezer-ev', 'marino-main-theme')
  return [audio_io.read(CLIPS / f'{name}.ogg', frames=4 * RATE)[0] for name in names]


def noisy(audio, amount=.5, seed=0):
  noise = np.random.default_rng(seed).standard_normal(audio.shape)
  return (audio + amount * audio.std() * noise).astype(np.float32)


def late(audio, samples):
  return np.pad(audio, ((0, 0), (samples, 0)))[:, :audio.shape[1]]


def problems_of(reference, estimate, estimate_rate=RATE):
  estimate = np.ascontiguousarray(estimate, np.float32)
  return checks.check_pair(reference, estimate, reference_rate=RATE, estimate_rate=estimate_rate)


# ---- mix-ups -------------------------------------------------------------------------------------


@pytest.mark.parametrize('mix_up, expected', [
    (lambda x: late(x, 3), ['delay: the estimate is 3 samples at 44.1 kHz (0.07 ms) late']),
    (lambda x: np.pad(x[:, 1105:], ((0, 0), (0, 1105))),
     ['delay: the estimate is 1105 samples at 44.1 kHz (25.06 ms) early']),
    (lambda x: -x, ['polarity: the estimate is upside down (all samples negated)']),
    (lambda x: x * np.float32([[1], [-1]]), ['polarity: channel 2 of the estimate is upside down']),
    (lambda x: x[::-1], ['channels: left and right of the estimate are swapped']),
    (lambda x: -late(x[::-1], 7), ['delay: the estimate is 7 samples at 44.1 kHz (0.16 ms) late',
                                   'channels: left and right of the estimate are swapped and upside down']),
    (lambda x: x / 2, ['gain: the estimate is 6.0 dB softer than the reference']),
    (lambda x: x[:, :-100],
     ['length: the estimate is 100 samples (0.002 s) shorter than the reference; compared over what both have']),
    (lambda x: x[:1], ['channels: the reference has 2 channels, the estimate 1; stereo metrics are left out']),
    (lambda x: 0 * x, ['silence: the estimate is silent']),
    (lambda x: x, []),
])
def test_each_mix_up_is_named_and_nothing_else(music, mix_up, expected):
  for audio in music:
    assert problems_of(audio, mix_up(audio)) == expected
  if 'gain' not in str(expected) and 'length' not in str(expected):  # also of an estimate that is not a copy
    for audio in music:
      heard = [line for line in problems_of(audio, mix_up(noisy(audio))) if not line.startswith('gain')]
      assert heard == expected


def test_44100_taken_for_48000_is_named(music):
  for audio in music:
    fast, slow = soxr.resample(audio.T, 48000, RATE).T, soxr.resample(audio.T, RATE, 48000).T
    high, low = problems_of(audio, noisy(fast)), problems_of(audio, noisy(slow[:, :audio.shape[1]]))
    assert high[0] == 'rate: the lengths are as 44.1 to 48 kHz: one was taken for the other'
    assert any('44.1 kHz were played at 48 kHz' in line for line in high)
    assert any('48 kHz were played at 44.1 kHz' in line for line in low)
    assert problems_of(audio, slow, estimate_rate=48000) == [
        'rate: the reference is at 44100 Hz, the estimate at 48000 Hz; compared at 44100 Hz']


def test_other_music_is_no_mix_up(music):
  assert not [line for line in problems_of(music[0], music[1]) if not line.startswith('gain')]


# ---- seams and stereo ----------------------------------------------------------------------------


def test_seams_are_found_where_the_chunks_meet(music):
  period = 32768
  clicks = music[0].copy()
  rng = np.random.default_rng(0)
  for border in range(period, clicks.shape[1], period):
    clicks[:, border - 600:border + 600] += .1 * rng.standard_normal(1200).astype(np.float32)
  assert seams.seam_db(music[0], clicks, sample_rate=RATE) > 3
  shifted = seams.Chunks(first=period / 2)
  assert seams.seam_db(music[0], clicks, sample_rate=RATE, chunks=shifted) < -3
  assert abs(seams.seam_db(music[0], noisy(music[0], .01), sample_rate=RATE)) < 1
  with pytest.raises(UserError, match='no chunk border'):
    seams.seam_db(music[0][:, :20000], clicks[:, :20000], sample_rate=RATE)


def test_borders_of_a_model_lie_between_its_frames():
  chunks = seams.of_model(Representation(), rates=(RATE, 48000))
  # Frame j is centred on sample 512 j - 1536 + 1024; chunk 1 starts with frame 64.
  assert chunks.period == 32768
  assert chunks.first + chunks.period == (512 * 63 - 512 + 512 * 64 - 512) / 2
  for sample_rate, native in ((RATE, RATE), (48000, 48000), (22050, RATE)):  # at its own rate, if that is native
    assert chunks.in_seconds(sample_rate) == (32768 / native, chunks.first / native)


def test_stereo_metrics():
  rng = np.random.default_rng(0)
  mid, side = rng.standard_normal((2, 5000))
  audio = np.stack([mid + side / 10, mid - side / 10])
  expected = 10 * np.log10(np.sum(side ** 2) / np.sum(mid ** 2)) - 20
  assert stereo.side_mid_db(audio) == pytest.approx(expected)
  wider = np.stack([mid + side / 5, mid - side / 5])
  assert stereo.side_mid_error_db(audio, wider) == pytest.approx(20 * np.log10(2))
  assert stereo.side_mid_db(np.stack([mid, mid])) == -60
  noise = rng.standard_normal(5000)
  signals = pairs.Comparison(audio, np.stack([audio[0], audio[1] + noise]), RATE)
  assert stereo.si_sdr_left_of(signals) == 150
  assert stereo.si_sdr_right_of(signals) == pytest.approx(pairs.si_sdr(audio[1], audio[1] + noise))


@pytest.fixture
def forget_visqol():
  visqol._measure.cache_clear()
  yield
  visqol._measure.cache_clear()


def test_visqol_is_called_as_defined(music, monkeypatch, forget_visqol):
  class StandIn:
    def create(self, mode):
      assert mode == 'audio'

    def measure_from_arrays(self, reference, estimate, sample_rate):
      assert sample_rate == 48000 and reference.dtype == estimate.dtype == np.float64
      assert reference.shape == estimate.shape == (round(48000 * 40000 / RATE),)
      if len(np.unique(reference - estimate)) == 1:
        raise ValueError('too short')
      return types.SimpleNamespace(moslqo=np.float64(4.25))

  monkeypatch.setitem(sys.modules, 'visqol', types.SimpleNamespace(VisqolApi=StandIn))
  reference = music[0][:, :40000]
  assert visqol.visqol(reference, music[1], sample_rate=RATE) == 4.25
  with pytest.raises(UserError, match='visqol cannot measure this pair: too short'):
    visqol.visqol(reference, reference, sample_rate=RATE)
  with pytest.raises(UserError, match='one side is silent'):
    visqol.visqol(reference, 0 * reference, sample_rate=RATE)
  assert 'visqol' in evaluate.split_names(None)[0]


def test_without_visqol_the_rest_is_measured(monkeypatch, forget_visqol):
  monkeypatch.setitem(sys.modules, 'visqol', None)  # as if not installed
  assert evaluate.split_names(None, with_files=['clap']) == (
      [name for name in registry.METRICS if name != 'visqol'], ['musicnn_mtt', 'musicnn_msd', 'clap'])
  with pytest.raises(UserError, match=r"pip install 'm2l2\[visqol\]'"):
    evaluate.split_names('visqol')


@pytest.mark.visqol
def test_visqol_equals_the_package(music):
  from visqol import VisqolApi
  reference, estimate = music[0][:, :RATE], noisy(music[0][:, :RATE], .1)
  api = VisqolApi()
  api.create(mode='audio')
  r, x = (soxr.resample(audio.astype(np.float64).mean(axis=0), RATE, 48000, quality='HQ')
          for audio in (reference, estimate))
  expected = api.measure_from_arrays(r, x, 48000).moslqo
  assert 1 < expected < 5
  # The package gives the same pair other last digits at times (5e-15 seen between two calls).
  assert visqol.visqol(reference, estimate, sample_rate=RATE) == pytest.approx(expected, rel=1e-9)
  with pytest.raises(UserError, match='visqol cannot measure'):
    visqol.visqol(reference[:, :9000], estimate[:, :9000], sample_rate=RATE)


# ---- the report ----------------------------------------------------------------------------------


def write(path, audio, rate=RATE):
  path.parent.mkdir(parents=True, exist_ok=True)
  soundfile.write(path, audio.T, rate, subtype='FLOAT' if path.suffix == '.wav' else None)


@pytest.fixture
def folders(tmp_path, music):
  """reference/ and estimate/ with two good pairs, and one file of each sort that is trouble."""
  reference, estimate = tmp_path / 'reference', tmp_path / 'estimate'
  for name, audio in zip(('a', 'deep/b'), music):
    write(reference / f'{name}.flac', audio)
    write(estimate / f'{name}.wav', noisy(audio, .1))
  write(reference / 'lonely.wav', music[0])
  write(estimate / 'stranger.wav', music[0])
  write(reference / 'silent.wav', 0 * music[0])
  write(estimate / 'silent.wav', music[0])
  write(reference / 'broken.wav', music[0])
  (estimate / 'broken.wav').write_bytes(b'RIFF')
  return reference, estimate


def run(*args):
  return cli.main(['evaluate', *(str(arg) for arg in args)])


def test_the_command_writes_the_report(folders, tmp_path, capsys):
  reference, estimate = folders
  assert run(f'--reference={reference}', f'--estimate={estimate}', f'--output={tmp_path}/report.json',
             f'--csv={tmp_path}/report.csv', f'--html={tmp_path}/report.html', '--workers=2',
             '--metrics=musicnn_msd,lsd_db,si_sdr,side_mid_db') == 0
  results = json.loads((tmp_path / 'report.json').read_text())
  assert results['pairs'] == 3
  assert list(results['metrics']) == ['si_sdr', 'lsd_db', 'side_mid_db'] and list(results['frechet']) == ['musicnn_msd']
  si_sdr = results['metrics']['si_sdr']
  values = list(si_sdr['per_file'].values())
  assert list(si_sdr['per_file']) == ['a.flac', 'deep/b.flac']  # without the silent pair
  assert si_sdr['mean'] == pytest.approx(np.mean(values))
  assert si_sdr['sem'] == pytest.approx(np.std(values, ddof=1) / 2 ** .5)
  assert values == pytest.approx([20, 20], abs=3)
  distance = results['frechet']['musicnn_msd']
  assert distance['clips'] == 3 and distance['windows'] == 6 and distance['value'] > 0 and distance['bootstrap_sd'] >= 0
  text = '\n'.join(results['warnings'])
  for line in ('lonely.wav: partner: no estimate', 'stranger.wav: partner: an estimate without a reference',
               'broken.wav: unreadable:', 'silent.wav: silence: the reference is silent',
               'silent.wav: si_sdr is undefined', 'si_sdr: only 2 of 3 pairs have it'):
    assert line in text
  shown = capsys.readouterr().out
  assert 'frechet musicnn_msd' in shown and 'warning: lonely.wav' in shown
  rows = list(csv.DictReader((tmp_path / 'report.csv').open()))
  assert [row['file'] for row in rows] == ['a.flac', 'deep/b.flac', 'silent.wav'] and rows[2]['si_sdr'] == ''
  assert float(rows[1]['si_sdr']) == values[1]
  page = (tmp_path / 'report.html').read_text()
  assert page.count('data:audio/flac;base64,') == 4 and page.count('data:image/png;base64,') == 4
  assert 'http' not in page and 'lonely.wav: partner' in page and 'Over the files' not in page
  assert '<td>lsd_db</td><td>dB</td><td>lower is better</td>' in page
  assert '<td>frechet musicnn_msd</td><td></td><td>lower is better</td>' in page
  assert f'<dt>command</dt><dd>m2l2 evaluate --reference={reference} ' in page and '<dt>date</dt><dd>20' in page
  assert not list(tmp_path.glob('*.part'))


def test_other_reconstructions_stand_beside(folders, tmp_path, capsys, music):
  reference, estimate = folders
  for name, audio in (('a', music[0]), ('deep/b', music[1])):
    write(tmp_path / 'worse' / f'{name}.wav', noisy(audio, .5))
  args = (f'--reference={reference}', f'--estimate={estimate}', '--metrics=si_sdr,musicnn_msd', '--workers=1')
  assert run(*args, f'--beside=worse={tmp_path}/worse', '--players=1', f'--output={tmp_path}/report.json',
             f'--html={tmp_path}/report.html') == 0
  results = json.loads((tmp_path / 'report.json').read_text())
  worse = results['beside']['worse']
  assert results['pairs'] == 3 and worse['pairs'] == 2
  assert worse['metrics']['si_sdr']['mean'] < results['metrics']['si_sdr']['mean'] - 5
  assert any(line.startswith('worse: broken.wav: partner: no estimate') for line in results['warnings'])
  shown = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ['estimate', 'worse'] in shown
  (row,) = (line for line in shown if line[0] == 'si_sdr')
  means = [each['metrics']['si_sdr']['mean'] for each in (results, worse)]
  assert [row[1], row[4]] == [f'{mean:.4g}' for mean in means]
  (row,) = (line for line in shown if line[:2] == ['frechet', 'musicnn_msd'])
  assert row[-2:] == ['(n=2)', 'n=3']
  page = (tmp_path / 'report.html').read_text()
  assert page.count('data:audio/flac;base64,') == 3 == page.count('data:image/png;base64,')
  assert '<div>worse<br><audio' in page and '<th>worse</th>' in page
  # What cannot be read is told and has no player; the rest of the page is written.
  (tmp_path / 'worse' / 'a.wav').write_bytes(b'RIFF')
  assert run(*args[:2], '--metrics=musicnn_msd', '--workers=1', f'--beside=worse={tmp_path}/worse', '--players=2',
             '--small', f'--output={tmp_path}/report.json', f'--html={tmp_path}/report.html') == 0
  small = (tmp_path / 'report.html').read_text()
  assert small.count('data:audio/mpeg;base64,') == 2 + 3 == small.count('data:image/jpeg;base64,')
  assert len(small) < len(page) / 2
  assert 'warning: worse: a.flac: unreadable' in capsys.readouterr().out
  # A folder in which nothing can be measured is told of; the rest is written.
  (tmp_path / 'worse' / 'deep' / 'b.wav').write_bytes(b'RIFF')
  assert run(*args[:2], '--metrics=si_sdr', '--workers=1', f'--beside=worse={tmp_path}/worse',
             f'--output={tmp_path}/report.json') == 0
  assert 'beside' not in json.loads((tmp_path / 'report.json').read_text())
  assert 'warning: worse: left out: ' in capsys.readouterr().out
  for wrong in ('worse', '=x', 'reference=x', 'estimate=x'):
    assert run(*args, f'--beside={wrong}', f'--output={tmp_path}/r.json') == 1
    assert 'give NAME=DIR' in capsys.readouterr().err
  assert not (tmp_path / 'r.json').exists()


@pytest.mark.parametrize('rate, channels', [(96000, 2), (44100, 5)])
def test_a_small_page_holds_what_mp3_cannot_state(rate, channels):
  sound = report._sound(np.zeros((channels, rate // 10), np.float32), rate, small=True)
  data, heard = soundfile.read(io.BytesIO(base64.b64decode(sound.partition(',')[2])))
  assert (data.shape[1], heard) == (2, 48000)


def test_identical_folders(folders, tmp_path):
  reference, _ = folders
  shutil.rmtree(reference / 'deep')
  assert run(f'--reference={reference}/a.flac', f'--estimate={reference}/a.flac', f'--output={tmp_path}/report.json',
             '--metrics=si_sdr,mel_l1_db,mrstft,musicnn_mtt', '--quiet', '--workers=1') == 0
  results = json.loads((tmp_path / 'report.json').read_text())
  assert results['warnings'] == []
  assert results['metrics']['si_sdr']['mean'] > 100 and results['metrics']['si_sdr']['sem'] is None
  assert results['metrics']['mel_l1_db']['mean'] == results['metrics']['mrstft']['mean'] == 0
  distance = results['frechet']['musicnn_mtt']
  assert distance['value'] <= 1e-3 and distance['bootstrap_sd'] is None


def test_a_checkpoint_reconstructs_first(tmp_path, music, monkeypatch, capsys):
  monkeypatch.setattr(codec, 'load', load_once)
  reference = tmp_path / 'short'
  write(reference / 'a.flac', music[0][:, :RATE // 2])
  (reference / 'bad.wav').write_bytes(b'RIFF')
  make_snapshot(tmp_path / 'model')
  keep = tmp_path / 'kept'
  assert run(f'--reference={reference}', f'--checkpoint={tmp_path}/model', f'--estimate={keep}',
             f'--output={tmp_path}/report.json', '--metrics=mel_l1_db', '--seed=3', '--quiet') == 0
  results = json.loads((tmp_path / 'report.json').read_text())
  assert list(results['metrics']['mel_l1_db']['per_file']) == ['a.flac']
  assert results['warnings'][0].startswith('bad.wav: unreadable:')
  again = tmp_path / 'again.wav'
  assert cli.main(['reconstruct', str(reference / 'a.flac'), str(again), f'--checkpoint={tmp_path}/model',
                   '--seed=3', '--quiet']) == 0
  np.testing.assert_array_equal(audio_io.read(keep / 'a.wav')[0], audio_io.read(again)[0])

  # Nothing that is there already is replaced: an original never, a reconstruction only with --overwrite.
  (reference / 'bad.wav').unlink()
  write(reference / 'z.wav', music[0][:, :RATE // 2])
  before = {path: path.read_bytes() for path in (reference / 'z.wav', keep / 'a.wav')}
  command = (f'--reference={reference}', f'--checkpoint={tmp_path}/model', f'--output={tmp_path}/report.json')
  alias = tmp_path / 'alias'  # the same folder by another name, as a bind mount gives it
  alias.mkdir()
  os.link(reference / 'z.wav', alias / 'z.wav')
  for folder, options, told in ((reference, ('--overwrite',), 'z.wav: is a reference'), (keep, (), 'is there already'),
                                (alias, ('--overwrite',), 'z.wav: is a reference')):
    assert run(*command, f'--estimate={folder}', *options) == 1
    assert told in capsys.readouterr().err
  assert not (reference / 'a.wav').exists() and before == {path: path.read_bytes() for path in before}
  write(reference / 'a.wav', music[0][:, :RATE // 2])
  assert run(*command, f'--estimate={tmp_path}/new') == 1
  assert 'another reference has that name' in capsys.readouterr().err and not (tmp_path / 'new').exists()


@pytest.mark.parametrize('args, message', [
    (('--estimate={e}', '--metrics=si_sdr,visqual'), "unknown metric 'visqual': pick from si_sdr,"),
    (('--estimate={e}', '--metrics=vggish'), 'vggish needs its weights.*--vggish=FILE'),
    (('--estimate={e}', '--html={t}/page.htm'), r'name it \*.html'),
    (('--estimate={t}/none',), 'no such directory'),
    (('--estimate={t}/others',), 'nothing to compare'),
    (('--estimate={e}', '--workers=-1'), '--workers must not be negative'),
    ((), 'give --estimate=DIR, or --checkpoint=DIR'),
])
def test_mistakes_are_one_line_and_leave_nothing(folders, tmp_path, capsys, args, message):
  reference, estimate = folders
  write(tmp_path / 'others' / 'z.wav', np.zeros((1, 100), np.float32))
  args = [arg.format(e=estimate, t=tmp_path) for arg in args]
  assert run(f'--reference={reference}', f'--output={tmp_path}/report.json', *args) == 1
  error = capsys.readouterr().err.strip()
  assert len(error.splitlines()) == 1
  assert re.search(message, error)
  assert not (tmp_path / 'report.json').exists()


def test_a_page_of_ten_pairs_has_plots_over_them_and_ends_with_the_credits(music, tmp_path):
  items = [evaluate.Pair(str(i), music[0][:, :RATE], noisy(music[0][:, :RATE], .01 * (1 + i)), sample_rate=RATE)
           for i in range(10)]
  page = {}
  for count in (9, 10):
    results = evaluate.evaluate(items[:count], metrics=('mel_l1_db',))
    report.write_html(tmp_path / 'page.html', results, items[:count], about={'model': 'a < b'}, credits='By A & B.\n',
                      players=1)
    page[count] = (tmp_path / 'page.html').read_text()
  assert 'Over the files' not in page[9] and page[9].count('data:image/png') == 2
  assert 'Over the files' in page[10] and page[10].count('data:image/png') == 3
  assert '<dt>model</dt><dd>a &lt; b</dd>' in page[10]
  assert page[10].index('By A &amp; B.') > page[10].index('<h2>Files</h2>')


def test_arrays_can_be_evaluated_in_training(music):
  items = [evaluate.Pair(str(i), audio, noisy(audio, .2), sample_rate=RATE) for i, audio in enumerate(music)]
  steps = []
  embedders = {'level': lambda audio, sample_rate: audio.T[:500]}
  results = evaluate.evaluate(items, metrics=QUICK, embedders=embedders, progress=steps.append)
  assert results['pairs'] == 2 and list(results['metrics']) == list(QUICK)
  assert sum(steps) == evaluate.steps_of(items, embedders) == 4
  expected = pairs.pair_metrics(music[1], items[1].estimate, sample_rate=RATE, names=QUICK)
  assert {name: results['metrics'][name]['per_file']['1'] for name in QUICK} == pytest.approx(expected)
  assert report.table(results)[-1][0] == 'frechet level'
  with pytest.raises(UserError, match='no pair can be measured'):
    evaluate.evaluate([evaluate.Pair('x', np.zeros((1, 0), np.float32), music[0], sample_rate=RATE)], metrics=QUICK)


def dithered_silence(seconds=1):
  """16 bit, +-1 LSB: not silent, and below the floor of every mel band."""
  return np.random.default_rng(0).integers(-1, 2, (1, int(seconds * RATE))).astype(np.float32) / 32768


def test_a_reference_of_dithered_silence_costs_its_ratio_alone(music, monkeypatch):
  monkeypatch.setitem(sys.modules, 'visqol', None)
  metrics, _ = evaluate.split_names(None)
  quiet = dithered_silence()
  items = [evaluate.Pair('dither', quiet, quiet / 2, RATE), evaluate.Pair('song', music[0], noisy(music[0], .1), RATE)]
  results = evaluate.evaluate(items, metrics=metrics)
  assert list(results['metrics']['ratio']['per_file']) == ['song']
  assert list(results['metrics']['si_sdr']['per_file']) == ['dither', 'song']
  assert any(line.startswith('dither: ratio is undefined: the reference is nearly silent')
             for line in results['warnings'])
  assert 'ratio: only 1 of 2 pairs have it' in results['warnings']
  with pytest.raises(UserError, match='ratio is undefined'):
    pairs.ratio(quiet, quiet, sample_rate=RATE)
  with pytest.raises(UserError, match='ratio is undefined'):
    pairs.pair_metrics(quiet, quiet, sample_rate=RATE)


@pytest.mark.parametrize('raised, told', [
  (ZeroDivisionError('by zero'), 'lonely: mrstft: has no value (ZeroDivisionError: by zero)'),
  (RuntimeError('two\nlines'), 'lonely: mrstft: has no value (RuntimeError: two lines)'),
  (np.nan, 'lonely: mrstft: is nan, left out')])
def test_a_metric_without_a_value_is_left_out_and_named(music, monkeypatch, raised, told):
  def bad(*args, **kwargs):
    if isinstance(raised, Exception):
      raise raised
    return raised

  def embed(audio, sample_rate):
    raise ZeroDivisionError

  monkeypatch.setattr(pairs, 'mrstft', bad)
  results = evaluate.evaluate([evaluate.Pair('lonely', music[0], music[0], RATE)], metrics=('mrstft', 'lsd_db'),
                           embedders={'level': embed})
  assert list(results['metrics']) == ['lsd_db'] and told in results['warnings'] and results['frechet'] == {}
  assert any(line.startswith('lonely: level: has no value (ZeroDivisionError') for line in results['warnings'])


def test_a_report_on_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
  audio_io.write(tmp_path / 'a.wav', np.ones((1, 4000), np.float32) / 2, RATE)

  def full(source, target):
    raise OSError(28, 'No space left on device', str(target))

  monkeypatch.setattr('os.replace', full)
  assert run(f'--reference={tmp_path}/a.wav', f'--estimate={tmp_path}/a.wav', f'--output={tmp_path}/report.json',
             '--metrics=mel_l1_db') == 1
  said = capsys.readouterr().err.splitlines()[-1]
  assert said == (f'm2l2: {tmp_path}/report.json: could not be written (No space left on device); make room and run '
                  'the same command again')
  assert os.listdir(tmp_path) == ['a.wav']


def peak_of(signals):
  return float(np.max(np.abs(signals.estimate)))


def test_a_metric_is_one_entry(folders, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(registry.METRICS, 'peak', None)  # which takes it out again
  registry.register('peak', peak_of, better=registry.ZERO, unit='of full scale')
  reference, estimate = folders
  command = (f'--reference={reference}/a.flac', f'--estimate={estimate}/a.wav')
  assert run(*command, '--metrics=peak,lsd_db', f'--output={tmp_path}/r.json', f'--csv={tmp_path}/r.csv',
             f'--html={tmp_path}/r.html') == 0
  peak = float(np.max(np.abs(audio_io.read(estimate / 'a.wav')[0])))
  results = json.loads((tmp_path / 'r.json').read_text())
  assert results['metrics']['peak']['per_file'] == {'a.flac': peak} and list(results['metrics']) == ['lsd_db', 'peak']
  (row,) = csv.DictReader((tmp_path / 'r.csv').open())
  assert list(row) == ['file', 'lsd_db', 'peak'] and float(row['peak']) == peak
  assert ['peak', f'{peak:.4g}', 'n=1'] in [line.split() for line in capsys.readouterr().out.splitlines()]
  assert '<td>peak</td><td>of full scale</td><td>good near 0</td>' in (tmp_path / 'r.html').read_text()
  assert 'peak' in evaluate.split_names(None)[0]
  assert sweep.is_better('peak', -.1, .5) and not sweep.is_better('peak', -.6, .5)
  assert run(*command, '--metrics=peek', f'--output={tmp_path}/r.json') == 1
  assert re.search("unknown metric 'peek': pick from si_sdr, .*, visqol, peak, musicnn_mtt", capsys.readouterr().err)
  assert run('--help') == 0
  assert 'visqol, peak, and Frechet' in ' '.join(capsys.readouterr().out.split())


def test_an_entry_that_needs_more_is_off_without_it(folders, tmp_path, monkeypatch, capsys):
  for name in ('stereo_peak', 'far_peak', 'odd_peak'):
    monkeypatch.setitem(registry.METRICS, name, None)
  registry.register('stereo_peak', peak_of, better=registry.LOWER, stereo=True)
  registry.register('far_peak', peak_of, better=registry.HIGHER, package='not_there', extra='eval')
  registry.register('odd_peak', f'{__name__}:peak_of', better=registry.REFERENCE, chunks=True, default=False)
  mono = evaluate.Pair('mono', np.ones((1, 9), np.float32), np.ones((1, 9), np.float32), RATE)
  results = evaluate.evaluate([mono], metrics=['stereo_peak', 'odd_peak'])
  assert list(results['metrics']) == ['odd_peak']
  assert not [line for line in results['warnings'] if 'stereo_peak' in line]
  assert {'stereo_peak'} == set(evaluate.split_names(None)[0]) & {'stereo_peak', 'far_peak', 'odd_peak'}
  with pytest.raises(UserError, match=r"far_peak needs the package not_there.*pip install 'm2l2\[eval\]'"):
    evaluate.split_names('far_peak')
  with pytest.raises(UserError, match='odd_peak tells no best'):
    sweep.sweep(None, [], metrics=['odd_peak'])
  assert run('--help') == 0
  said = ' '.join(capsys.readouterr().out.split())
  assert 'that need no file but odd_peak; if installed: visqol, far_peak' in said
  assert "model's chunks, for seam_db, odd_peak" in said


def test_every_entry_has_its_function_and_a_direction():
  signals = pairs.Comparison(*np.random.default_rng(0).standard_normal((2, 2, 2 * RATE)).astype(np.float32), RATE)
  for name, metric in registry.METRICS.items():
    assert metric.name == name and metric.better in (
        registry.HIGHER, registry.LOWER, registry.ZERO, registry.REFERENCE)
    if not metric.package:
      assert isinstance(metric(signals), float)


def test_pairs_by_name_and_by_stem(tmp_path):
  tone = np.zeros((1, 10), np.float32)
  for name in ('r/a.wav', 'r/b.flac', 'r/c.wav', 'r/d.wav', 'e/a.wav', 'e/a.flac', 'e/b.ogg', 'e/c.flac', 'e/c.ogg'):
    write(tmp_path / name, tone)
  items, warnings = evaluate.find_pairs(tmp_path / 'r', tmp_path / 'e')
  assert [(item.name, item.estimate.rsplit('/', 1)[1]) for item in items] == [('a.wav', 'a.wav'), ('b.flac', 'b.ogg')]
  assert [line.split(';')[0] for line in warnings] == [
      'c.wav: partner: several estimates (c.flac, c.ogg)', 'd.wav: partner: no estimate',
      *(f'{name}: partner: an estimate without a reference' for name in ('a.flac', 'c.flac', 'c.ogg'))]
