"""The loop, twice: with a model of one matrix, which compiles at once, each promise that it makes;
with the shipped config, small, that kills change nothing and devices next to nothing (soak).
"""

import concurrent.futures
import functools
import json
import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soak_resume
import soundfile
from test_codec import ONE_LEVEL
from test_data_sources import write_prepared

from m2l2 import build, files, sharding
from m2l2.codec import codec
from m2l2.codec.snapshot import load_snapshot, save_snapshot
from m2l2.configs import nano
from m2l2.data.sources import Mixture
from m2l2.errors import UserError
from m2l2.training import checkpoint, listening, loop, metrics, preflight, train_step

CROP, RATE = 64, 8000


def small_functions(config, ravel=False):
  """A step as the loop wants it: 'audio' is fitted by one matrix; as quick to compile as can be."""
  width, first_bad = config['model']['latent_dim'], int(config['model']['alpha'])  # a bad step is for the guard

  def init(key):
    params = {'layer': {'w': 0.1 * jax.random.normal(key, (CROP, width))}}
    zero = jnp.int32(0)
    return train_step.TrainState(
      step=zero, params=params, ema=jax.tree.map(jnp.copy, params), opt_state=({'m': params},),
      skipped=zero, skipped_in_a_row=zero)

  def step(state, batch, *, phase=None):
    def loss_fn(params):
      x, w = batch['audio'][:, 0], params['layer']['w']
      return jnp.mean(jnp.square(x @ w @ w.T - x))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    bad = state.step + 1 >= first_bad
    params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema, params)
    in_a_row = jnp.where(bad, state.skipped_in_a_row + 1, 0)
    state = train_step.TrainState(
      step=state.step + 1, params=params, ema=ema, opt_state=state.opt_state,
      skipped=state.skipped + bad, skipped_in_a_row=in_a_row)
    return state, {'loss': jnp.where(bad, jnp.nan, loss), 'audio/sum': jnp.sum(batch['audio']),
                   'skipped_in_a_row': jnp.float32(in_a_row)}

  def probe(params, batch, key):
    return {'norm': jnp.sum(params['layer']['w'] ** 2), 'draw': jax.random.uniform(key)}

  return types.SimpleNamespace(
    init=init, train_step=step, probe_step=probe, phases=(('consistency', 10**9),),
    phase=lambda step: 'consistency', ravel=lambda state: state, unravel=lambda state: state,
    crop_samples=CROP, channels=1, sample_rate=RATE,
    native_rates=(RATE,), logical_axes={'layer': {'w': ('embed', 'mlp')}})


def small_config(music, **changes):
  config = nano.get_config('debug')
  config.data.root = str(music)
  config.model.alpha = 1e6
  config.train.update(steps=6, batch_size=8, log_every=1, probe_every=0, checkpoint_every=2)
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def music(tmp_path_factory):
  return soak_resume.write_music(tmp_path_factory.mktemp('music'), sample_rate=RATE)


@pytest.fixture
def small(monkeypatch, music):
  """`small(workdir, **changes)` runs the loop with the small model; returns the updates done."""
  monkeypatch.setattr(build, 'step_functions', small_functions)
  return lambda workdir, writers=(), **changes: loop.train(
    small_config(music, **changes), str(workdir), writers)


@pytest.fixture(scope='module')
def straight(music, tmp_path_factory):
  """A run of the small model to which nothing happened. To be read; `again` gives one that may be changed."""
  workdir = tmp_path_factory.mktemp('straight') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, 'step_functions', small_functions)
    assert loop.train(small_config(music), str(workdir), ()) == 6
  return workdir


@pytest.fixture
def again(straight, tmp_path):
  return shutil.copytree(straight, tmp_path / 'again')


@pytest.fixture
def warnings(monkeypatch):
  """What the loop warns of."""
  said = []
  for module in (loop, checkpoint):
    monkeypatch.setattr(module.logging, 'warning', lambda text, *args: said.append(text % args))
  return said


def steps_of(workdir):
  return [line['step'] for line in soak_resume.trace(workdir)]


def stop_at(monkeypatch, step):
  """Makes SIGTERM arrive while update `step` is under way."""
  write = metrics.JsonlWriter.write

  def write_and_stop(self, done, scalars):
    write(self, done, scalars)
    if done == step - 1:  # lines come one step late
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(metrics.JsonlWriter, 'write', write_and_stop)


# The loop's promises, with the small model.


def test_a_run_leaves_config_metrics_checkpoints_and_snapshot(straight, music):
  assert sorted(os.listdir(straight)) == ['checkpoints', 'config.json', 'goodput.json', 'metrics.jsonl', 'snapshot']
  config = json.loads((straight / 'config.json').read_text())
  assert config == preflight.plain(small_config(music))
  snapshot = load_snapshot(straight)
  assert snapshot.step == 6 and snapshot.config == config
  assert steps_of(straight) == [1, 2, 3, 4, 5, 6]
  assert all(line['loss'] > 0 for line in soak_resume.trace(straight))


