"""Traffic and collectives of programs small enough to count by hand."""

import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from m2l2.errors import UserError
from m2l2.planning import hlo
from m2l2.planning.traffic import count_traffic


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
  assert count_traffic(compiled(lambda a, b: a * b + a, x, x)).accessed == 3 * 4000


def test_a_loop_counts_as_often_as_it_runs():
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)

  def product(x, count):
    return jax.lax.scan(lambda y, _: (y @ y, None), x, length=count)[0]

  ten, thirty, fifty = (count_traffic(compiled(lambda x, n=n: product(x, n), x)).accessed for n in (10, 30, 50))
  assert fifty - thirty == thirty - ten
  assert 2 <= (fifty - thirty) / 20 / (64 * 64 * 4) <= 5  # operand and result, and at most a copy between them


def test_collectives_by_kind_also_in_a_loop():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  split, whole = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
  x = jax.ShapeDtypeStruct((80, 16), jnp.float32, sharding=split)
  total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole).lower(x).compile()
  assert dict(count_traffic(total.as_text()).collectives) == {'all-reduce': 64}
  gathered = jax.jit(lambda x: x, out_shardings=whole).lower(x).compile()
  assert dict(count_traffic(gathered.as_text()).collectives) == {'all-gather': 80 * 16 * 4}

  def often(x):
    def add(carry, _):
      return carry + jax.lax.with_sharding_constraint(jnp.sum(x * carry[None], axis=0), P()), None
    return jax.lax.scan(add, jnp.ones(16), length=7)[0]

  with jax.set_mesh(mesh):
    looped = jax.jit(often, out_shardings=whole).lower(x).compile()
  assert dict(count_traffic(looped.as_text()).collectives) == {'all-reduce': 7 * 64}


LOOP = '''HloModule m
%counts (q: s32[]) -> s32[] {
  %q = s32[]{:T(128)} parameter(0)
  %step = s32[]{:T(128)} constant(STEP)
  ROOT %sum = s32[]{:T(128)} add(%q, %step)
}
%cond (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(LIMIT)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=DIRECTION
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %k = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %next = s32[]{:T(128)S(6)} fusion(%k), kind=kLoop, calls=%counts
  %y = f32[8]{0} negate(%x), backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%next, %y)
}
ENTRY %main (a: f32[8], b: s32[]) -> (s32[], f32[8]) {
  %a = f32[8]{0} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %begin = s32[]{:T(128)} constant(BEGIN)
  %carried = (s32[]{:T(128)}, f32[8]{0}) tuple(%begin, %a)
  ROOT %w = (s32[], f32[8]{0}) while(%carried), condition=%cond, body=%body, metadata={op_name="jit(f)/x/while"}
}
'''


def loop(begin=0, step=1, limit=12, direction='LT'):
  text = LOOP
  for name, value in (('BEGIN', begin), ('STEP', step), ('LIMIT', limit), ('DIRECTION', direction)):
    text = text.replace(name, str(value))
  return text


@pytest.mark.parametrize('values,trips', [
    ({}, 12), ({'direction': 'LE'}, 13), ({'begin': 2, 'step': 5}, 2), ({'limit': 0}, 0),
    ({'begin': 11, 'step': -1, 'limit': 0, 'direction': 'GE'}, 12),
    ({'begin': 4, 'step': -2, 'limit': -6, 'direction': 'NE'}, 5)])
def test_trips_and_estimates_where_the_loop_has_no_count(values, trips):
  traffic = count_traffic(loop(**values))
  assert (traffic.cycles, traffic.accessed) == (100 * trips, 64 * trips)


def test_a_real_loop_of_the_tpus_compiler():
  """libtpu 0.0.42.1 for v5e: a scan over 12 layers, y [8, 128] = y w [128, 128] in bfloat16."""
  text = (pathlib.Path(__file__).parent / 'programs' / 'v5e_scan.hlo').read_text(encoding='utf-8')
  assert 'known_trip_count' not in text
  traffic = count_traffic(text)
  assert traffic.cycles == 12 * (1824 + 3938)
  product = traffic.parts['layers', 'product']
  assert (product.count, product.cycles, product.flops) == (12, 12 * 3938, 12 * 2 * 8 * 128 * 128)
  assert product.accessed == 12 * 2 * 128 * 128  # the activations stay on the chip
  assert set(traffic.unestimated) == {'copy', 'element-wise'}  # into the chip and out of it; the count


