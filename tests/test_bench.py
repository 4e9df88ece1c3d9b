"""launch/bench/bench.py in this process, on models that compile in seconds."""

import json
import math
import os
import sys

from ml_collections import ConfigDict
import pytest
from test_train import small_functions

from launch.bench import bench
from m2l2 import build
from m2l2.configs import base, codicodec

SMALLEST = dict(stem=(4, 2), widths=(16,), strides=(), blocks=(1,), layers=1, head_dim=8, window=128, hop=32, bins=64,
                frames=8, remat='none')


def config_file(tmp_path, config, **model):
  config = json.loads(json.dumps(config.to_dict()))
  config['model'].update(model)
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(config))
  return str(path)


def run(capsys, *argv):
  """-> (exit status, the JSON or None, stderr)."""
  status = bench.main(list(argv))
  out, err = capsys.readouterr()
  return status, json.loads(out) if out else None, err


def measured(times):
  """Whether a measurement and its references are positive numbers."""
  numbers = [times['min'], times['median']]
  for reference in times.get('against', {}).values():
    assert reference['ratio']['min'] <= reference['ratio']['median'] <= reference['ratio']['max']
    numbers += [reference['min'], reference['median'], *reference['ratio'].values()]
  return all(number > 0 and math.isfinite(number) for number in numbers)


