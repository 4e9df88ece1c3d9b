"""What learning is judged by: excerpts, baselines, the bench and the held-out table."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_codec import ONE_LEVEL, make_params

from launch.research import bounds, held_out, learn, pca_start, ship
from m2l2 import build
from m2l2.codec import codec
from m2l2.codec.latents import Latents
from m2l2.codec.snapshot import save_snapshot
from m2l2.configs import nano
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation.metrics import pairs
from m2l2.evaluation.reports import pictures
from m2l2.evaluation.studies import baselines, judging
from m2l2.training import timing
from m2l2.variants import envelope

RATE = 22050
SMALL = [f'--config.model.{name}={value}' for name, value in ONE_LEVEL.items()]


def tones(seconds, *, rate=RATE, seed=0):
  """Notes of three partials that change every quarter of a second, float32 [1, samples]."""
  rng = np.random.default_rng(seed)
  t = np.arange(int(seconds * rate)) / rate
  hz = 110 * 2 ** rng.integers(0, 4, int(4 * seconds) + 1)[(4 * t).astype(int)]
  phase = 2 * np.pi * np.cumsum(hz) / rate
  audio = sum(.1 / k * np.sin(k * phase) for k in (1, 2, 3)) + 1e-3 * rng.standard_normal(len(t))
  return audio[None].astype(np.float32)


@pytest.fixture(scope='module')
def music(tmp_path_factory):
  folder = tmp_path_factory.mktemp('music')
  for number in range(2):
    audio_io.write(folder / f'{number}.wav', np.repeat(tones(6, rate=44100, seed=number), 2, axis=0), 44100)
  (folder / 'list.txt').write_text('# two\n0.5\t0.wav\n0.25\t1.wav\n')
  return folder


def test_excerpts_are_read_as_listed(music):
  sounds = judging.load(music / 'list.txt', music, seconds=3, sample_rate=RATE)
  assert list(sounds) == ['0.wav@0.5', '1.wav@0.25']
  audio, _ = audio_io.read(music / '0.wav')
  expected = audio_io.resample(audio[:1, 22050:22050 + 3 * 44100], from_rate=44100, to_rate=RATE)
  assert sounds['0.wav@0.5'].shape == (1, 3 * RATE)
  np.testing.assert_allclose(sounds['0.wav@0.5'], expected, atol=2e-4)  # 16-bit files


def test_a_list_that_is_none_is_refused(tmp_path):
  (tmp_path / 'list.txt').write_text('song.wav 3\n')
  with pytest.raises(UserError, match='start in seconds<tab>name'):
    judging.read_list(tmp_path / 'list.txt')
  with pytest.raises(UserError, match='cannot read'):
    judging.read_list(tmp_path / 'absent.txt')


def test_every_shipped_list_can_be_read():
  for parser, count in ((learn.parser(), 30), (held_out.parser(), 60)):
    listed = judging.read_list(parser.get_default('excerpts'))
    assert len(listed) == len(set(listed)) == count


def latents_of(z):
  return Latents(z=np.asarray(z, np.float32), sample_rate=RATE, num_samples=1, channels=1, model='')


def test_latent_health_counts_directions_and_saturation():
  rng = np.random.default_rng(0)
  two = rng.standard_normal((1, 400, 2)) @ np.linalg.qr(rng.standard_normal((64, 2)))[0].T
  health = judging.latent_health({'a': latents_of(.1 * two.reshape(1, 400, 8, 8))})
  assert 1.9 < health['rank'] < 2.01 and health['saturated'] == 0
  health = judging.latent_health({'a': latents_of(np.ones((1, 5, 8, 8)))})
  assert health['saturated'] == 1 and health['spread'] == 0


def test_change_and_level():
  own, other = {'a': tones(1)}, {'a': .5 * tones(1)}
  assert judging.change(own, other) == pytest.approx(.5)
  assert judging.level_db(own['a']) - judging.level_db(other['a']) == pytest.approx(6.02, abs=.01)


def test_the_vocoder_keeps_bands_and_their_course():
  rng = np.random.default_rng(1)
  loud = np.repeat([.3, .03, .2, .02], RATE // 2)
  audio = (loud * rng.standard_normal(len(loud)))[None].astype(np.float32)
  output = baselines.noise_vocoder(audio, sample_rate=RATE, parameters_per_second=345)
  assert output.shape == audio.shape
  middle = lambda x: [np.sqrt(np.mean(np.square(part[2000:-2000]))) for part in np.split(x[0], 4)]
  np.testing.assert_allclose(middle(output), middle(audio), rtol=.1)
  assert np.corrcoef(output[0], audio[0])[0, 1] < .1  # the carrier is another noise
  # A tone comes back in its own band: most of its power lies within an octave.
  spectrum = np.square(np.abs(np.fft.rfft(baselines.noise_vocoder(
      np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)[None], sample_rate=RATE, parameters_per_second=345)[0])))
  assert spectrum[700:1400].sum() > .95 * spectrum.sum()


def test_fewer_parameters_make_a_coarser_vocoder():
  audio = tones(3)
  fine, coarse = (pairs.mel_l1_db(audio, baselines.noise_vocoder(
      audio, sample_rate=RATE, parameters_per_second=rate), sample_rate=RATE) for rate in (640, 16))
  assert fine < .9 * coarse


def test_pca_is_that_of_the_singular_vectors():
  rng = np.random.default_rng(0)
  blocks = (rng.standard_normal((300, 40)) * .8 ** np.arange(40) @ np.linalg.qr(rng.standard_normal((40, 40)))[0] + 3)
  blocks = blocks.astype(np.float32)
  pca = baselines.fit_pca(blocks, 5)
  _, _, directions = np.linalg.svd(blocks - blocks.mean(axis=0))
  np.testing.assert_allclose(pca.components_.T @ pca.components_, directions[:5].T @ directions[:5], atol=1e-3)
  with pytest.raises(UserError, match='need more than 5 blocks'):
    baselines.fit_pca(blocks[:5], 5)


def test_blocks_of_a_spectrogram_go_together_again():
  spec = np.random.default_rng(0).standard_normal((2, 3, 4, 16, 2)).astype(np.float32)
  blocks = held_out.blocks_of(spec)
  assert blocks.shape == (2 * 3 * 16 // held_out.BLOCK, 4 * held_out.BLOCK * 2)
  np.testing.assert_array_equal(held_out.from_blocks(blocks, spec.shape), spec)
  np.testing.assert_array_equal(np.sort(blocks[0]), np.sort(spec[0, 0, :, :held_out.BLOCK].ravel()))


def test_opus_at_its_lowest_rate():
  audio = tones(4)
  coded, bits = held_out.opus(audio, sample_rate=RATE, bits_per_second=5500)
  assert coded.shape == audio.shape and 5000 < bits < 9000
  finer, more = held_out.opus(audio, sample_rate=RATE, bits_per_second=48000)
  assert more > 3 * bits
  assert pairs.si_sdr(audio, finer) > max(10, pairs.si_sdr(audio, coded))


def test_the_paired_bootstrap():
  rng = np.random.default_rng(0)
  sure = baselines.paired_bootstrap(rng.normal(1, 1, 100))
  assert sure['low'] == pytest.approx(sure['mean'] - .196, abs=.05) and sure['low'] > 0
  unsure = baselines.paired_bootstrap([1, -1, 1, -1])
  assert unsure['low'] < 0 < unsure['high']


def test_a_wiener_filter_knows_each_excerpts_mean_spectrum():
  spec = np.ones((2, 1, 4, 8, 2)) * np.asarray([1., 3., 0., 0.]).reshape(1, 1, 4, 1, 1)
  noise = np.random.default_rng(0).standard_normal((200, 1, 4, 8, 2))
  got = learn.wiener_snr(np.repeat(spec[:1], 200, axis=0), noise, 1.)
  error = 1 / 2 + 9 / 10  # p sigma^2 / (p + sigma^2) of each bin
  assert got == pytest.approx(10 * np.log10(10 / error), abs=.1)


def untrained(config, workdir, writers=()):
  """In place of m2l2.training.loop.train: what it leaves, of random weights."""
  plain = json.loads(json.dumps(config.to_dict()))
  workdir.mkdir(parents=True)
  (workdir / 'config.json').write_text(json.dumps(plain))
  (workdir / 'metrics.jsonl').write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
  save_snapshot(workdir / 'snapshot', params=make_params(plain), config=plain, step=2)
  return 2


def make_embedder(name):
  """In place of Musicnn's, which takes windows of 3 s: the loudness of eight bands, in windows of 1,024 samples."""
  def embed(audio, sample_rate):
    windows = audio.mean(axis=0)[:len(audio[0]) // 1024 * 1024].reshape(-1, 1024)
    return np.log1p(np.abs(np.fft.rfft(windows))[:, :512].reshape(-1, 8, 64).sum(axis=2))
  return embed


def test_a_trial_is_a_line_of_the_table_and_its_model_ships(music, tmp_path, monkeypatch):
  monkeypatch.setattr('m2l2.training.loop.train', untrained)
  figures = {name: 0.5 for name in learn.COLUMNS if name != 'name'}
  monkeypatch.setattr(learn, 'cost', lambda config: {})
  monkeypatch.setattr(learn, 'report', lambda codec, sounds, rate, workdir: figures | {'excerpts': len(sounds)})
  table = tmp_path / 'table'
  for name in ('one', 'two'):
    line = learn.run([f'--name={name}', f'--music={music}', f'--excerpts={music}/list.txt', '--seconds=1',
                      f'--table={table}', '--config=nano.py:debug', f'--config.data.root={music}',
                      '--config.train.steps=2'])
    assert line['excerpts'] == 2
  assert [json.loads(line)['name'] for line in (table / 'trials.jsonl').read_text().splitlines()] == ['one', 'two']
  text = (table / 'trials.md').read_text().splitlines()
  assert len(text) == 4 and len({line.count('|') for line in text}) == 1
  place = ship.ship(table / 'one', 'sketch', box=tmp_path / 'box')
  assert codec.load(place).fingerprint != codec.load(table / 'one').fingerprint  # rounded to bfloat16
  (place / 'MODEL.md').write_text('card')
  assert (ship.ship(table / 'one', 'sketch', box=tmp_path / 'box') / 'MODEL.md').is_file()


@pytest.mark.soak
def test_a_trial_then_the_held_out_table_then_the_box(music, tmp_path, monkeypatch):
  listed = [f'--music={music}', f'--excerpts={music}/list.txt', '--seconds=4.3']
  run = [*listed, f'--table={tmp_path}/table', '--config=nano.py:debug', f'--config.data.root={music}',
         '--config.train.steps=2', '--config.train.batch_size=8', '--config.train.probe_every=0',
         '--config.model.layers=1', '--config.model.native_rates=(22050,)', '--config.variants.nested.chance=0.5',
         '--config.model.num_latents=2']
  learn.run(['--name=one', *run])
  lines = [json.loads(line) for line in (tmp_path / 'table' / 'trials.jsonl').read_text().splitlines()]
  assert [line['name'] for line in lines] == ['one']
  assert all(np.isfinite(line[name]) for line in lines for name in learn.COLUMNS if name not in ('name', 'delta'))
  table = (tmp_path / 'table' / 'trials.md').read_text().splitlines()
  assert len(table) == 3 and len({line.count('|') for line in table}) == 1
  assert (tmp_path / 'table' / 'one' / 'spectrograms.png').stat().st_size > 10_000

  place = ship.ship(tmp_path / 'table' / 'one', 'sketch', box=tmp_path / 'box')
  assert codec.load(place).fingerprint != codec.load(tmp_path / 'table' / 'one').fingerprint  # rounded to bfloat16
  (place / 'MODEL.md').write_text('card')
  assert (ship.ship(tmp_path / 'table' / 'one', 'sketch', box=tmp_path / 'box') / 'MODEL.md').is_file()

  monkeypatch.setattr(held_out, 'CROPS', 40)
  output = tmp_path / 'held_out'
  report = held_out.run([*listed, f'--model={place}', f'--train={music}', f'--output={output}', '--sigma-cond=0.5',
                         f'--beside=raw={tmp_path}/table/one'])
  itself = report['systems']['the excerpt itself']['metrics']
  assert itself['mel_l1_db']['mean'] == 0 and itself['coherence'] == itself['coherence_reference']
  assert report['systems']['noise with the mean spectrum']['metrics']['ratio']['mean'] == pytest.approx(1, abs=.1)
  beside, boxed = (report['systems'][name]['metrics']['ratio']['mean'] for name in ('raw', 'm2l2, one step'))
  assert beside == pytest.approx(boxed, rel=.02) and beside != boxed  # the same weights before they were rounded
  change = report['beside']['raw']
  assert change['mel_l1_db']['low'] <= change['mel_l1_db']['mean'] <= change['mel_l1_db']['high']
  assert list(report['steps']) == ['0.5'] and (output / 'rates.png').is_file()
  assert report['rates'][2]['ratio'] == report['systems']['m2l2, one step']['metrics']['ratio']['mean']
  assert report['rates'][1]['ratio'] != report['rates'][2]['ratio']
  assert report['rates_beside']['raw'][2]['ratio'] == beside
  stored = json.loads((output / 'report.json').read_text())
  assert stored['systems'] == report['systems'] and list(stored['rates']) == [str(n) for n in (1, 2)]
  assert (output / 'table.md').read_text() == held_out.markdown(report) and (output / 'swapped.png').is_file()


def test_snapshots_of_a_run_over_its_cost(tmp_path, monkeypatch):
  config = nano.get_config('debug')
  monkeypatch.setattr(timing, 'model_flops', lambda config: lambda steps: 1e15 * steps)
  monkeypatch.setattr(judging, 'load', lambda *_, **__: {'a': np.zeros((1, 100), np.float32)})
  monkeypatch.setattr(learn, 'make_embedder', lambda name: None)
  monkeypatch.setattr(learn, 'heard', lambda codec, *_: ({'coherence': .2, 'fd': float(codec.params['step']), 'fd2': 1.,
                                                          'mel_l1_db': 5., 'swap': .3}, {}))
  monkeypatch.setattr(learn, 'Codec', lambda *, config, params, fingerprint: types.SimpleNamespace(
      params=params, native_rates=(8000,), representation=None))
  monkeypatch.setattr(learn, 'noise_phases', lambda audio, representation: audio)
  monkeypatch.setattr(judging, 'judge', lambda *_, **__: {
      'frechet': {learn.EMBEDDING: {'value': 9.}},
      'metrics': {name: {'mean': .5} for name in ('coherence', 'coherence_reference', 'mel_l1_db')}})
  for step in (400, 40):
    save_snapshot(tmp_path / str(step), params={'step': np.float32(step)}, config=json.loads(json.dumps(
        config.to_dict())), step=step)
  (tmp_path / '.200.new').mkdir()  # is being written
  learn.run([f'--snapshots={tmp_path}'])
  told = json.loads((tmp_path / 'curve.json').read_text())
  assert [(point['step'], point['pflop'], point['fd']) for point in told['points']] == [(40, 40, 40), (400, 400, 400)]
  assert told['phases of noise']['fd'] == 9 and (tmp_path / 'curve.png').stat().st_size > 5_000
  with pytest.raises(UserError, match='holds no snapshots'):
    (tmp_path / 'none').mkdir()
    learn.run([f'--snapshots={tmp_path / "none"}'])


def test_trials_are_compared_at_their_cost(tmp_path, monkeypatch):
  config = nano.get_config('debug')
  config.model.update(ONE_LEVEL)
  # Counting them takes seconds: test_timing.py.
  monkeypatch.setattr(timing, 'model_flops', lambda config: lambda n: 1e12 * min(n, 4) + 3e12 * max(n - 4, 0))
  (tmp_path / 'one').mkdir()
  (tmp_path / 'one' / 'config.json').write_text(json.dumps(config.to_dict()))
  lines = [{'step': 1, 'loss': 3.}, {'step': 4, 'evaluate_ema/ratio': .9, 'evaluate/ratio': 9.},
           {'step': 8, 'evaluate_ema/ratio': .8}]
  (tmp_path / 'one' / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  (tmp_path / 'plain').mkdir()
  (tmp_path / 'plain' / 'config.json').write_text('{}')
  (tmp_path / 'plain' / 'metrics.jsonl').write_text('{"step": 1, "loss": 3.0}\n')
  runs = learn.curves(tmp_path, ['one'])
  first, second = runs['one']  # 4 of 8 steps are head start, which costs less; audio is audio
  assert [first['ratio'], second['ratio']] == [.9, .8]
  crop = build.step_functions(config).crop_samples / 44100
  assert second['hours'] == 2 * first['hours'] == pytest.approx(8 * config.train.batch_size * crop / 3600)
  assert [first['pflop'], second['pflop']] == [.004, .016]
  assert learn.run([f'--table={tmp_path}', '--compare=one']) == {'picture': str(tmp_path / 'compare.png')}
  assert (tmp_path / 'compare.png').stat().st_size > 10_000
  figure = pictures.learning_curves(runs | {'two': [first | {'ratio': 1.}, second | {'ratio': .7}]})
  assert [[line.get_ydata().tolist() for line in axis.lines] for axis in figure.axes] == 2 * [[[.9, .8], [1., .7]]]
  with pytest.raises(UserError, match='trained without config.evaluate.root'):
    learn.run([f'--table={tmp_path}', '--compare=plain'])
  with pytest.raises(UserError, match='--name=NAME is missing'):
    learn.run(['--config=nano.py'])


def test_principal_components_to_begin_with(music, tmp_path):
  run = ['--crops=100', f'--config.data.root={music}', *SMALL]
  pca_start.run([f'--output={tmp_path}/start', '--config=tiny.py:debug', *run])
  model = codec.load(tmp_path / 'start')
  rep, network = model.representation, model.network
  audio = jnp.asarray(np.stack([tones(4, seed=seed)[:, 20_000:][:, :rep.crop_samples(2)] for seed in range(2)]))
  spec = jax.jit(rep.analyse)(audio)
  z = jnp.tanh(jax.jit(network.encode)(model.params, spec))
  assert .2 < float(jnp.sqrt(jnp.mean(jnp.square(z)))) < .8  # 0.4 before tanh over the music's own crops
  decode = jax.jit(network.decode)
  error = lambda z: float(jnp.mean(envelope.envelope_loss(decode(model.params, z)['log_magnitude'], spec)))
  assert error(z) < .8 * error(0 * z)  # without latents it is the music's mean
  with pytest.raises(UserError, match='no linear sketch'):
    pca_start.run([f'--output={tmp_path}/no', '--config=nano.py:debug', *run])


@pytest.mark.parametrize('real', [False, pytest.param(True, marks=pytest.mark.soak)])
def test_what_bounds_an_envelope_and_noise(music, capsys, monkeypatch, real):
  if not real:
    monkeypatch.setattr(bounds, 'make_embedder', make_embedder)
  run = ['--crops=60', '--components=4,16', f'--config.data.root={music}', f'--music={music}',
         f'--excerpts={music}/list.txt', f'--seconds={4.3 if real else 1}']
  table = bounds.run(['--config=tiny.py:debug', *run])
  assert list(table) == ['every bin', '32 x 4 cells', '4 components', '16 components']
  every, cells, four, sixteen = table.values()
  assert every['mel_l1_db'] < cells['mel_l1_db'] < sixteen['mel_l1_db'] < four['mel_l1_db']
  for row in table.values():  # the Wiener filter is the best gain there is for the scale it is told
    assert all(best > flow for best, flow in zip(row['snr_wiener'], row['snr_flow'], strict=True))
  assert len(capsys.readouterr().out.splitlines()) == 4
  with pytest.raises(UserError, match='names no cells'):
    bounds.run(['--config=nano.py:debug', *run])
  with pytest.raises(UserError, match='mono'):
    bounds.run(['--config=tiny.py:debug,stereo', *run])


def test_bent_noise_keeps_its_power_and_phases():
  noise = np.random.default_rng(0).standard_normal((3, 4, 5, 2)).astype(np.float32)
  bent = bounds.bent(noise, .4)
  assert np.mean(np.square(bent)) == pytest.approx(np.mean(np.square(noise)), rel=1e-5)
  np.testing.assert_allclose(np.arctan2(*np.moveaxis(bent, -1, 0)), np.arctan2(*np.moveaxis(noise, -1, 0)), atol=1e-5)
  sizes = lambda x: np.std(np.linalg.norm(x, axis=-1))
  assert sizes(bent) < .6 * sizes(noise) and bounds.bent(noise, 1) is noise
