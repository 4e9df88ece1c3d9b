"""What the heartbeats of several processes tell together: time stands in the tests' hand."""

import pytest

from m2l2.training.watchdog import COMPUTING, MEASURING, SAVING, WAITING, Pace, Watchdog


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


def test_a_pace_counts_the_time_spent_waiting():
  clock = Clock()
  pace = Pace(clock)
  assert pace.told() == {}  # before the loop
  for doing, seconds in ((WAITING, 3), (COMPUTING, 5), (WAITING, 2)):
    pace.set(7, doing)
    clock.now += seconds
  assert pace.told() == {'step': 7, 'doing': WAITING, 'clock': 110.0, 'waited': 5.0}


def beat(step, doing=COMPUTING, *, clock=0., waited=0., host='a'):
  return {'beat': 1, 'host': host, 'step': step, 'doing': doing, 'clock': clock, 'waited': waited}


def seen(watchdog, beats, *, since=0, until=100, every=2):
  """What is told in that time, the beats staying as they are: [(second, still, straggler)]."""
  looks = [(now, *watchdog.look(beats, now)) for now in range(since, until, every)]
  return [look for look in looks if any(look[1:])]


def test_who_stands_still_is_the_one_behind():
  watchdog = Watchdog(limit=60, window=1000)
  beats = {0: beat(8), 1: beat(7, WAITING, host='b'), 2: beat(8)}
  for step in range(3):  # as long as there is progress, however slow
    assert seen(watchdog, {i: {**b, 'step': b['step'] + step} for i, b in beats.items()},
                since=60 * step, until=60 * step + 60) == []
  (now, still, _), *_ = seen(watchdog, {i: {**b, 'step': b['step'] + 3} for i, b in beats.items()},
                             since=180, until=300)
  assert now == 242  # 60 s after it was first seen there
  assert still == ('no progress for 62 s: process 1 (b), at step 10, waiting for data, the furthest at step 11, '
                   'computing')


@pytest.mark.parametrize('other', [COMPUTING, SAVING])
def test_where_all_are_at_one_step_the_one_that_is_there_longest_is_named(other):
  watchdog = Watchdog(limit=60, window=1000)
  watchdog.look({0: beat(7, WAITING), 1: beat(8, other, host='b')}, 0)
  (_, still, _), *_ = seen(watchdog, {0: beat(8, COMPUTING), 1: beat(8, other, host='b')}, since=2)
  assert still == f'no progress for 62 s: process 1 (b), at step 8, {other}'


def test_nobody_is_judged_while_one_measures_nor_outside_the_loop():
  watchdog = Watchdog(limit=60, window=1000)
  assert seen(watchdog, {0: beat(8, MEASURING), 1: beat(8)}, until=1000) == []
  assert seen(watchdog, {0: beat(8), 1: beat(8)}, since=1000, until=1060) == []  # from there on, time counts anew
  assert seen(watchdog, {0: {'beat': 5, 'host': 'a'}, 1: {'beat': 7, 'host': 'b'}}, since=1060, until=3000) == []


def shares(watchdog, *waiting, minutes, since=0):
  """[(second, straggler)] when each process waits for data for that share of its time, its clock beginning anywhere."""
  told = []
  for now in range(60 * since, 60 * (since + minutes) + 1, 2):
    beats = {i: beat(now, clock=1000. * i + now, waited=share * now, host=f'h{i}') for i, share in enumerate(waiting)}
    still, straggler = watchdog.look(beats, now)
    assert not still
    told += [(now, straggler)] if straggler else []
  return told


def test_who_holds_the_others_up_is_named_and_again_only_after_a_while():
  told = shares(Watchdog(limit=1000, window=60), .02, .01, .85, .03, minutes=15)
  assert told[0] == (60, 'process 2 (h2), at step 60, computing, holds the others up: 85% of its last 60 s went into '
                     'waiting for data, of theirs 2%')
  assert [now // 60 for now, _ in told] == [1, 11]


@pytest.mark.parametrize('waiting', [(.9, .9), (.0, .1), (.5,), (.8, .7, .9)])
def test_where_data_are_short_for_all_or_for_none_nobody_is_named(waiting):
  assert shares(Watchdog(limit=1000, window=60), *waiting, minutes=15) == []


def test_another_one_is_named_at_once():
  watchdog = Watchdog(limit=1000, window=60)
  assert [text[:9] for _, text in shares(watchdog, .9, .0, minutes=2)] == ['process 0']
  watchdog._began = None
  assert [text[:9] for _, text in shares(watchdog, .0, .9, minutes=2, since=3)] == ['process 1']