def test_the_log_says_what_a_person_wants(small, again, music, monkeypatch):
  said = []

  def info(*args, **kwargs):  # of all that use absl: Orbax hands over dicts
    said.append(logging.LogRecord('', logging.INFO, '', 0, args[0], args[1:], None).getMessage())

  monkeypatch.setattr(loop.logging, 'info', info)
  small(again, **{'train.steps': 7})
  starts = ('devices     8 cpu (cpu)', 'model       0.000512 M parameters, mono, 8000 Hz', 'data        ',
            'batch       8 crops of 0.01 s, 1 a device', 'going on from step 6', 'compiling', 'the step compiled in',
            'step 7/7  loss ', 'saving step 7', 'done: 7 steps; the model is ')
  told = [next((line for line in said if line.startswith(start)), None) for start in starts]
  assert None not in told, (starts[told.index(None)], said)
  assert [said.index(line) for line in told] == sorted(said.index(line) for line in told)
  assert told[2].endswith(f' items at {music}') and 'steps/s' in told[7] and ' left' in told[7]


def test_logged_are_the_first_and_last_step_and_probes_of_raw_and_averaged_weights(small, tmp_path):
  small(tmp_path, **{'train.steps': 8, 'train.log_every': 5, 'train.probe_every': 3})
  assert steps_of(tmp_path) == [1, 3, 5, 6, 8]
  probed = {line['step']: line for line in soak_resume.trace(tmp_path) if 'probe/norm' in line}
  assert list(probed) == [3, 6]
  assert probed[3]['probe/norm'] != probed[3]['probe_ema/norm']
  assert probed[3]['probe/draw'] == probed[3]['probe_ema/draw'] != probed[6]['probe/draw']


def test_speed_and_waiting_are_logged(small, again):
  line = json.loads((again / 'metrics.jsonl').read_text().splitlines()[-1])
  steps, samples = line['time/steps_per_second'], line['time/samples_per_second']
  assert steps > 0 and samples == pytest.approx(8 * steps, rel=1e-5)
  assert line['time/audio_seconds_per_second'] == pytest.approx(samples * CROP / RATE, rel=1e-5)
  assert 0 <= line['time/input_wait'] <= 1
  # x w w', forward and two ways back (none to the audio), over 8 devices; a CPU has no peak.
  flops = 2 * 8 * CROP * 8 * (2 + 3)
  assert line['time/tflops_per_second'] == pytest.approx(steps * flops / 8 / 1e12, rel=1e-5)
  assert 'time/mfu' not in line
  assert 0 < line['time/goodput'] < 1 and line['time/restarts'] == 0
  assert line['time/lost_compile'] > 0 and line['time/lost_restart'] == 0
  small(again, **{'train.steps': 7})
  line = json.loads((again / 'metrics.jsonl').read_text().splitlines()[-1])
  assert 0 < line['time/goodput'] < 1 and line['time/restarts'] == 1
  assert line['time/lost_restart'] > 0  # from the end of the first start to the second
  shares = [value for name, value in line.items() if name == 'time/goodput' or name.startswith('time/lost_')]
  assert len(shares) == 7 and sum(shares) == pytest.approx(1)


def test_nothing_is_compiled_after_the_first_step_and_writers_of_ones_own_are_told(
    small, tmp_path):
  compiled, told = [], {}

  def listen(event, duration, **unused):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(duration)

  def writer(step, scalars):
    told[step] = (scalars['loss'], len(compiled))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    small(tmp_path, [writer], **{'train.checkpoint_every': 1000, 'train.probe_every': 5})
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert list(told) == [1, 2, 3, 4, 5, 6]
  losses = [line['loss'] for line in soak_resume.trace(tmp_path)]
  np.testing.assert_array_equal(np.float32([loss for loss, _ in told.values()]), np.float32(losses))
  # Step 1 is logged while step 2 is under way.
  assert told[1][1] > 0 and len({count for _, count in told.values()}) == 1


def test_batches_ahead_and_a_trace_change_nothing(small, tmp_path, monkeypatch):
  small(tmp_path / 'plain', **{'data.device_prefetch': 0})
  with monkeypatch.context() as patch:
    stop_at(patch, 3)
    done = small(tmp_path / 'ahead', **{'data.device_prefetch': 3, 'train.profile': '2:3'})
  assert done < 6
  assert small(tmp_path / 'ahead', **{'data.device_prefetch': 3}) == 6
  assert soak_resume.differences(tmp_path / 'plain', tmp_path / 'ahead') == []
  assert len(list((tmp_path / 'ahead/profile').rglob('*.xplane.pb'))) == 1


