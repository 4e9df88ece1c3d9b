"""The guard warns of what lasts, once, with a cure."""

import re

from absl import logging
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2.training import config_file, guard, train_step


@pytest.fixture
def warned(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'warning', lambda text, *args: lines.append(text % args))
  return lines


def healthy(**ill):
  return {symptom.name: symptom.limit * (.5 if symptom.above else 2) for symptom in guard.SYMPTOMS} | ill


@pytest.mark.parametrize('symptom', guard.SYMPTOMS, ids=lambda symptom: symptom.name)
def test_each_symptom_is_told_once_until_it_is_gone(warned, symptom):
  ill = {symptom.name: symptom.limit * (2 if symptom.above else .5)}
  watch = guard.Guard()
  late = symptom.since
  for step in range(late - 10, late):  # too early
    watch.write(step, healthy(**ill))
  for step in range(late, late + guard.LASTING - 1):
    watch.write(step, healthy(**ill))
  assert not warned
  for step in range(late + guard.LASTING, late + 20):
    watch.write(step, healthy(**ill))
  assert len(warned) == 1 and symptom.name in warned[0] and symptom.cure in warned[0]
  watch.write(late + 21, healthy())
  for step in range(late + 22, late + 30):
    watch.write(step, {'loss': 1.} | healthy(**ill))
    watch.write(step, {'loss': 1.})  # lines without the figure change nothing
  assert len(warned) == 2


def test_a_healthy_run_hears_nothing(warned):
  watch = guard.Guard()
  for step in range(0, 10_000, 100):
    watch.write(step, healthy())
  assert not warned


def test_cures_name_fields_that_there_are():
  for symptom in guard.SYMPTOMS:
    fields = [word.strip(',;()') for word in symptom.cure.split() if re.match(r'\w+\.\w', word)]
    assert fields and set(fields) <= set(config_file.field_names())


def test_the_rank_of_latents():
  rng = np.random.default_rng(0)
  direction = jnp.asarray(rng.standard_normal((4, 2, 1, 1)) * np.ones((8, 64)), jnp.float32)
  many = jnp.asarray(rng.standard_normal((4, 2, 8, 64)), jnp.float32)
  for few in (direction, direction[:2], direction[:1]):  # 8, 4 and 2 chunks
    assert float(train_step.latent_metrics(few, few)['latent/rank']) == pytest.approx(0, abs=1e-3)
  assert float(train_step.latent_metrics(many, many)['latent/rank']) > .9
