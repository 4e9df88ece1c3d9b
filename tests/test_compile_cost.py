"""launch/bench/compile_cost.py's reading of programs, and what XLA is told of a run."""

from unittest.mock import ANY

import pytest

from launch.bench import compile_cost
from m2l2 import build
from m2l2.configs import base, nano
from m2l2.kernels.chunk_causal import compiling_for

TEXT = """HloModule jit_f
%fused_computation (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %m = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(f)/jvp(student)/denoiser/mul"}
}
%body (p: (f32[4])) -> (f32[4]) {
  %q = (f32[4]{0}) parameter(0)
  %g = f32[4]{0} get-tuple-element(%q), index=0
  %c = f32[4]{0} copy(%g), metadata={op_name="jit(f)/transpose(jvp(student))/denoiser/layers/while/body/add"}
  ROOT %t = (f32[4]{0}) tuple(%c)
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %x = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(f)/jvp(student)/denoiser/mul"}
  %u = (f32[4]{0}) tuple(%x)
  %w = (f32[4]{0}) while(%u), condition=%cond, body=%body
  ROOT %y = f32[4]{0} negate(%x), metadata={op_name="jit(f)/neg"}
}
"""


def test_kernels_are_counted_where_they_were_traced():
  """A fusion is one, what lies in it is none; bodies of loops count; a gradient stands with its forward pass."""
  assert compile_cost.kernels(TEXT, depth=3) == {'student/denoiser': 1, 'student/denoiser/layers': 1, '(none)': 1}
  assert compile_cost.kernels(TEXT, depth=1) == {'student': 2, '(none)': 1}


def test_an_unknown_config_is_one_line():
  with pytest.raises(SystemExit, match='compile_cost: --config=nowhere'):
    compile_cost.preset('nowhere', compile_cost.ROOT)


def test_what_xla_is_told():
  """Short runs are compiled quickly, narrow models convolve by Eigen; both on CPUs alone."""
  level, library = 'xla_backend_optimization_level', 'xla_cpu_experimental_ynn_fusion_type'
  assert build.compiler_options(base.get_config()) == {}
  assert set(build.compiler_options(nano.get_config())) == {library}
  quick = build.compiler_options(nano.get_config('debug'))
  assert quick[level] == 0 and quick['xla_cpu_use_fusion_emitters'] is False
  with compiling_for('tpu'):
    assert build.compiler_options(nano.get_config('debug')) == {}
  config = nano.get_config('debug')
  config.train.compiler_options = f'{level}=2,xla_other=yes'
  assert build.compiler_options(config) == {level: '2', 'xla_other': 'yes', library: ANY}
