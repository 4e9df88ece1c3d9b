"""The table of chips: found by device_kind, and in agreement with what JAX's own kernel library says of TPUs."""

import collections

import jax
from jax.experimental.pallas import tpu as pltpu
import pytest

from m2l2.errors import UserError
from m2l2.planning import chips
from m2l2.training import programs


def test_names_and_kinds_are_each_of_one_chip():
  for field in ([chip.name for chip in chips.CHIPS], [k for chip in chips.CHIPS for k in chip.device_kinds]):
    assert max(collections.Counter(field).values()) == 1
  assert chips.find_chip('TPU v5 lite').name == 'v5e' and chips.find_chip('NVIDIA L4').name == 'L4'
  assert chips.find_chip('cpu') is None and chips.find_chip('NVIDIA L400') is None


# JAX rounds its figures, and takes v5p's bandwidth and v3's peak from elsewhere: hence what is left out.
@pytest.mark.parametrize('name,version,cores', [
    ('v2', 'V2', 1), ('v4', 'V4', 2), ('v5e', 'V5E', 1), ('v5p', 'V5P', 2), ('v6e', 'V6E', 1), ('7x', '7X', 1)])
def test_tpus_agree_with_jax(name, version, cores):
  chip = chips.BY_NAME[name]
  told = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[f'TPU_{version}'], cores)
  assert chip.bf16_flops == pytest.approx(told.bf16_ops_per_second * cores, rel=0.005)
  assert chip.hbm_bytes == pytest.approx(told.hbm_capacity_bytes * cores, rel=0.08)
  assert chip.matrix_unit == told.mxu_column_size
  # A unit of 128 multiplies and adds once a cycle in each of its places; those of 256 have a peak of twice that.
  in_a_cycle = 2 * told.num_mxus * cores * chip.matrix_unit**2 * (2 if chip.matrix_unit == 256 else 1)
  assert chip.clock * in_a_cycle == pytest.approx(chip.bf16_flops, rel=.01)
  if name != 'v5p':
    assert chip.hbm_bytes_per_second == pytest.approx(told.mem_bw_bytes_per_second * cores, rel=0.03)


def test_peaks_by_dtype():
  v5e, t4, a100 = (chips.BY_NAME[name] for name in ('v5e', 'T4', 'A100-80'))
  assert v5e.flops('float32') == v5e.flops('bfloat16') == 197e12   # one bfloat16 pass is JAX's default there
  assert t4.flops('bfloat16') is None and t4.flops('float32') == 8.1e12
  assert a100.flops('float32') == a100.flops('bfloat16') / 2


def test_options_for_the_compiler():
  assert chips.compiler_options('') == {}
  assert chips.compiler_options('a=3, b=x=y') == {'a': '3', 'b': 'x=y'}


def test_options_that_are_none_are_one_clear_line():
  for asked in ('fast', 'fast=', '=1'):
    with pytest.raises(UserError, match=f"^train.compiler_options='{asked}': it takes NAME=VALUE"):
      chips.compiler_options(asked)
  lowered = jax.jit(lambda x: x).lower(1.)
  with pytest.raises(UserError, match='^train.compiler_options: .*xla_nothing') as error:
    programs.compiled(lowered, {'xla_nothing': '1'})
  assert '\n' not in str(error.value)
