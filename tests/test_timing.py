"""Speed, FLOPs and traces, by clocks that the tests turn."""

import types

import jax
import pytest

from m2l2 import build
from m2l2.configs import nano
from m2l2.errors import UserError
from m2l2.kernels.chunk_causal import compiling_for
from m2l2.planning.flops import count_flops
from m2l2.training import timing


def test_throughput_counts_from_one_logged_step_to_the_next():
  now = [0.0]
  speed = timing.Throughput(samples_per_step=8, seconds_per_sample=1.5, clock=lambda: now[0])
  speed.start(10)
  with speed.waiting():
    now[0] += 1.0
  now[0] += 3.0
  assert speed.rates(12) == {
    'time/steps_per_second': 0.5, 'time/samples_per_second': 4.0,
    'time/audio_seconds_per_second': 6.0, 'time/input_wait': 0.25}
  now[0] += 2.0
  got = speed.rates(14)
  assert got['time/steps_per_second'] == 1.0 and got['time/input_wait'] == 0.0


def test_no_process_is_named_where_all_wait_alike(caplog):  # before the next: it is told once in a while
  now = [0.0]
  speed = timing.Throughput(samples_per_step=8, seconds_per_sample=1.5, clock=lambda: now[0],
                            exchange=lambda word: {0: '0.45 slow storage', 1: word, 2: '0.5 slow storage'})
  speed.start(0)
  for step in (1, 2):
    with speed.waiting():
      now[0] += 0.45
    now[0] += 0.55
    assert speed.rates(step)['time/input_wait'] == 0.5
  assert not caplog.records


def test_the_process_whose_data_come_last_is_named(caplog):
  now, words = [0.0], []
  told = {0: '0.01 first', 2: '0.5 the third host'}
  speed = timing.Throughput(samples_per_step=8, seconds_per_sample=1.5, clock=lambda: now[0],
                            exchange=lambda word: (words.append(word), {**told, 1: word})[1])
  speed.start(0)
  for step in (1, 2, 3):
    with speed.waiting():
      now[0] += 1.0
    now[0] += 3.0
    rates = speed.rates(step)
    assert (rates['time/input_wait'], rates['time/input_wait_process']) == (0.5, 2)
  assert [word.split()[0] for word in words] == ['0.25'] * 3
  # Not of the first line, for which all wait, and not again at once.
  assert [record.getMessage() for record in caplog.records] == [
    'all wait for the data of process 2 on the third host: 50 % of its time']


def test_what_the_devices_could_take_is_the_demand(monkeypatch):
  config = nano.get_config('debug')
  config.train.update(batch_size=64, steps=10)
  monkeypatch.setattr(timing, 'peak_flops', lambda config: None)
  assert timing.demand(config, lambda n: 1e9 * n) is None
  monkeypatch.setattr(timing, 'peak_flops', lambda config: 1e12)
  assert timing.demand(config, lambda n: 1e9 * n) == pytest.approx(64 * 1000 * jax.local_device_count())


def test_flops_of_a_device_and_their_share_of_its_peak():
  now = [0.0]
  speed = timing.Throughput(
      samples_per_step=8, seconds_per_sample=1.5, clock=lambda: now[0], devices=4, peak=100e12,
      flops_until=lambda n: 1e12 * min(n, 3) + 40e12 * max(n - 3, 0))  # 3 cheap steps first
  speed.start(2)
  now[0] += 2.0
  rates = speed.rates(5)
  assert rates['time/tflops_per_second'] == pytest.approx((1 + 2 * 40) / 2 / 4)
  assert rates['time/mfu'] == pytest.approx((1 + 2 * 40) / 2 / 4 / 100)


def test_the_flops_of_a_run_do_not_depend_on_how_it_computes_them(monkeypatch):

  def step_functions(config, *, ravel):
    assert (config['model']['attention'], config['variants']['packing']['tile']) == ('xla', '0')

    remat = config['model']['remat']

    def train_step(state, batch, *, phase):
      product = batch['audio'][:, 0] @ state['w']
      return product if phase == 'head_start' else product @ state['w'] if remat == 'none' else None

    return types.SimpleNamespace(
        init=lambda key: {'w': jax.numpy.zeros((64, 64))}, ravel=lambda state: state, train_step=train_step, channels=1,
        crop_samples=64, phases=(('head_start', 4), ('consistency', config['train']['steps'])))

  monkeypatch.setattr(build, 'step_functions', step_functions)
  until = timing.model_flops(nano.get_config('debug'))  # which has model.remat = 'blocks'
  once = 2 * 8 * 64 * 64
  assert [until(n) for n in (0, 1, 4, 5, 10)] == [0, once, 4 * once, 6 * once, 16 * once]


def test_the_flops_of_a_step_are_those_that_xla_counts():
  config = nano.get_config('debug')
  config.update_from_flattened_dict({
      'model.widths': (8, 16), 'model.strides': ((4, 4),), 'model.blocks': (1, 1), 'model.layers': 1,
      'model.head_dim': 8, 'model.remat': 'none'})
  functions = build.step_functions(config)
  state = jax.eval_shape(functions.init, jax.random.key(0))
  shape = (config.train.batch_size, functions.channels, functions.crop_samples)
  with compiling_for('gpu'):  # no loop of more than one turn: XLA would count it once
    traced = jax.jit(functions.train_step).trace(state, {'audio': jax.ShapeDtypeStruct(shape, 'float32')})
  # XLA leaves out what a convolution does at borders, a tenth in so small a model, and adds what is no product.
  assert count_flops(traced.jaxpr.jaxpr).total == pytest.approx(traced.lower().cost_analysis()['flops'], rel=0.15)


def test_a_cpu_has_no_known_peak():
  assert timing.peak_flops(nano.get_config()) is None


@pytest.mark.parametrize('begin,expected', [(0, [(3, 5)]), (4, [(5, 5)]), (5, [])])
def test_a_trace_covers_its_range_or_the_rest_of_it(monkeypatch, begin, expected):
  spans, step = [], 0
  monkeypatch.setattr(timing.jax, 'profiler', types.SimpleNamespace(
      start_trace=lambda directory: spans.append([step]), stop_trace=lambda: spans[-1].append(step)))
  trace = timing.Trace('3:5', 'profile')
  for step in range(begin + 1, 9):
    trace.begin(step)
    trace.end(step, ())
  trace.close()
  assert [tuple(span) for span in spans] == expected


def test_a_trace_that_the_run_ends_in_is_closed(monkeypatch):
  calls = []
  monkeypatch.setattr(timing.jax, 'profiler', types.SimpleNamespace(
      start_trace=calls.append, stop_trace=lambda: calls.append('stop')))
  trace = timing.Trace('1:9', 'profile')
  trace.begin(1)
  trace.end(1, ())
  trace.close()
  trace.close()
  assert calls == ['profile', 'stop']


@pytest.mark.parametrize('steps', ['5', '5:3', '0:2', 'a:b', '1:2:3', '-1:2'])
def test_a_range_that_is_none_is_one_clear_line(steps):
  with pytest.raises(UserError, match='train.profile=.* FIRST:LAST') as error:
    timing.trace_range(steps)
  assert '\n' not in str(error.value)
