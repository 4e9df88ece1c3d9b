"""A step of a run again: the run's own digits and samples, and the item, level and tensor that were not finite."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import soak_resume
from test_train import RATE, small_config
from test_train_step import TOY, _functions

from m2l2 import build, sharding
from m2l2.data.transforms import RandomCrop
from m2l2.errors import UserError
from m2l2.training import checkpoint, loop, main, preflight, replay

AXES = {'encoder': {'w': ('a', 'b')}, 'decoder': {'w': ('b', 'a')}, 'denoiser': {'w': ('a', 'a'), 'cond': ('a',)}}
BAD = 19  # sample: item 3 of step 3, at 8 a step


def _toy_functions(config, ravel=False):
  return _functions(network=dataclasses.replace(TOY, logical_axes=AXES), optimizer=optax.adam(1e-3),
                    native_rates=(RATE,), steps=config['train']['steps'], ravel=ravel)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(config, workdir) of six steps, saved every two; one sample of step 3 is infinite, wherever it is read."""
  music = soak_resume.write_music(tmp_path_factory.mktemp('music'), sample_rate=RATE)
  workdir, read = tmp_path_factory.mktemp('runs') / 'run', RandomCrop.__call__

  def call(self, index):
    sample = read(self, index)
    if index == BAD:
      sample['audio'][0, 100] = np.inf
    return sample

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, 'step_functions', _toy_functions)
    patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:2]))
    patch.setattr(RandomCrop, '__call__', call)
    patch.setattr(build, 'compiler_options', lambda config: {'xla_backend_optimization_level': 0})
    config = small_config(music)
    assert loop.train(config, str(workdir)) == 6
    yield config, workdir


def _files(workdir):
  return {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}


def test_the_item_level_and_tensor_are_told_and_nothing_is_written(run):
  config, workdir = run
  assert [line['loss'] is None for line in soak_resume.trace(workdir)] == [False, False, True, False, False, False]
  before = _files(workdir)
  finite, lines = replay.replay(config, workdir, 3)
  assert not finite and _files(workdir) == before
  assert lines[0] == 'step 3 again: loss nan, norm of gradients nan, as the run logged it'
  named = [line for line in lines if line.startswith('item ')]
  assert len(named) == 1 and named[0].startswith(f'item 3 (sample {BAD}, ') and '.wav) is not finite; ' in named[0]
  levels = [float(word) for word in named[0].split('teacher: ')[1].rstrip(':').replace(',', '').split()]
  assert len(levels) == 4 and all(.002 <= low < high <= 80 for high, low in zip(levels[::2], levels[1::2]))
  assert lines[2].startswith('  on the way to its loss nan: spectrogram, latents_before_bottleneck, latents, features')
  assert lines[3] == '  in its gradient: decoder/w, denoiser/cond, denoiser/w, encoder/w' and len(lines) == 4


def test_a_step_after_the_checkpoint_has_the_runs_own_digits(run):
  finite, lines = replay.replay(*run, 4)  # from checkpoint 2, over the bad step
  assert finite and lines[0].endswith(', as the run logged it') and lines[1] == 'all of it is finite'
  assert 'gradients of ' in lines[2] and sum('item ' in line and '.wav)' in line for line in lines) == replay.MOST
  finite, lines = replay.replay(*run, 1)  # from the first state
  assert finite and lines[0].endswith(', as the run logged it')


def test_a_bad_parameter_is_told(run, monkeypatch):
  restore = checkpoint.Checkpoints.restore_at

  def spoilt(self, *args, **options):
    restored = restore(self, *args, **options)
    params = dict(restored.state.params)
    params['denoiser'] = {**params['denoiser'], 'w': params['denoiser']['w'].at[0, 1].set(np.nan)}
    return dataclasses.replace(restored, state=dataclasses.replace(restored.state, params=params))

  monkeypatch.setattr(checkpoint.Checkpoints, 'restore_at', spoilt)
  finite, lines = replay.replay(*run, 5)
  assert not finite and 'not as the run logged it: loss ' in lines[0]
  assert lines[1] == 'not finite in the state before it: params/denoiser/w'
  assert lines[3].startswith('  on the way to its loss nan: student, teacher')
  assert lines[-1] == 'and 3 of 8 items more'


@pytest.mark.parametrize('step, workdir, says', [
  (0, 'run', '--replay=0: the steps of this run are 1 to 6'), (7, 'run', '--replay=7: the steps'),
  (3, 'none', '--replay=3: no run has begun in --workdir=')])
def test_what_cannot_be_replayed_is_one_clear_line(run, step, workdir, says):
  with pytest.raises(UserError) as error:
    replay.replay(run[0], run[1].parent / workdir, step)
  assert says in str(error.value) and '\n' not in str(error.value)
  assert [path.name for path in run[1].parent.iterdir()] == ['run']


def test_a_run_at_work_is_left_alone_and_a_checkpoint_that_cannot_be_read_is_named(run, monkeypatch):
  config, workdir = run
  with preflight.locked(str(workdir)), pytest.raises(UserError, match='another m2l2 train is writing there'):
    replay.replay(config, workdir, 4)
  monkeypatch.setattr(checkpoint.Checkpoints, '_read', lambda *args: 1 / 0)
  with pytest.raises(UserError, match='^checkpoint 2 in .* cannot be read .ZeroDivisionError'):
    replay.replay(config, workdir, 4)


@pytest.mark.parametrize('finite, status', [(True, 0), (False, 3)])
def test_the_status_tells_whether_all_was_finite(finite, status, monkeypatch, capsys):
  asked = []
  monkeypatch.setattr(replay, 'replay', lambda config, workdir, step: asked.append(step) or (finite, ['one', 'two']))
  flags = ['m2l2', '--config=tiny:debug', '--workdir=w', '--replay=7']
  assert main.main(flags) == status and asked == [7]
  assert capsys.readouterr().out == 'one\ntwo\n'
  assert main.main([*flags, '--check']) == 1
  assert 'm2l2: --check tells of a run and --replay of a step' in capsys.readouterr().err


def test_names_are_those_of_the_parameters():
  functions = _toy_functions(small_config('nowhere'))
  assert list(replay.by_path(jax.eval_shape(functions.init, jax.random.key(0)).params)) == [
    'decoder/w', 'denoiser/cond', 'denoiser/w', 'encoder/w']