def test_a_printed_count_is_taken():
  text = loop(begin=5).replace('body=%body,', 'body=%body, backend_config={"known_trip_count":{"n":"3"}},')
  assert count_traffic(text).cycles == 300


@pytest.mark.parametrize('before,after', [
    ('tuple(%begin, %a)', 'tuple(%b, %a)'),                # it begins where nobody knows
    ('add(%q, %step)', 'shift-left(%q, %step)'),           # its steps are none that are known here
    ('compare(%i, %limit)', 'compare(%i, %elsewhere)'),
    ('constant(1)', 'constant(0)'),                        # it would never end
])
def test_a_loop_that_does_not_tell_is_an_error_that_names_it(before, after):
  assert before in loop()
  with pytest.raises(UserError, match='^%w, a loop of the compiled program .x.: .*condition %cond does not tell'):
    count_traffic(loop().replace(before, after))


def test_a_limit_that_an_outer_loop_carries_along_is_known_in_the_inner():
  text = '''HloModule m
%inner_cond (c: (s32[], s32[])) -> pred[] {
  %c = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] get-tuple-element(%c), index=1
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
%inner (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%p), index=0
  %limit = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%k, %one), backend_config={"estimated_cycles":"7"}
  ROOT %t = (s32[], s32[]) tuple(%next, %limit)
}
%outer_cond (c: (s32[], s32[])) -> pred[] {
  %c = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
%outer (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%p), index=0
  %limit = s32[] get-tuple-element(%p), index=1
  %zero = s32[] constant(0)
  %in = (s32[], s32[]) tuple(%zero, %limit)
  %w = (s32[], s32[]) while(%in), condition=%inner_cond, body=%inner
  %one = s32[] constant(1)
  %next = s32[] add(%k, %one)
  ROOT %t = (s32[], s32[]) tuple(%next, %limit)
}
ENTRY %main () -> (s32[], s32[]) {
  %zero = s32[] constant(0)
  %five = s32[] constant(5)
  %in = (s32[], s32[]) tuple(%zero, %five)
  ROOT %w = (s32[], s32[]) while(%in), condition=%outer_cond, body=%outer
}
'''
  assert count_traffic(text).cycles == 3 * 5 * 7


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
  assert count_traffic(text).accessed == 2 * 8 * 128 * 4  # the slice is read, the copy written


def test_an_update_in_place_counts_for_what_is_new_also_in_a_nested_fusion():
  text = '''HloModule m
%inner (p: f32[12,128], u: f32[1,128], i: s32[]) -> f32[12,128] {
  %p = f32[12,128]{1,0} parameter(0)
  %u = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %d = f32[12,128]{1,0} dynamic-update-slice(%p, %u, %i, %zero)
}
%outer (p: f32[12,128], u: f32[1,128], i: s32[]) -> f32[12,128] {
  %p = f32[12,128]{1,0} parameter(0)
  %u = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[12,128]{1,0} fusion(%p, %u, %i), kind=kLoop, calls=%inner
}
ENTRY %main (p: f32[12,128], u: f32[1,128], i: s32[]) -> f32[12,128] {
  %p = f32[12,128]{1,0} parameter(0)
  %u = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[12,128]{1,0} fusion(%p, %u, %i), kind=kLoop, calls=CALLED
}
'''
  for called in ('%inner', '%outer'):
    assert count_traffic(text.replace('CALLED', called)).accessed == 2 * 128 * 4 + 4  # read, written; where


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    count_traffic('nothing')


def program_of(instruction, parameters):
  """The text of a program of one instruction over parameters %a, %b of these types."""
  lines = [f'  %{name} = {kind} parameter({n})' for n, (name, kind) in enumerate(zip('ab', parameters))]
  return '\n'.join(['HloModule m', 'ENTRY %main () -> f32[] {', *lines, f'  ROOT %r = {instruction}', '}'])