def test_sigterm_finishes_the_step_saves_and_the_rest_is_as_if_never_stopped(
    small, straight, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    stop_at(patch, 3)
    done = small(tmp_path / 'stopped')
  assert 3 <= done < 6 and steps_of(tmp_path / 'stopped') == list(range(1, done + 1))
  assert load_snapshot(tmp_path / 'stopped').step == done
  assert small(tmp_path / 'stopped') == 6
  assert soak_resume.differences(straight, tmp_path / 'stopped') == []


def test_the_loop_goes_on_while_a_snapshot_is_written(small, straight, tmp_path, monkeypatch):
  order, go_on, save = [], threading.Event(), loop.save_snapshot
  asked, fingerprint = [], Mixture.fingerprint.fget
  monkeypatch.setattr(Mixture, 'fingerprint', property(lambda self: asked.append(1) or fingerprint(self)))

  def slow(*args, **options):
    order.append(options['step'])
    assert go_on.wait(60)
    save(*args, **options)

  def writer(step, scalars):
    order.append(f'line {step}')
    if step == 5:  # logged while step 6 is under way
      go_on.set()

  monkeypatch.setattr(loop, 'save_snapshot', slow)
  assert small(tmp_path, [writer]) == 6
  assert order[-1] == 6 and order.count(4) <= 1  # the end waits for the last one; who takes longer leaves some out
  assert order.index(2) < order.index('line 5') and 4 not in order[:order.index('line 5')]
  assert soak_resume.differences(straight, tmp_path) == []
  assert len(asked) == 1  # the data, for their fingerprint


def test_a_snapshot_that_cannot_be_written_ends_the_run_with_its_line(small, tmp_path, monkeypatch):
  def full(*args, **options):
    raise UserError('cannot write the snapshot: No space left on device')

  monkeypatch.setattr(loop, 'save_snapshot', full)
  with pytest.raises(UserError, match='No space left'):
    small(tmp_path)


def test_a_lost_checkpoint_costs_its_steps_only(small, straight, again, tmp_path, warnings):
  for name in ('state', 'about'):
    os.rename(again / 'checkpoints/6' / name, tmp_path / name)
  assert small(again) == 6
  assert any('checkpoint 6' in text for text in warnings)
  assert soak_resume.differences(straight, again) == []


def test_a_run_that_is_done_stays_as_it_is(small, straight, again):
  assert small(again) == 6
  assert (again / 'metrics.jsonl').read_text() == (straight / 'metrics.jsonl').read_text()
  assert soak_resume.fingerprint(again) == soak_resume.fingerprint(straight)


def test_a_resumed_run_may_differ_and_says_in_what(small, again, tmp_path, warnings):
  small(tmp_path / 'straight', **{'train.steps': 8})
  assert small(again, **{'train.steps': 8}) == 8
  assert warnings == ['this run differs from the one it continues in train.steps: 6 -> 8']
  assert soak_resume.differences(tmp_path / 'straight', again) == []
  assert json.loads((again / 'config.json').read_text())['train']['steps'] == 8


def test_another_batch_size_goes_on_at_the_next_unseen_sample(small, again, monkeypatch):
  starts = []
  make_loader = preflight.make_loader

  def spy(**fields):
    starts.append((fields['start_index'], fields['batch_size']))
    return make_loader(**fields)

  monkeypatch.setattr(preflight, 'make_loader', spy)
  small(again, **{'train.steps': 8, 'train.batch_size': 16})
  small(again, **{'train.steps': 9, 'train.batch_size': 16})
  assert starts == [(6 * 8, 16), (6 * 8 + 2 * 16, 16)]


def test_other_files_on_resume_are_warned_of(small, again, tmp_path, warnings):
  more = soak_resume.write_music(tmp_path / 'more', files=4, sample_rate=RATE)
  small(again, **{'data.root': str(more), 'train.steps': 7})
  assert any('not those of the run so far' in text for text in warnings)


def test_a_model_that_no_longer_fits_is_one_clear_line(small, again):
  with pytest.raises(UserError, match=r'layer/w .*model.latent_dim: 8 -> 4') as error:
    small(again, **{'model.latent_dim': 4})
  assert '\n' not in str(error.value)


def test_a_new_run_may_start_from_a_snapshot(small, tmp_path):
  weights = {'layer': {'w': np.full((CROP, 8), 0.01, np.float32)}}
  save_snapshot(tmp_path / 'old', params=weights, config={}, step=5)
  small(tmp_path / 'new', **{'train.init_from': str(tmp_path / 'old'), 'train.steps': 1})
  w = load_snapshot(tmp_path / 'new').params['layer']['w']
  np.testing.assert_allclose(w, 0.01, atol=2e-3)
  assert steps_of(tmp_path / 'new') == [1]


def test_a_snapshot_of_another_model_is_refused(small, tmp_path):
  save_snapshot(tmp_path / 'old', params={'w': np.zeros(3, np.float32)}, config={}, step=5)
  with pytest.raises(UserError, match='train.init_from=.* another model'):
    small(tmp_path / 'new', **{'train.init_from': str(tmp_path / 'old')})


def test_gradients_that_stay_bad_end_the_run_with_their_range(small, tmp_path):
  with pytest.raises(UserError, match='steps 4 to 6'):
    small(tmp_path, **{'train.steps': 20, 'train.max_skipped_in_a_row': 3, 'model.alpha': 4.0})
  lines = soak_resume.trace(tmp_path)
  assert lines[-1]['step'] == 6 and lines[-1]['loss'] is None and lines[2]['loss'] is not None


def test_sounds_go_to_tensorboard_where_it_is(small, tmp_path, monkeypatch):
  heard = []

  class Media:

    def write(self, step, scalars):
      pass

    def write_audio(self, step, sounds, *, sample_rate):
      heard.append((step, {name: x.shape for name, x in sounds.items()}, sample_rate))

    def write_images(self, step, images):
      pass

    def close(self):
      pass

  class FakeCodec:

    def __init__(self, *, config, params, fingerprint):
      del config, fingerprint
      self.params = params

    def encode(self, audio, sample_rate):
      return audio

    def decode(self, latents, seed):
      return latents

  monkeypatch.setattr(metrics, 'tensorboard_writer', lambda logdir: Media())
  monkeypatch.setattr(listening, 'Codec', FakeCodec)
  small(tmp_path)
  shapes = {'original': (1, CROP), 'reconstruction': (1, CROP)}
  assert heard == [(step, shapes, RATE) for step in (2, 4, 6)]


class QuietCodec:
  """Makes sounds softer, the more so the smaller the weights."""
  native_rates = (RATE,)

  def __init__(self, *, config, params, fingerprint):
    self.representation, self.params = build.representation(config['model']), params

  def encode(self, audio, sample_rate):
    return audio

  def decode(self, latents, seed):
    return latents * np.float32(min(1, np.abs(self.params['layer']['w']).mean()))


@pytest.fixture
def held_out(small, tmp_path, music, monkeypatch):
  """`held_out(workdir, **changes)` runs the small loop, which measures every two steps."""
  monkeypatch.setattr(listening, 'Codec', QuietCodec)
  fields = {'evaluate.root': str(music), 'evaluate.every': 2, 'evaluate.metrics': 'mel_l1_db,si_sdr',
            'evaluate.best': 'mel_l1_db', 'train.checkpoint_every': 3}
  return lambda workdir, **changes: small(workdir, **{**fields, **changes})


def measured(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [line for line in lines if 'evaluate_ema/mel_l1_db' in line]


def test_held_out_clips_are_measured_and_the_best_weights_kept(held_out, tmp_path):
  assert held_out(tmp_path) == 6
  lines = measured(tmp_path)
  assert [line['step'] for line in lines] == [2, 4, 6]
  assert set(lines[0]) == {'step', *(f'{kind}/{name}' for kind in ('evaluate', 'evaluate_ema')
                                     for name in ('mel_l1_db', 'si_sdr'))}
  assert lines[1]['evaluate/mel_l1_db'] != lines[1]['evaluate_ema/mel_l1_db']
  best = min(lines, key=lambda line: line['evaluate_ema/mel_l1_db'])
  kept = load_snapshot(tmp_path / 'best')
  assert kept.step == best['step'] == kept.extra['best']['step']
  assert kept.extra['best']['value'] == pytest.approx(best['evaluate_ema/mel_l1_db'], rel=1e-6)
  assert [line['step'] for line in soak_resume.trace(tmp_path) if 'loss' in line] == [1, 2, 3, 4, 5, 6]
  before = (tmp_path / 'metrics.jsonl').read_text()
  held_out(tmp_path)  # a run that is done measures nothing again
  assert (tmp_path / 'metrics.jsonl').read_text() == before


def test_measuring_changes_no_training_and_resumes_exactly(held_out, straight, tmp_path, monkeypatch):
  held_out(tmp_path / 'straight')
  with monkeypatch.context() as patch:
    stop_at(patch, 4)  # between two evaluations
    assert held_out(tmp_path / 'stopped') < 6
  assert held_out(tmp_path / 'stopped') == 6
  assert measured(tmp_path / 'stopped') == measured(tmp_path / 'straight')
  with monkeypatch.context() as patch:  # at one: a machine that is taken away has time for the save alone
    patch.setattr(checkpoint.StopSignal, 'reached', lambda self, step: step == 4)
    assert held_out(tmp_path / 'at') == 4
  assert [line['step'] for line in measured(tmp_path / 'at')] == [2]
  assert held_out(tmp_path / 'at') == 6
  assert measured(tmp_path / 'at') == measured(tmp_path / 'straight')
  assert soak_resume.fingerprint(straight) == soak_resume.fingerprint(tmp_path / 'stopped')
  losses = [[line['loss'] for line in soak_resume.trace(run) if 'loss' in line]
            for run in (straight, tmp_path / 'straight', tmp_path / 'stopped')]
  assert losses[0] == losses[1] == losses[2]
  kept = [load_snapshot(tmp_path / run / 'best') for run in ('straight', 'stopped')]
  assert kept[0].fingerprint == kept[1].fingerprint and kept[0].extra == kept[1].extra


def test_an_evaluation_that_fails_is_logged_and_comes_after_the_save(held_out, straight, tmp_path, monkeypatch):
  saved, said = [], []

  def fail(self, step, weights, log):
    saved.append((step, load_snapshot(tmp_path).step, checkpoint.latest(tmp_path / 'checkpoints')))
    raise ZeroDivisionError('float division\nby zero')

  monkeypatch.setattr(listening.logging, 'warning', lambda text, *args: said.append(text % args))
  with monkeypatch.context() as patch:
    patch.setattr(listening.Listener, '_measure_all', fail)
    assert held_out(tmp_path, **{'train.checkpoint_every': 2}) == 6
  assert saved == [(2, 2, 2), (4, 4, 4), (6, 6, 6)]
  assert said == [f'the evaluation at step {step} failed, training continues: ZeroDivisionError: float division by zero'
                  for step in (2, 4, 6)]
  assert soak_resume.differences(straight, tmp_path) == []
  assert held_out(tmp_path, **{'train.checkpoint_every': 2}) == 6  # and what was not measured is
  assert [line['step'] for line in measured(tmp_path)] == [6]


def test_clips_of_dithered_silence_end_no_run(held_out, tmp_path, monkeypatch):
  quiet = np.random.default_rng(0).integers(-1, 2, 8000).astype(np.float32) / 32768
  soundfile.write(tmp_path / 'quiet.wav', quiet, 44100, subtype='PCM_16')
  said = []
  monkeypatch.setattr(listening.logging, 'warning', lambda text, *args: said.append(text % args))
  assert held_out(tmp_path / 'run', **{
    'evaluate.root': str(tmp_path / 'quiet.wav'), 'evaluate.metrics': 'mel_l1_db,ratio', 'evaluate.best': 'ratio',
    'evaluate.raw': False, 'train.steps': 2}) == 2
  assert [set(line) for line in measured(tmp_path / 'run')] == [{'step', 'evaluate_ema/mel_l1_db'}]
  assert said == ['evaluation at step 2: ratio has no value on any of the clips']


@pytest.mark.parametrize('fields, message', [
  ({'evaluate.every': -1}, 'evaluate.every=-1'),
  ({'evaluate.best': 'visqol'}, "evaluate.best='visqol' is not among"),
  ({'evaluate.metrics': 'coherence', 'evaluate.best': 'coherence'}, 'neither its high nor its low'),
  ({'evaluate.metrics': 'loudness'}, "unknown metric 'loudness'"),
  ({'evaluate.root': '/nowhere'}, 'no such directory'),
  ({'evaluate.clips': 0}, 'must be positive')])
def test_what_cannot_be_measured_is_told_at_the_start(held_out, tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    held_out(tmp_path / 'run', **fields)
  assert not (tmp_path / 'run/metrics.jsonl').exists()


# What is told before anything is compiled, and one run at a time.


@pytest.fixture
def nothing_compiled(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError('compiled')
  monkeypatch.setattr(loop.jax, 'jit', refuse)


@pytest.mark.parametrize('fields, says', [
  ({'train.learning_rate': float('nan')}, 'train.learning_rate=nan: it must be a finite number'),
  ({'consistency.sigma_max': float('inf')}, 'consistency.sigma_max=inf: it must be a finite'),
  ({'train.batch_size': 12}, 'train.batch_size=12 must be a multiple of 8'),
  ({'data.root': '/nowhere'}, '/nowhere'),
  ({'data.root': 'BROKEN'}, 'draws in a row gave no crop to train on'),
  ({'data.root': '1*MUSIC,1*BROKEN'}, 'broken: .*draws in a row gave no crop to train on'),
  ({'train.init_from': 'nobody'}, 'nobody: no such snapshot'),
  ({'train.init_from': 'OTHER'}, 'train.init_from=.* is of another model'),
  ({'evaluate.root': '/nowhere', 'evaluate.metrics': 'si_sdr'}, '/nowhere'),
  ({'mesh.preset': 'ddp'}, 'ddp'),
  ({'workdir': 'x' * 300}, 'cannot make --workdir=.*xx'),
])
@pytest.mark.parametrize('checked', [False, True])
def test_what_cannot_be_is_told_before_anything_is_compiled(
    small, tmp_path, music, nothing_compiled, fields, says, checked):
  (tmp_path / 'broken').mkdir()
  (tmp_path / 'broken/a.wav').write_bytes(b'RIFF')
  save_snapshot(tmp_path / 'other', params={'w': np.zeros(3, np.float32)}, config={}, step=5)
  places = {'BROKEN': tmp_path / 'broken', 'MUSIC': music, 'OTHER': tmp_path / 'other'}
  for name, place in places.items():
    fields = {field: value.replace(name, str(place)) if isinstance(value, str) else value
              for field, value in fields.items()}
  run = tmp_path / fields.get('workdir', 'run')
  changes = {name: value for name, value in fields.items() if name != 'workdir'}
  with pytest.raises(UserError, match=says) as error:
    if checked:
      preflight.report(small_config(music, **changes), str(run))
    else:
      small(run, **changes)
  assert '\n' not in str(error.value) and not (tmp_path / 'run/metrics.jsonl').exists()
  if checked:
    assert not (tmp_path / 'run').exists()


def test_a_check_says_what_would_run_and_leaves_nothing(small, straight, again, tmp_path, music, nothing_compiled):
  before = sorted(path for path in again.rglob('*'))
  lines = preflight.report(small_config(music, **{'train.steps': 9}), str(again))
  assert sorted(path for path in again.rglob('*')) == before
  text = '\n'.join(lines)
  for part in ('8 cpu (cpu), mesh data 8', '0.000512 M parameters, mono, 8000 Hz', f'at {music}',
               '8 crops of 0.01 s, 1 a device', 'resumes from step 6 of 9; 9 steps, saved every 2',
               'none (evaluate.root is empty)', str(again)):
    assert part in text
  save_snapshot(tmp_path / 'old', params={'layer': {'w': np.zeros((CROP, 8), np.float32)}}, config={}, step=5)
  lines = preflight.report(small_config(music, **{
    'train.init_from': str(tmp_path / 'old'), 'evaluate.root': str(music), 'evaluate.metrics': 'si_sdr'}),
    tmp_path / 'new')
  assert any('new, from the weights of step 5 of' in line for line in lines)
  assert any('every 4 steps' in line for line in lines) and not (tmp_path / 'new').exists()


def test_one_run_at_a_time_in_a_workdir(small, straight, again, music):
  before = soak_resume.fingerprint(again)
  (again / 'checkpoints/8.orbax-checkpoint-tmp-1').mkdir()  # of the other run, in flight
  with preflight.locked(str(again)):
    for act in (lambda: small(again, **{'train.steps': 8}), lambda: preflight.report(small_config(music), str(again))):
      with pytest.raises(UserError, match=rf'another m2l2 train is writing there \(process {os.getpid()} on .*, since'):
        act()
    assert (again / 'checkpoints/8.orbax-checkpoint-tmp-1').exists()
  assert small(again) == 6 and soak_resume.fingerprint(again) == before
  assert not (again / preflight.LOCK).exists()


def test_a_second_run_in_a_workdir_leaves_the_first_alone(small, tmp_path, monkeypatch):
  flight, told = tmp_path / 'checkpoints/9.orbax-checkpoint-tmp-1', []

  def start_another(self, step):
    if not told:
      told.append('')
      flight.mkdir()  # as the first run's save in flight
      try:
        small(tmp_path, **{'train.steps': 3})
      except UserError as error:
        told.append(str(error))
      assert flight.exists(), 'the second run deleted the save of the first'
      flight.rmdir()
    return False

  monkeypatch.setattr(checkpoint.StopSignal, 'reached', start_another)
  assert small(tmp_path) == 6
  assert len(told) == 2 and 'another m2l2 train is writing there' in told[1]


@pytest.mark.parametrize('holder, refused', [
  ({'pid': os.getpid(), 'began': files._began(os.getpid())}, True),
  ({'pid': os.getpid(), 'began': '1'}, False),  # its number was given out again
  ({'pid': 2 ** 22 + 1, 'began': '1'}, False),
  ({'host': 'elsewhere', 'pid': os.getpid(), 'began': files._began(os.getpid())}, False),
  (None, False)])
def test_a_stale_lock_is_taken_over(holder, refused, tmp_path, monkeypatch):
  """Of a killed process the system's lock is gone; where there are no such locks, the file tells."""
  path, said = tmp_path / '.lock', []
  about = {'host': socket.gethostname(), 'since': 'noon', **holder} if holder else 'garb'
  path.write_text(json.dumps(about))
  with files.locked(path, command='m2l2 train', place='there'):
    assert json.loads(path.read_text())['pid'] == os.getpid()
  assert not path.exists()

  def no_locks(*args):
    raise OSError(95, 'Operation not supported')

  path.write_text(json.dumps(about))
  monkeypatch.setattr(files.fcntl, 'flock', no_locks)
  monkeypatch.setattr(files.logging, 'warning', lambda text, *args: said.append(text % args))
  if refused:
    with pytest.raises(UserError, match='another m2l2 train is writing there'), files.locked(
        path, command='m2l2 train', place='there'):
      pass
  else:
    with files.locked(path, command='m2l2 train', place='there'):
      assert len(said) == 1 and 'start no other m2l2 train there' in said[0]


def test_a_lock_on_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # fails as a full disk does, when bytes get there
    with pytest.raises(UserError, match='there: cannot be written'), files.locked(
        tmp_path / '.lock', command='m2l2 train', place='there'):
      pass
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not os.listdir(tmp_path)


# In processes of their own.

IN_PROCESS = """
import functools, sys, time
import jax
process, count, port, workdir, music, steps = sys.argv[1:]
jax.config.update('jax_num_cpu_devices', 4 // int(count))
if count == '2':
  jax.distributed.initialize(f'localhost:{port}', 2, int(process))
import test_train
from absl import logging
from m2l2 import build, sharding
from m2l2.training import loop
logging.set_verbosity(logging.INFO)
build.step_functions, more = test_train.small_functions, {}
HOOK
sharding.param_shardings = functools.partial(sharding.param_shardings, min_size=1)
config = test_train.small_config(music, **{
  'mesh.preset': 'fsdp', 'mesh.fsdp': 2, 'train.steps': int(steps), 'train.probe_every': 2,
  'train.checkpoint_every': 1000 if count == '2' else 2, 'data.num_threads': 1, 'data.num_workers': 0, **more})
print('updates done:', loop.train(config, workdir))
"""


def stopped(workdir, music, *, steps, ready, processes=2, number=signal.SIGTERM, seconds=300, hook=''):
  """Starts one or two processes, sends a signal to the last once `ready(what it says)`. hook: lines that each runs
  before it trains.

  Returns the updates that each has done; of those who were killed, None.
  """
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  tests = os.path.dirname(__file__)
  environment = {**os.environ, 'PYTHONPATH': f'{tests}:{tests}/soak:{os.path.dirname(tests)}'}
  logs = [pathlib.Path(f'{workdir}.{i}.log') for i in range(processes)]
  started, end = [], time.monotonic() + seconds
  try:
    for index, path in enumerate(logs):
      with open(path, 'w') as log:
        started.append(subprocess.Popen(
          [sys.executable, '-c', IN_PROCESS.replace('HOOK', hook), str(index), str(processes), str(port), workdir,
           music, str(steps)],
          env=environment, stdout=log, stderr=subprocess.STDOUT))
    while not ready(logs[-1].read_text()) and time.monotonic() < end and all(p.poll() is None for p in started):
      time.sleep(0.02)
    started[-1].send_signal(number)
    while any(p.poll() is None for p in started) and time.monotonic() < end:
      time.sleep(0.05)
    said = [path.read_text() for path in logs]
    expected = -signal.SIGKILL if number == signal.SIGKILL else 0
    assert [p.poll() for p in started] == [expected] * processes, '\n'.join(said)
    return [None if expected else int(text.split('updates done: ')[1].split()[0]) for text in said]
  finally:
    for p in started:
      p.kill()
      p.wait(10)


def test_kill_9_and_then_on_to_the_end_equals_a_straight_run(small, tmp_path, music):
  """Of the one matrix; the shipped config, killed more often, is soak below."""
  run, steps = tmp_path / 'killed', 2000
  stopped(run, music, steps=steps, processes=1, number=signal.SIGKILL,
          hook="more = {'mesh.preset': 'dp', 'mesh.fsdp': 1, 'train.probe_every': 0}",
          ready=lambda said: len(soak_resume.trace(run)) >= 7)
  reached = steps_of(run)[-1]
  assert 7 <= reached < steps
  more = {'train.steps': reached + 5, 'train.checkpoint_every': 1000}
  for workdir in (run, tmp_path / 'straight'):
    assert small(workdir, **more) == reached + 5
  assert steps_of(run) == list(range(1, reached + 6))
  losses = [[line['loss'] for line in soak_resume.trace(w)] for w in (run, tmp_path / 'straight')]
  np.testing.assert_allclose(*losses, rtol=1e-5)  # on other devices


@pytest.mark.parametrize('again', [False, pytest.param(True, marks=pytest.mark.soak)])
def test_two_processes_train_as_one_and_stop_together_when_one_is_told(small, tmp_path, music, again):
  steps = 2000
  run = tmp_path / 'two'
  done = stopped(run, music, steps=steps, ready=lambda said: len(soak_resume.trace(run)) >= 5)
  assert 5 <= done[0] == done[1] < steps and steps_of(run) == list(range(1, done[0] + 1))
  assert checkpoint.latest(run / 'checkpoints') == done[0] and not (run / 'snapshot').exists()  # for that is no time
  if again:  # told before its first step, the resumed run stops too
    done = stopped(run, music, steps=steps, ready=lambda said: 'going on from' in said)
    assert done[0] == done[1] < steps and steps_of(run) == list(range(1, done[0] + 1))
  # One process with all its devices goes on from there, as if it had been alone from the start.
  more = {'train.steps': done[0] + 2, 'train.checkpoint_every': 1000}
  assert small(run, **more) == done[0] + 2
  small(tmp_path / 'one', **more)
  losses = [[line['loss'] for line in soak_resume.trace(w)] for w in (run, tmp_path / 'one')]
  np.testing.assert_allclose(*losses, rtol=1e-5)


# A snapshot that takes minutes to write; what each process has looked at, and for how long saving held its loop up.
SLOW_SAVES = """
import contextlib, os, time
more = {'train.checkpoint_every': 60, 'data.num_workers': 0}
started, held_up, look = False, [], os.stat

def slow(*args, save=loop.save_snapshot, **options):
  time.sleep(600)
  save(*args, **options)

def stat(path, **options):
  if started and '.array_record' in str(path):
    print('looked at', path)
  return look(path, **options)

@contextlib.contextmanager
def watched(workdir):
  global started
  started, last = True, ['', 0.]
  def progress(step, doing):
    if last[0] == 'saving':
      held_up.append(round(time.monotonic() - last[1], 3))
    last[:] = doing, time.monotonic()
  yield progress
  print('held up', held_up)

loop.save_snapshot, os.stat, loop.hosts.watched = slow, stat, watched
"""


@pytest.mark.soak
def test_two_processes_do_not_wait_for_a_snapshot_nor_look_at_the_data_again(tmp_path):
  data, run, told = write_prepared(tmp_path / 'music'), tmp_path / 'run', []

  def ready(said):
    if len(soak_resume.trace(run)) < 310:
      return False
    told.append(time.monotonic())
    return True

  done = stopped(run, str(data), steps=100_000, ready=ready, hook=SLOW_SAVES)
  seconds = time.monotonic() - told[0]
  assert 310 <= done[0] == done[1] == checkpoint.latest(run / 'checkpoints')
  assert not (run / 'snapshot').exists() and 'snapshot' not in os.listdir(run)
  said = [pathlib.Path(f'{run}.{i}.log').read_text() for i in range(2)]
  assert said[0].count('snapshot, and checkpoint to go on from') >= 5 and 'looked at' not in said[0] + said[1]
  for text in said:
    first, *rest = json.loads(text.split('held up ')[1].splitlines()[0])
    print(f'stopped within {seconds:.1f} s; saving held the loop up for {first} s, later {rest} s')
    assert first < 30 and min(rest) < 0.3  # the least disturbed of them: the machine may be busy
  assert seconds < 60


SLOW_READS = """
if process == '{slow}':
  from m2l2.data import transforms
  read = transforms.RandomCrop.__call__
  transforms.RandomCrop.__call__ = lambda self, index: (time.sleep(.3), read(self, index))[1]
"""


@pytest.mark.soak
@pytest.mark.parametrize('slow', [0, 1])
def test_the_process_whose_data_come_last_is_named(tmp_path, music, slow):
  run = tmp_path / 'two'
  path = run / 'metrics.jsonl'
  stopped(run, music, steps=2000, hook=SLOW_READS.format(slow=slow),
          ready=lambda said: path.exists() and path.read_text().count('\n') >= 8)
  waits = [(line['time/input_wait'], line['time/input_wait_process'])
           for line in map(json.loads, path.read_text().splitlines()[2:])]
  named = [index for _, index in waits]  # on a busy machine the other one is late now and then
  assert named.count(slow) > .8 * len(named) and max(waits)[0] > .3, waits
  assert (f'all wait for the data of process {slow} on {socket.gethostname()}: '
          in pathlib.Path(f'{run}.0.log').read_text())


# The shipped config, small.


def test_the_loop_with_a_real_network(tmp_path, music, monkeypatch):
  # On one device: of what several have alike, Orbax saves slices, and compiles hundreds of programs for them.
  monkeypatch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
  # Counting its FLOPs takes 10 s of tracing: test_timing.py does.
  monkeypatch.setattr(loop.timing, 'model_flops', lambda config: lambda steps: 1e9 * steps)
  config = small_config(music)
  config.model.alpha = nano.get_config('debug').model.alpha
  config.model.update(ONE_LEVEL)
  config.variants.shortcut.width = 2  # as in test_codec.py
  config.variants.head_start.share = 0.
  config.train.update(steps=2, checkpoint_every=10)
  assert loop.train(config, str(tmp_path), ()) == 2
  assert all(np.isfinite(line['loss']) for line in soak_resume.trace(tmp_path)) and steps_of(tmp_path) == [1, 2]
  model = codec.load(tmp_path)
  assert model.fingerprint == soak_resume.fingerprint(tmp_path)
  assert model.encode(np.zeros(3000, np.float32), 44100).z.shape == (1, 4, 8, 8)


# Again in processes of its own.

STEPS = {'train.steps': 60}  # more than two killed runs can do
SPREAD = {'mesh.preset': 'tp', 'mesh.fsdp': 2, 'mesh.tensor': 2, 'train.accumulate': 2}


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
  """The music and the cache of compiled programs of all runs below."""
  base = tmp_path_factory.mktemp('runs')
  return {'music': soak_resume.write_music(base / 'music'), 'cache': base / 'cache'}


@pytest.fixture(scope='module')
def runs(shared, tmp_path_factory):
  """{name: workdir} of a whole run and the start of one on 8 devices, made side by side."""
  base = tmp_path_factory.mktemp('whole')
  with concurrent.futures.ThreadPoolExecutor() as pool:
    straight = pool.submit(soak_resume.run, base / 'straight', fields=STEPS, **shared)
    spread = pool.submit(
      soak_resume.stopped_run, base / 'spread', signal.SIGKILL, fields={**STEPS, **SPREAD},
      devices=8, after_lines=12, **shared)
  code, text = straight.result()
  assert code == 0, text
  code, text = spread.result()
  assert code == -signal.SIGKILL, text
  return {'straight': base / 'straight', 'spread': base / 'spread'}


@pytest.mark.soak
def test_8_devices_and_2_microbatches_change_the_loss_by_rounding_only(runs):
  # A dozen steps: then rounding has grown through the updates (1e-6 at step 18, 1e-4 at step 40).
  losses = [[line['loss'] for line in soak_resume.trace(workdir)[:12]] for workdir in runs.values()]
  assert len(losses[1]) == 12
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.soak
def test_kill_9_twice_then_sigterm_then_on_to_the_end_equals_a_straight_run(
    runs, shared, tmp_path):
  run = tmp_path / 'run'
  rng = random.Random(os.getpid())
  for _ in range(2):
    code, text = soak_resume.killed_run(run, rng=rng, fields=STEPS, **shared)
    assert code == -signal.SIGKILL, text
  code, text = soak_resume.stopped_run(run, signal.SIGTERM, fields=STEPS, after_lines=1, **shared)
  assert code == 0 and 'run the same command to go on' in text.splitlines()[-1], text
  assert steps_of(run) == list(range(1, len(steps_of(run)) + 1))
  code, text = soak_resume.run(run, fields={**STEPS, 'train.keep_last': 2}, **shared)
  assert code == 0 and 'differs from the one it continues in train.keep_last: 3 -> 2' in text, text
  assert soak_resume.differences(runs['straight'], run) == []
