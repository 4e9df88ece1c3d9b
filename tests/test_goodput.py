"""Where a run's time goes, by a clock that the tests turn: every second has one cause."""

import json

import pytest

from m2l2.training import goodput


class Clock:
  """Begins at 1000 s."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now

  def start(self, path, *, step):
    return goodput.Goodput(path, step=step, began=self.now, clock=self)


def _seconds(counted, clock):
  """What each cause has taken so far, in seconds."""
  return {cause: round(share * (clock.now - 1000), 6) for cause, share in counted.shares().items() if share}


def test_every_second_of_a_killed_run_has_a_cause(tmp_path):
  clock, path = Clock(), tmp_path / 'goodput.json'
  first = clock.start(path, step=0)
  clock.now += 3
  first.enter(goodput.COMPILE)
  clock.now += 10
  first.enter(goodput.INIT)
  clock.now += 1
  first.enter(goodput.UPDATES)
  clock.now += 20                   # steps 1 and 2
  with first.waiting(lambda: False):
    clock.now += 4
  with first.waiting(lambda: True):  # the devices were at work: nothing lost
    clock.now += 6
  with first.saving(2, ()):
    clock.now += 5
  with first.measuring(()):
    clock.now += 2
  assert _seconds(first, clock) == {
      'updates': 26, 'init': 4, 'compile': 10, 'input': 4, 'save': 5, 'evaluate': 2}
  assert first.rates()['time/goodput'] == pytest.approx(26 / 51)
  assert first.rates()['time/lost_compile'] == pytest.approx(10 / 51)
  clock.now += 30                   # steps 3 and 4: killed, and away for 15 s
  clock.now += 15
  second = clock.start(path, step=2)
  clock.now += 7
  second.enter(goodput.UPDATES)
  clock.now += 8
  # 2 s of measuring were after the save: they are lost with the updates.
  assert _seconds(second, clock) == {
      'updates': 26 + 8, 'init': 4 + 7, 'compile': 10, 'input': 4, 'save': 5, 'restart': 2 + 30 + 15}
  assert second.rates()['time/restarts'] == 1
  assert sum(value for name, value in second.rates().items() if name != 'time/restarts') == pytest.approx(1)
  with second.saving(4, ()):
    pass
  third = clock.start(path, step=2)  # checkpoint 4 turns out to be unreadable
  assert _seconds(third, clock)['restart'] == 2 + 30 + 15 + 7 + 8
  assert str(third) == 'updates 23.4%, init 3.6%, compile 9.0%, input 3.6%, save 4.5%, restart 55.9%'


def test_a_run_killed_before_its_first_save_has_lost_all_of_it(tmp_path):
  clock, path = Clock(), tmp_path / 'goodput.json'
  clock.start(path, step=0).enter(goodput.UPDATES)
  clock.now += 50
  again = clock.start(path, step=0)
  again.enter(goodput.UPDATES)
  clock.now += 50
  assert _seconds(again, clock) == {'restart': 50, 'updates': 50}


@pytest.mark.parametrize('text', [
    '', '{"began": 1}', '[]', '{"beg', '{"began": 1, "starts": 3, "seconds": {"2": 4.0}}',
    '{"began": 1, "starts": 3, "saved": {"2": {"until": 4.0}}}', '{"began": 1, "starts": 3, "saved": []}'])
def test_an_unreadable_file_begins_a_new_count(tmp_path, text):
  path, clock = tmp_path / 'goodput.json', Clock()
  path.write_text(text)
  clock.start(path, step=5)
  assert json.loads(path.read_text()) == {'began': 1000.0, 'starts': 1, 'saved': {}}


def test_without_a_file_it_counts_all_the_same():
  clock = Clock()
  counted = clock.start(None, step=3)
  clock.now += 5
  assert _seconds(counted, clock) == {'init': 5}