@pytest.mark.parametrize('real', [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_report(tmp_path, capsys, monkeypatch, real):
  """In float32, so that one train step and one codec are compiled; decoding is timed as encoding is."""
  if not real:  # the step of test_train.py, of one matrix: the real one takes 25 s to compile
    monkeypatch.setattr(build, 'step_functions', lambda config, ravel=False: small_functions(ConfigDict(config)))
  path = config_file(tmp_path, base.get_config('debug'), **SMALLEST)
  status, report, err = run(capsys, f'--config-json={path}', '--only=train,attention,encode', '--batch=2', '--steps=2',
                            '--seconds=.05', '--seed=3', '--peak-tflops=1')
  assert status == 0 and report['notes'] == [] and 'bench: attention' in err
  assert {'device', 'platform', 'jax', 'python', 'date', 'seed', 'threads', 'parameters'} <= report.keys()
  assert (report['platform'], report['seed'], report['dtype']) == ('cpu', 3, 'float32')
  train = report['train']
  assert measured(train['seconds_per_step']) and train['flops_per_step'] > 0 and train['batch'] == 2
  assert train['mfu'] == pytest.approx(train['flops_per_step'] / train['seconds_per_step']['median'] / 1e12)
  for direction in ('forward', 'forward_backward'):
    times = report['attention']['xla'][direction]
    assert measured(times) and times['against'].keys() == {'masked_dense'}
  assert 'needs a gpu' in report['attention']['cudnn'] and 'decode' not in report
  assert measured(report['encode']['seconds'])
  assert report['encode']['real_time_factor'] == pytest.approx(.05 / report['encode']['seconds']['median'])


def test_one_part_without_references(capsys):
  status, report, _ = run(capsys, '--config=nano:debug', '--only=attention', '--no-pairs', '--steps=1')
  assert status == 0 and not {'train', 'encode', 'decode'} & report.keys()
  assert measured(report['attention']['xla']['forward']) and 'against' not in report['attention']['xla']['forward']


def test_threads_are_those_of_the_cores_it_is_kept_to():
  before = os.sched_getaffinity(0)
  with bench.on_threads(1):
    assert len(os.sched_getaffinity(0)) == 1
  assert os.sched_getaffinity(0) == before


def test_runs_alternate_and_ratios_are_of_the_same_round(monkeypatch):
  """A machine that becomes slower and slower: seconds grow, ratios stay."""
  clock, slowness, calls = [0.0], [1.0], []

  def task(name, cost):
    def call():
      calls.append(name)
      clock[0] += cost * slowness[0]
      slowness[0] *= 1.0 if name == 'ours' else 2.0
      return 0
    return call

  monkeypatch.setattr(bench.time, 'perf_counter', lambda: clock[0])
  times = bench.seconds_of(task('ours', 1.0), {'theirs': task('theirs', 3.0)}, count=3)
  assert calls == ['ours', 'theirs'] * 5
  assert times['runs'] == 3 and times['min'] == 4 and times['median'] == 8
  assert times['against']['theirs'] == {'min': 12, 'median': 24, 'runs': 3,
                                        'ratio': {'median': 3, 'min': 3, 'max': 3}}


@pytest.mark.parametrize('changes,attention,remat,expected', [
    ({}, 'auto', '', set()), ({'dtype': 'bfloat16'}, 'auto', 'blocks', {'float32'}),
    ({}, 'auto', 'none,blocks,full', {'remat_blocks', 'remat_full'}), ({}, 'cudnn', '', {'attention_xla'})])
def test_references_of_the_train_step(changes, attention, remat, expected):
  args = bench.parse(['--remat', remat] if remat else [])
  model = {'dtype': 'float32', 'attention': attention, 'remat': remat.split(',')[0] or 'blocks', **changes}
  assert bench.train_references({'model': model}, args).keys() == expected


@pytest.mark.parametrize('argv,said', [
    (['--config=nowhere'], '--config=nowhere: there is no such preset or file'),
    (['--config-json=/nowhere.json'], '/nowhere.json: cannot be read'),
    (['--config=nano:debug', '--threads=1000000'], '--threads=1000000: there are'),
    (['--config=nano:debug', '--torch', '--dtype=bfloat16', '--threads=1'], '--torch compares float32 on the CPU'),
    (['--config=nano:debug', '--torch', '--threads=1'],
     '--torch compares with the original, and codicodec is not installed')])
def test_bad_input_is_one_line(capsys, monkeypatch, argv, said):
  monkeypatch.setitem(sys.modules, 'codicodec', None)  # as where it is not installed
  monkeypatch.delitem(sys.modules, 'launch.bench.torch_reference', raising=False)
  status, report, err = run(capsys, *argv)
  assert status == 1 and report is None
  assert err.startswith(f'bench: {said}') or f'bench: --torch runs the original beside m2l2, and {said}' in err
  assert err.count('\n') == 1


@pytest.mark.parametrize('argv', [
    ['--only=trian'], ['--steps=0'], ['--batch=0'], ['--seconds=-1'], ['--threads=0'], ['--seed=-1'], ['--remat=some'],
    ['--torch', '--no-pairs']])
def test_bad_flags_say_what_is_allowed(capsys, argv):
  with pytest.raises(SystemExit) as exit:
    bench.parse(argv)
  assert exit.value.code == 2 and 'error: --' in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def small_codicodec(tmp_path):
  config = codicodec.get_config('debug')
  # The package has one number for both.
  return config_file(tmp_path, config, registers=config.variants.denoiser.registers)


@pytest.mark.torch
def test_the_original_beside_ours(small_codicodec, capsys):
  """The same loss and gradient on both sides, or the ratio would say nothing."""
  status, report, err = run(capsys, f'--config-json={small_codicodec}', '--torch', '--threads=1', '--batch=2',
                            '--steps=2', '--seconds=.1', '--only=train,encode,decode')
  assert status == 0, err
  assert report['torch'].startswith('torch ')
  same = report['train']['torch_agreement']
  assert same['relative_difference_of_loss'] < 1e-5 and same['relative_difference_of_gradient_norm'] < 1e-5
  for times in (report['train']['seconds_per_step'], report['encode']['seconds'], report['decode']['seconds']):
    assert measured(times) and 'torch' in times['against']


@pytest.mark.torch
def test_another_computation_is_refused(small_codicodec, capsys, monkeypatch):
  from launch.bench import torch_reference
  make = torch_reference.make_network

  def changed(arch, *, seed):
    network, params = make(arch, seed=seed)
    params['decoder']['mask'] = 1.01 * params['decoder']['mask']
    return network, params

  monkeypatch.setattr(torch_reference, 'make_network', changed)
  status, _, err = run(capsys, f'--config-json={small_codicodec}', '--torch', '--threads=1', '--batch=2',
                       '--only=train')
  assert status == 1 and 'not the same step' in err


@pytest.mark.torch
def test_only_its_own_architecture(capsys):
  status, _, err = run(capsys, '--config=nano:debug', '--torch', '--threads=1', '--only=train')
  assert status == 1 and err == 'bench: --torch compares with CoDiCodec: take --config=codicodec\n'
