"""Every config: its parameters as text, its whole step traced at full size, and its mistakes.

`UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py` rewrites tests/goldens/.
"""

import ast
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import pkgutil
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2 import build
import m2l2.configs
from m2l2.configs import base, nano
from m2l2.consistency import Consistency
from m2l2.errors import UserError
from m2l2.kernels.chunk_causal import compiling_for
from m2l2.model.architecture import Architecture
from m2l2.training import timing
from m2l2.training.train_step import Objective
from m2l2.variants.autoencoder import Variant
from m2l2.variants.consistency import VariantConsistency
from m2l2.variants.objective import VariantObjective

CONFIGS = sorted(module.name for module in pkgutil.iter_modules(m2l2.configs.__path__))
# Each costs seconds of tracing. The sizes of pods differ from `base` in sizes alone, and `mono` in nothing.
EACH = [pytest.param(name, marks=pytest.mark.soak) if name in ('large', 'xl') else name for name in CONFIGS]
GOLDENS = pathlib.Path(__file__).parent / 'goldens'
LOGICAL_AXES = {
  'layers', 'embed', 'heads', 'head_dim', 'mlp', 'cond', 'conv_in', 'conv_out', 'kernel_f',
  'kernel_t', 'freq', 'tokens', 'latents', 'latent_dim', 'qkv', 'gate', 'chunks', 'registers', None}


def _config(name, arg=''):
  return importlib.import_module(f'm2l2.configs.{name}').get_config(arg)


def _plain(config):
  """As it is written to config.json and read back."""
  return json.loads(json.dumps(config.to_dict()))


@functools.cache
def _traced(config):
  functions = build.step_functions(json.loads(config))
  return functions, jax.eval_shape(functions.init, jax.random.key(0))


def _functions(name):
  """The step functions of a config (built from its JSON, once) and the shapes of their state."""
  return _traced(json.dumps(_plain(_config(name))))


def _table(name):
  """The lines of a golden: how many parameters, then each of them."""
  functions, state = _functions(name)
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  inits = jax.tree.leaves(functions.network.init_names)
  axes = jax.tree.leaves(functions.logical_axes, is_leaf=lambda x: isinstance(x, tuple))
  lines = [f'{sum(x.size for _, x in leaves):,} parameters']
  for (path, x), init, names in zip(leaves, inits, axes, strict=True):
    path = jax.tree_util.keystr(path, simple=True, separator='/')
    shape = 'x'.join(map(str, x.shape))
    lines.append(f'{path}  {shape}  {x.dtype}  {init}  ({", ".join(map(str, names))})')
  return lines


# --- what every config is ---


def test_all_configs_are_here():
  assert {'base', 'stereo', 'tiny', 'nano'} <= set(CONFIGS)


