"""What is said before waits for the compiler."""

import gc
import logging
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_codec import make_config, make_params

from m2l2 import compiling, no_collection
from m2l2.codec import programs
from m2l2.codec.codec import Codec
from m2l2.compiling import Told, told

LOWERED, COMPILED = compiling._LOWERED, compiling._COMPILED


@pytest.fixture
def said(caplog, monkeypatch):
  """`said()`: the lines since it was last called, once all that wait for their moment have had it."""
  monkeypatch.setattr(compiling, '_PATIENCE', 0.0)

  def lines():
    for thread in threading.enumerate():
      if isinstance(thread, threading.Timer):
        thread.join(5)
    messages = [record.getMessage() for record in caplog.records if record.name == 'm2l2.compiling']
    caplog.clear()
    return messages
  return lines


def test_a_long_wait_is_told_and_a_short_one_is_not(said, monkeypatch):
  tell = jax.monitoring.record_event_duration_secs
  tell(LOWERED, 1.5)
  assert said() == []  # somebody else's program
  with told():
    tell(LOWERED, 0.1)
    assert said() == []
    tell(LOWERED, 1.5)
    [line] = said()
    assert line.startswith('compiling, about 30 s') and ('kept' in line) == bool(jax.config.jax_compilation_cache_dir)
    with told():
      tell(COMPILED, 30.0)
      assert said() == []
  monkeypatch.setattr(compiling, '_PATIENCE', 0.2)
  with told():
    tell(LOWERED, 1.5)
    tell(COMPILED, 0.4)  # it was in the cache
  with told():
    tell(LOWERED, 1.5)  # and was compiled by nobody
  time.sleep(0.3)
  assert said() == []


@pytest.fixture
def any_lowering(monkeypatch):
  """Makes each count as long, and told at once -> the timers that did so."""
  monkeypatch.setattr(compiling, '_PER_LOWERING', 10 ** 9)
  started = []
  monkeypatch.setattr(threading.Timer, 'start', lambda timer: started.append(timer) or timer.function(*timer.args))
  return started


def test_jax_tells_when_it_compiles(said, any_lowering):
  program = Told(jax.jit(lambda x: jnp.sin(x) * 3))
  for size in (7, 7, 8):
    program(jnp.ones(size))
  assert len(said()) == 2 == program._cache_size()  # the attributes are the function's
  assert all(timer.finished.is_set() for timer in any_lowering)


def test_the_programs_of_a_codec_are_told(said, any_lowering, monkeypatch):
  monkeypatch.setattr(programs, 'compiled_programs', programs.compiled_programs.__wrapped__)  # none of others
  config = make_config()
  codec = Codec(config=config, params=make_params(config), fingerprint='any')
  codec.encode(np.ones((1, 500), np.float32), 44100)
  assert [line.partition(', about ')[0] for line in said()] == ['compiling']
  told = vars(codec._programs)
  assert len(told) == 4 and all(isinstance(program, Told) for program in told.values())
  assert logging.getLogger('m2l2.compiling').isEnabledFor(logging.WARNING)


def test_garbage_is_not_collected_while_a_program_is_traced():
  seen = []

  def traced(x):
    seen.append(gc.isenabled())
    return x

  Told(jax.jit(traced))(jnp.ones(3))
  assert seen == [False] and gc.isenabled()
  with pytest.raises(ValueError), no_collection():
    raise ValueError
  assert gc.isenabled()
  gc.disable()
  try:
    with no_collection():
      pass
    assert not gc.isenabled()  # the user's choice
  finally:
    gc.enable()
