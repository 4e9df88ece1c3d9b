"""Traffic and collectives of programs small enough to count by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import pytest

from m2l2 import hlo


def compiled(function, *arrays):
  return jax.jit(function).lower(*arrays).compile().as_text()


def test_bytes_of_types_and_of_their_padding_to_tiles():
  assert hlo.type_bytes('f32[3,5]{1,0}') == 60
  assert hlo.type_bytes('(bf16[4], pred[], s32[2,2]{1,0})') == 8 + 1 + 16
  assert hlo.type_bytes('bf16[2,9,64]{2,1,0:T(8,128)(2,1)}') == 2 * 2 * 16 * 128
  assert hlo.type_bytes('bf16[2,9,64]{0,2,1:T(8,128)(2,1)}') == 2 * 128 * 9 * 64
  assert hlo.type_bytes('f32[100]{0:T(256)}') == 4 * 256
  on_chip = 'bf16[2,9,64]{2,1,0:T(8,128)(2,1)S(1)}'
  assert hlo.type_bytes(on_chip) == 0 and hlo.type_bytes(on_chip, anywhere=True) == 2 * 2 * 16 * 128


def test_one_operation_reads_its_operands_and_writes_its_result():
  x = jax.ShapeDtypeStruct((1000,), jnp.float32)
  assert hlo.count_traffic(compiled(lambda a, b: a * b + a, x, x)).accessed == 3 * 4000


def test_a_loop_counts_as_often_as_it_runs():
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)

  def product(x, count):
    return jax.lax.scan(lambda y, _: (y @ y, None), x, length=count)[0]

  ten, thirty, fifty = (hlo.count_traffic(compiled(lambda x, n=n: product(x, n), x)).accessed for n in (10, 30, 50))
  assert fifty - thirty == thirty - ten
  assert 2 <= (fifty - thirty) / 20 / (64 * 64 * 4) <= 5  # operand and result, and at most a copy between them


def test_collectives_by_kind_also_in_a_loop():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  split, whole = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
  x = jax.ShapeDtypeStruct((80, 16), jnp.float32, sharding=split)
  total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole).lower(x).compile()
  assert dict(hlo.count_traffic(total.as_text()).collectives) == {'all-reduce': 64}
  gathered = jax.jit(lambda x: x, out_shardings=whole).lower(x).compile()
  assert dict(hlo.count_traffic(gathered.as_text()).collectives) == {'all-gather': 80 * 16 * 4}

  def often(x):
    def add(carry, _):
      return carry + jax.lax.with_sharding_constraint(jnp.sum(x * carry[None], axis=0), P()), None
    return jax.lax.scan(add, jnp.ones(16), length=7)[0]

  with jax.set_mesh(mesh):
    looped = jax.jit(often, out_shardings=whole).lower(x).compile()
  assert dict(hlo.count_traffic(looped.as_text()).collectives) == {'all-reduce': 7 * 64}


def test_the_tpu_compilers_estimate_is_summed_over_trips():
  text = '''HloModule m
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=0
  %y = f32[8]{0} negate(%x), backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[], f32[8]{0}) tuple(%n, %y)
}
ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}
}
'''
  traffic = hlo.count_traffic(text)
  assert (traffic.cycles, traffic.accessed) == (1200, 12 * 64)


def test_only_main_memory_counts():
  text = '''HloModule m
ENTRY %main (a: f32[64,128]) -> f32[8,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %s = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:8], [0:128]}
  %d = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s)
  %n = f32[8,128]{1,0:T(8,128)S(1)} negate(%d)
  ROOT %c = f32[8,128]{1,0:T(8,128)} copy(%n)
}
'''
  assert hlo.count_traffic(text).accessed == 2 * 8 * 128 * 4  # the slice is read, the copy written


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.count_traffic('nothing')