@pytest.mark.parametrize('name', EACH)
def test_parameters_are_those_of_the_golden(name):
  golden = GOLDENS / f'{name}.txt'
  lines = _table(name)
  if os.environ.get('UPDATE_GOLDEN') == '1':
    golden.parent.mkdir(exist_ok=True)
    golden.write_text('\n'.join(lines) + '\n')
  assert lines == golden.read_text().splitlines(), f'{golden} differs: UPDATE_GOLDEN=1 rewrites it'


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_builds_on_base_alone(name):
  tree = ast.parse(pathlib.Path(importlib.import_module(f'm2l2.configs.{name}').__file__).read_text(encoding='utf-8'))
  imported = [(node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
              for alias in node.names]
  plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
  assert (imported, plain) == (([], ['ml_collections']) if name == 'base' else ([('m2l2.configs', 'base')], []))


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_says_what_to_expect(name):
  text = ' '.join(importlib.import_module(f'm2l2.configs.{name}').__doc__.split())
  time = re.search(r'Expected cost: .*FLOP.* Expected time.*?: (.*?)\. Expected quality.*: ', text)
  assert time and re.search('A100|H100|TPU v5p|AMD EPYC|Intel Xeon', time[1])


def test_no_golden_is_left_over():
  assert {path.stem for path in GOLDENS.glob('*.txt')} == set(CONFIGS)


def test_base_has_as_many_parameters_as_it_says():
  assert _table('base')[0] == '147,454,978 parameters'


@pytest.mark.parametrize('name', EACH)
def test_parameters_are_float32_and_name_their_axes(name):
  def check(x, axes):
    assert x.dtype == jnp.float32 and len(axes) == x.ndim and set(axes) <= LOGICAL_AXES

  functions, state = _functions(name)
  jax.tree.map(check, state.params, functions.logical_axes)


# Tracing takes seconds: of the full sizes one in every run of the suite.
@pytest.mark.parametrize('name', [
  name if name == 'nano' else pytest.param(name, marks=pytest.mark.soak) for name in CONFIGS])
def test_the_whole_step_at_full_size_by_shapes(name):
  config = _config(name)
  functions, state = _functions(name)
  batch = {'audio': jax.ShapeDtypeStruct(
    (config.train.accumulate * 2, functions.channels, functions.crop_samples), jnp.float32)}
  after, metrics = jax.eval_shape(functions.train_step, state, batch)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(after) == shapes(state)  # so that no second update compiles again
  assert shapes(state.ema) == shapes(state.params)
  probes = jax.eval_shape(functions.probe_step, state.params, batch, jax.random.key(0))
  for value in (*metrics.values(), *probes.values()):
    assert value.shape == () and value.dtype == jnp.float32
  assert 'loss' in metrics and 'swap' in probes
  assert functions.sample_rate == config.model.native_rates[0]
  assert functions.crop_samples == (
    2 * config.model.frames * config.model.hop + config.model.window - config.model.hop)


@pytest.mark.parametrize('name', EACH)
def test_config_survives_json(name):
  config = _config(name)
  plain = _plain(config)
  assert build.representation(plain['model']) == build.representation(config.model)
  assert build.consistency(plain) == build.consistency(config)
  assert build.variants(plain).keys() == build.variants(config).keys()
  assert build.native_rates(plain['model']) == build.native_rates(config.model)
  assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize('name', ['stereo', 'tiny'])
def test_architecture_survives_json(name):
  arch = build.network(_config(name)).arch
  assert arch == _functions(name)[0].network.arch  # that one was built from JSON
  hash(arch)  # static arguments are hashed: lists have become tuples


@pytest.mark.parametrize('name', EACH)
def test_a_config_is_a_delta_of_base_and_says_how_to_run_it(name):
  def names(config):
    return {key: set(value) if isinstance(value, dict) else key for key, value in config.items()}

  assert names(_config(name).to_dict()) == names(base.get_config().to_dict())
  text = importlib.import_module(f'm2l2.configs.{name}').__doc__
  assert f'm2l2 train --config=configs/{name}.py' in text and '--workdir=' in text


@pytest.mark.parametrize('name', EACH)
def test_the_parameter_count_in_words_is_right(name):
  text = importlib.import_module(f'm2l2.configs.{name}').__doc__
  stated = re.search(r'([\d.]+) M parameters', text)[1]
  count = int(_table(name)[0].split()[0].replace(',', ''))
  decimals = len(stated.partition('.')[2])
  assert f'{count / 1e6:.{decimals}f}' == stated


# Tracing takes seconds: one in every run of the suite.
@pytest.mark.parametrize('name', [
  name if name == 'nano' else pytest.param(name, marks=pytest.mark.soak) for name in CONFIGS])
def test_the_cost_in_words_is_right(name):
  text, config = importlib.import_module(f'm2l2.configs.{name}').__doc__, _config(name)
  stated, unit, pairs = re.search(r'([\d.]+) ([TG])FLOP a\s+step\s+of\s+(\d+)\s+pairs', text).groups()
  flops, head = timing.model_flops(config), int(config.variants.head_start.share * config.train.steps)
  assert int(pairs) == config.train.batch_size
  decimals = len(stated.partition('.')[2])
  assert f'{(flops(head + 1) - flops(head)) / {"T": 1e12, "G": 1e9}[unit]:.{decimals}f}' == stated


def test_every_field_of_the_classes_is_in_base():
  config = base.get_config()
  names = {field.name for cls in (Architecture, build.Representation) for field in dataclasses.fields(cls)}
  assert set(config.model) == names | {'native_rates'}
  assert dict(config.consistency) == dataclasses.asdict(Consistency())


def test_every_variant_is_off_in_base_and_is_what_its_class_leaves_it_at():
  expected = {field.name: field.default
              for variant, paper in ((Variant, Architecture), (VariantConsistency, Consistency),
                                     (VariantObjective, Objective))
              for field in dataclasses.fields(variant) if field.name not in paper.__dataclass_fields__}
  assert build.variants(base.get_config()) == {**expected, 'packing_tile': 'auto'}
  assert not any(fields.get('on') for fields in base.get_config().variants.values())


# --- words after the colon ---


@pytest.mark.parametrize('name', EACH)
def test_debug_shrinks_sizes_and_keeps_choices(name):
  small, full = _config(name, 'debug'), _config(name)
  network = build.network(small)
  count = sum(x.size for x in jax.tree.leaves(network.shapes))
  assert count < 1_000_000
  assert build.representation(small.model).crop_samples(2) < 5000
  assert small.train.log_every == 1 and small.train.steps <= 10
  for field in ('channels', 'transform', 'edges', 'stem', 'strides', 'remat', 'dtype'):
    assert small.model[field] == full.model[field]
  assert all(fields.get('on') == full.variants[name].get('on') for name, fields in small.variants.items())
  assert len(small.model.widths) == len(full.model.widths)
  assert small.consistency.to_dict() == full.consistency.to_dict()


@pytest.mark.parametrize('arg, channels', [
  ('stereo', 2), ('mono', 1), ('debug,stereo', 2), ('stereo,debug', 2)])
def test_channels_by_a_word(arg, channels):
  config = _config('nano', arg)
  assert config.model.channels == channels
  assert (config.train.log_every == 1) == ('debug' in arg)


def test_stereo_means_the_same_as_a_word_and_as_a_config():
  assert _config('base', 'stereo').to_dict() == _config('stereo').to_dict()
  assert _config('stereo', 'stereo').to_dict() == _config('stereo').to_dict()
  assert _config('nano', 'stereo').train.learning_rate == .5 * _config('nano').train.learning_rate
  assert not _config('tiny', 'stereo').variants.latent_norm.on and _config('nano', 'stereo').variants.latent_norm.on


@pytest.mark.parametrize('name', EACH)
def test_an_unknown_word_is_one_clear_line(name):
  with pytest.raises(ValueError, match="^config argument 'hd' is not known: use debug.*") as error:
    _config(name, 'debug,hd')
  assert '\n' not in str(error.value)


# --- mistakes ---


def test_a_misspelt_field_in_a_config_file_is_an_error():
  config = base.get_config()
  with pytest.raises(AttributeError, match='Did you mean "learning_rate"'):
    config.train.learing_rate = 1.
  with pytest.raises(TypeError, match='steps'):
    config.train.steps = 'many'


def _changed(group='model', **fields):
  config = _plain(base.get_config('debug'))
  return {**config, group: {**config[group], **fields}}


def _one_line(error, word):
  assert '\n' not in str(error.value) and word in str(error.value)


def test_unknown_and_missing_fields_are_one_clear_line():
  with pytest.raises(UserError, match='^model.widht is not a field') as error:
    build.network(_changed(widht=3))
  _one_line(error, 'widths')
  with pytest.raises(UserError, match='^consistency.sigma is not a field') as error:
    build.consistency(_changed('consistency', sigma=3))
  _one_line(error, 'sigma_max')
  for make in (build.network, build.consistency, build.step_functions):
    with pytest.raises(UserError, match='^variants.envelope.of is not a field'):
      make(_changed('variants', envelope={'of': True}))
  for make, field in ((build.network, 'widths'), (lambda config: build.representation(config['model']), 'hop'),
                      (lambda config: build.native_rates(config['model']), 'native_rates')):
    config = _changed()
    del config['model'][field]
    with pytest.raises(UserError) as error:
      make(config)
    _one_line(error, f'model.{field}')


@pytest.mark.parametrize('field, value', [
  ('channels', 3), ('hop', 0), ('hop', 100), ('window', 100), ('bins', 129), ('bins', 'all'),
  ('frames', 0), ('transform', 'log'), ('edges', 'mirror')])
def test_bad_representation(field, value):
  with pytest.raises(UserError) as error:
    build.representation(_changed(**{field: value})['model'])
  _one_line(error, 'config.model: ')


@pytest.mark.parametrize('field, value', [
  ('frames', 17), ('strides', [[4, 2]]), ('strides', [[2, 2], [4, 0], [2, 2]]),
  ('widths', [8, 12, 24, 48]), ('widths', [8, 16]), ('widths', [11, 22, 44, 88]),
  ('widths', 'wide'), ('head_dim', 3), ('layers', 0), ('num_latents', 0), ('cond_dim', 15),
  ('registers', -1), ('remat', 'some'), ('attention', 'magic'),
  ('dtype', 'float8'), ('dtype', 'int')])
def test_bad_architecture(field, value):
  with pytest.raises(UserError) as error:
    build.network(_changed(**{field: value}))
  _one_line(error, 'config.model: ')


@pytest.mark.parametrize('field, value', [('levels', 10), ('dropout', 1.5)])
def test_bad_quantiser(field, value):
  with pytest.raises(UserError) as error:
    build.network(_changed('variants', fsq={'on': True, field: value}))
  _one_line(error, field)


@pytest.mark.parametrize('field, value', [
  ('sigma_min', 0.), ('sigma_max', 1e-4), ('p_std', 0.), ('sigma_cond', 1000.), ('rho', 'seven')])
def test_bad_consistency(field, value):
  with pytest.raises(UserError) as error:
    build.consistency(_changed('consistency', **{field: value}))
  _one_line(error, 'config.consistency: ')


@pytest.mark.parametrize('group, field, value', [
  ('staggered', 'steps', 0), ('head_start', 'share', 1.5),
  ('head_start', 'task', 'play'), ('nested', 'chance', -1.), ('envelope', 'bands', 1000)])
def test_bad_variants(group, field, value):
  with pytest.raises(UserError, match=rf'^variants\.{group}\.{field} is ') as error:
    build.step_functions(_changed('variants', **{group: {field: value}}))
  _one_line(error, str(value))


def test_local_preconditioning_needs_the_envelope():
  config = nano.get_config('debug')
  config.variants.envelope.on = False
  with pytest.raises(UserError, match='variants.local_scale needs the envelope') as error:
    build.step_functions(config)
  _one_line(error, 'variants.envelope.on')


@pytest.mark.parametrize('field, value', [('on', False), ('weight', 0.)])
def test_a_head_start_needs_the_envelope(field, value):
  config = base.get_config('debug')
  config.variants.update(envelope={'on': True, 'weight': 1.}, head_start={'share': .5, 'task': 'envelope'})
  config.variants.envelope[field] = value
  with pytest.raises(UserError, match='^variants.head_start.task=') as error:
    build.step_functions(config)
  _one_line(error, f'envelope.{field}')


def test_prefixes_of_tokens_are_refused():
  with pytest.raises(UserError, match='^variants.nested needs continuous latents'):
    build.step_functions(_changed('variants', nested={'chance': .5}, fsq={'on': True}))


def test_bad_training_fields_are_one_clear_line():
  for field, value in (('optimizer', 'sgd'), ('b2', 1.), ('clip_norm', -1.), ('clip_norm', 'none'),
                       ('learning_rate', float('nan')), ('learning_rate', 0.), ('final_learning_rate', float('inf'))):
    config = nano.get_config('debug')
    config.train[field] = value
    with pytest.raises(UserError) as error:
      build.step_functions(config)
    _one_line(error, f'train.{field}')


def test_sizes_of_a_chunk_at_the_papers_rates():
  rep = build.representation(base.get_config().model)
  latents = np.prod([base.get_config().model[name] for name in ('num_latents', 'latent_dim')])
  assert rep.chunk_samples == 32768 and rep.chunk_samples / latents == 64
  assert rep.chunk_samples / 8 == 4096  # in time, for K = 8
  assert _functions('base')[0].network.arch.grid == (64, 8)


# --- the dtype of activations ---


def _gpu(capability):
  return types.SimpleNamespace(platform='gpu', device_kind='A GPU', compute_capability=capability)


@pytest.mark.parametrize('platform, capabilities, asked, expected', [
  ('cpu', [], 'auto', 'float32'), ('cpu', [], 'bfloat16', 'bfloat16'), ('cpu', [], 'float32', 'float32'),
  ('tpu', [], 'auto', 'bfloat16'), ('tpu', [], 'float32', 'float32'),
  ('gpu', ['9.0'], 'auto', 'bfloat16'), ('gpu', ['8.0'], 'bfloat16', 'bfloat16'), ('gpu', ['10.0'], 'auto', 'bfloat16'),
  ('gpu', ['7.5'], 'auto', 'float32'), ('gpu', ['7.5'], 'bfloat16', 'float32'), ('gpu', ['7.5'], 'float32', 'float32'),
  ('gpu', ['9.0', '7.0'], 'auto', 'float32'),   # one program for all of them
  ('gpu', ['gfx90a'], 'auto', 'bfloat16'),      # AMD's
  ('gpu', [], 'auto', 'bfloat16')])             # compiled ahead, for a GPU that is not here
def test_activations_are_bfloat16_where_it_is_fast(monkeypatch, platform, capabilities, asked, expected):
  said = []
  monkeypatch.setattr(build.logging, 'log_first_n', lambda level, text, n, *args: said.append(text % args))
  with compiling_for(platform):
    assert build.activation_dtype(asked, devices=[_gpu(c) for c in capabilities]) == expected
  fell_back = platform == 'gpu' and asked != 'float32' and expected == 'float32'
  assert said == (['A GPU has no bfloat16 units: activations are float32'] if fell_back else [])


def test_a_network_is_built_for_the_platform_it_is_compiled_for():
  assert build.network(_changed(dtype='auto')).arch.dtype == 'float32'
  with compiling_for('tpu'):
    assert build.network(_changed(dtype='auto')).arch.dtype == 'bfloat16'