@pytest.mark.parametrize('instruction,parameters,flops', [
    # 3x3 with padding: of 9 taps of each of 8 x 6 places those in the map
    ('f32[2,8,6,5] convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f',
     ('f32[2,8,6,4]', 'f32[3,3,4,5]'), 2 * 2 * (8 * 3 - 2) * (6 * 3 - 2) * 4 * 5),
    # its input's gradient at stride 2: zeros between the elements count for nothing
    ('f32[1,8,1] convolution(%a, %b), window={size=2 pad=1_1 lhs_dilate=2}, dim_labels=b0f_0io->b0f',
     ('f32[1,4,1]', 'f32[2,1,1]'), 2 * 8),
    # a product, as the TPU's compiler writes it, and one of 16 pairs of matrices
    ('bf16[32,5] convolution(%a, %b), dim_labels=bf_io->bf', ('bf16[32,7]', 'bf16[7,5]'), 2 * 32 * 7 * 5),
    ('f32[16,32,5] convolution(%a, %b), window={size=16 pad=0_0 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf',
     ('f32[16,32,7]', 'f32[16,7,5]'), 2 * 16 * 32 * 7 * 5),
    ('f32[16,32,5] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, '
     'rhs_contracting_dims={1}', ('f32[16,32,7]', 'f32[16,7,5]'), 2 * 16 * 32 * 7 * 5),
    ('f32[8] negate(%a)', ('f32[8]',), 0)])
def test_flops_as_executed(instruction, parameters, flops):
  (part,) = count_traffic(program_of(instruction, parameters)).parts.values()
  assert part.flops == flops


@pytest.mark.parametrize('instruction,kind', [
    ('f32[4,4] convolution(%a, %b), dim_labels=bf_io->bf, metadata={op_name="jit(f)/mlp/dot_general"}', 'product'),
    ('f32[4,4] convolution(%a, %b), dim_labels=bf_io->bf, metadata={op_name="jit(f)/mlp/conv_general_dilated"}',
     'convolution'),
    ('f32[4] all-reduce(%a), to_apply=%sum, metadata={op_name="jit(f)/mlp/add"}', 'collective'),
    ('f32[4] copy(%a), metadata={op_name="jit(f)/mlp/add"}', 'copy'),
    ('f32[4] sort(%a), metadata={op_name="jit(f)/mlp/sort"}', 'sort'),
    ('f32[4] custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/mlp/call"}, '
     'backend_config={"cost_estimate":{"flops":"90","bytes_accessed":"8"}}', 'kernel'),
    ('f32[4] custom-call(%a), custom_call_target="Other", metadata={op_name="jit(f)/mlp/x"}', 'custom-call Other'),
    ('f32[4] add(%a, %b), metadata={op_name="jit(f)/mlp/add"}', 'element-wise')])
def test_operations_by_scope_and_kind(instruction, kind):
  text = program_of(instruction, ('f32[4,4]', 'f32[4,4]'))
  traffic = count_traffic(text)
  assert list(traffic.parts) == [('mlp', kind)]
  # None has an estimate: all are listed but for a kernel, which tells its own FLOPs.
  assert list(traffic.unestimated) == ([] if kind == 'kernel' else [kind])
  assert traffic.parts['mlp', kind].flops == 90 or kind != 'kernel'
  told = count_traffic(text.replace('metadata=', 'backend_config={"estimated_cycles":"5"}, metadata='))
  assert told.cycles == 5 and not told.unestimated


def test_the_scope_of_a_gradient_is_that_of_what_it_is_of():
  name = 'jit(f)/transpose(jvp(student))/denoiser/layers/while/body/closed_call/mlp/jit(silu)/mul'
  assert hlo.find_scope(f'metadata={{op_name="{name}"}}') == 'student/denoiser/layers'
  assert hlo.find_scope(f'metadata={{op_name="{name}"}}', whole=True) == 'student/denoiser/layers/mlp/mul'
  assert hlo.find_scope('') == 'no named scope'
