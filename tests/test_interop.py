"""CoDiCodec's weights and latents in: every tensor in its place, and every bad file told in one line.

State dicts here are those of `codicodec:debug`: the same names, small shapes. tests/test_conformance.py holds the full
size against the original's outputs, tests/test_conformance_live.py against the original itself.
"""

import dataclasses
import functools
import json
import os
import pickle
import sys

import jax
import kit
import numpy as np
import pytest
import safetensors.numpy

from m2l2 import build, cli
from m2l2.codec.codec import Codec
from m2l2.codec.latents import Latents
from m2l2.codec.snapshot import load_snapshot
from m2l2.configs import codicodec as recipe
from m2l2.errors import UserError
from m2l2.interop import codicodec as interop

get_config = recipe.get_config  # whatever a test puts in its place


@functools.cache
def make_arch(words=''):
  return build.network(json.loads(json.dumps(get_config(words).to_dict()))).arch


def make_state(seed=0):
  """A whole state dict of the debug size; constants as they should be."""
  rng = np.random.default_rng(seed)
  state = {}
  for name, tensor in interop.state_dict_table(make_arch('debug')).items():
    if tensor.value is None:
      state[name] = 0.2 * rng.standard_normal(tensor.shape, np.float32)
    elif name.startswith('fsq.'):
      state[name] = np.broadcast_to(tensor.value, tensor.shape).astype(np.int64)
    else:
      state[name] = np.full(tensor.shape, tensor.value, np.float32)
  return state


@pytest.fixture
def debug_size(monkeypatch):
  """The importer expects the debug size."""
  monkeypatch.setattr(recipe, 'get_config', lambda: get_config('debug'))


# ---- the table of names --------------------------------------------------------------------------


def test_the_table_is_the_originals_state_dict():
  """Names and shapes as the torch package lists them."""
  table = interop.state_dict_table(make_arch())
  assert {name: list(tensor.shape) for name, tensor in table.items()} == kit.tensors()
  for name, tensor in table.items():
    constant = kit.constant(name, tensor.shape)
    assert (constant is None) == (tensor.value is None)
    if constant is not None:
      np.testing.assert_array_equal(np.broadcast_to(tensor.value, tensor.shape), constant)


def test_every_parameter_is_filled_by_every_tensor():
  """Each number of the state dict that is used lands in one place, and no parameter is left over."""
  arch = make_arch('debug')
  state, place = make_state(), 0
  for name in state:
    if interop.state_dict_table(arch)[name].path:
      state[name] = (place + np.arange(state[name].size)).reshape(state[name].shape).astype(np.float32)
      place += state[name].size
  assert place < 2 ** 24  # exact in float32
  params = interop.convert_weights(state, arch)
  expected = jax.eval_shape(build.network(get_config('debug')).init, jax.random.key(0))
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
  numbers = np.sort(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)]))
  np.testing.assert_array_equal(numbers, np.arange(place))


# ---- the command ---------------------------------------------------------------------------------


def run(*args, capsys):
  status = cli.main(['import-codicodec', *map(str, args)])
  return status, capsys.readouterr()


def refuse(source, target, told, *, capsys):
  """One line that says `told`, status 1, nothing written."""
  before = sorted(os.listdir(target.parent))
  status, said = run(source, target, capsys=capsys)
  assert status == 1 and said.out == ''
  assert said.err.count('\n') == 1 and said.err.startswith(f'm2l2: {source}: ') and told in said.err, said.err
  assert 'Traceback' not in said.err and len(said.err) < 600
  assert sorted(os.listdir(target.parent)) == before


def test_import_of_a_safetensors_file(debug_size, tmp_path, capsys):
  source, target = tmp_path / 'codicodec.safetensors', tmp_path / 'snapshot'
  safetensors.numpy.save_file(make_state(), source)
  status, said = run(source, target, capsys=capsys)
  assert status == 0 and said.err == ''
  snapshot = load_snapshot(target)
  assert f'fingerprint {snapshot.fingerprint}' in said.out and '14 tensors' in said.out
  assert 'NC' in snapshot.extra['licence'] and snapshot.config['variants']['fsq']['on']
  codec = Codec(config=snapshot.config, params=snapshot.params, fingerprint=snapshot.fingerprint)
  assert codec.consistency.variance_renoise and not codec.consistency.refine
  np.testing.assert_array_equal(snapshot.params['encoder']['gain'], make_state()['gain_encoder'].ravel())
  status, said = run(source, target, '--quiet', capsys=capsys)  # replaces it
  assert (status, said.out, said.err) == (0, '', '')


def change(**changes):
  """The state dict with entries changed; None drops one."""
  state = make_state()
  for name, array in changes.items():
    if array is None:
      del state[name]
    else:
      state[name] = array
  return state


@pytest.mark.parametrize('changes,told', [
    (dict(latents=None), 'latents is missing'),
    ({'encoder.layers.1.mlp.ff.to_out.weight': None}, 'encoder.layers.1.mlp.ff.to_out.weight is missing'),
    ({'decoder.linear_output.weight': None}, 'decoder.linear_output.weight is missing'),
    ({'pe': np.zeros(3, np.float32)}, 'pe is superfluous'),
    ({'b': np.zeros(3), 'a': np.zeros(3)}, 'a, b are superfluous'),
    ({name: np.zeros(1) for name in 'vwxyz'}, 'v, w, x and 2 more are superfluous'),
    (dict(latents=np.zeros((1, 9, 64), np.float32)), 'latents is [1, 9, 64], should be [1, 8, 64]'),
    (dict(gain_encoder=np.full((1, 1, 128, 1), np.nan, np.float32)), 'gain_encoder holds NaN'),
    (dict(gain_encoder=np.zeros((1, 1, 128, 1), bool)), 'gain_encoder holds bool'),
    ({'fsq._levels_tensor': np.full(4, 9)}, 'fsq._levels_tensor should hold [11, 11, 11, 11]'),
    ({'fsq._basis_tensor': np.full(4, 1)}, 'should hold [1, 11, 121, 1331]'),
    ({'gain_encoder': np.full((1, 1, 128, 1), 1e300)}, 'gain_encoder holds NaN or infinite'),
    ({'\x1b[31m' + 'x' * 10000: np.zeros(1)}, '... is superfluous'),
    ({'frontend_decoder_up.up_layers.1.up.weight': np.ones((64, 1, 2, 2), np.float32)}, 'should hold 0.5'),
])
def test_a_state_dict_that_is_none_is_refused(debug_size, tmp_path, capsys, changes, told):
  source = tmp_path / 'codicodec.safetensors'
  safetensors.numpy.save_file(change(**changes), source)
  refuse(source, tmp_path / 'snapshot', told, capsys=capsys)


def test_a_safetensors_file_of_another_name_is_read(debug_size, tmp_path, capsys):
  source = tmp_path / 'codicodec.pt'
  safetensors.numpy.save_file(make_state(), source)
  assert run(source, tmp_path / 'snapshot', capsys=capsys)[0] == 0


def test_a_full_disk_leaves_nothing(debug_size, tmp_path, capsys, monkeypatch):
  """safetensors reports it as an error of its own."""
  source = tmp_path / 'codicodec.safetensors'
  safetensors.numpy.save_file(make_state(), source)

  def full(arrays, path):
    path.write_bytes(b'the beginning')
    raise safetensors.SafetensorError('I/O error: No space left on device (os error 28)')

  monkeypatch.setattr(safetensors.numpy, 'save_file', full)
  status, said = run(source, tmp_path / 'snapshot', capsys=capsys)
  assert status == 1 and 'No space left' in said.err and said.err.count('\n') == 1
  assert os.listdir(tmp_path) == ['codicodec.safetensors']


@pytest.mark.parametrize('keep', [0, 4, 8, 300, -1])
def test_a_truncated_safetensors_file_is_refused(debug_size, tmp_path, capsys, keep):
  source = tmp_path / 'codicodec.safetensors'
  source.write_bytes(safetensors.numpy.save(make_state())[:keep])
  refuse(source, tmp_path / 'snapshot', 'is damaged, cut short or not a safetensors file of floats', capsys=capsys)


def test_a_file_that_is_not_there(tmp_path, capsys):
  refuse(tmp_path / 'codicodec.pt', tmp_path / 'snapshot', 'no such file', capsys=capsys)
  refuse(tmp_path, tmp_path / 'snapshot', 'no such file', capsys=capsys)


def test_without_torch_a_torch_file_is_not_touched(tmp_path, capsys, monkeypatch):
  """Whatever is in it: nothing but torch's own safe loader ever opens it."""
  monkeypatch.setitem(sys.modules, 'torch', None)
  source = tmp_path / 'codicodec.pt'
  source.write_bytes(bomb(tmp_path / 'exploded'))
  refuse(source, tmp_path / 'snapshot', "needs torch: pip install 'm2l2[codicodec]'", capsys=capsys)
  assert not (tmp_path / 'exploded').exists()


def test_verifying_needs_the_original(debug_size, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'codicodec', None)
  source = tmp_path / 'codicodec.safetensors'
  safetensors.numpy.save_file(make_state(), source)
  status, said = run(source, tmp_path / 'snapshot', '--verify', capsys=capsys)
  assert status == 1 and 'codicodec is not installed' in said.err and said.err.count('\n') == 1
  assert not (tmp_path / 'snapshot').exists()


def test_a_place_that_holds_other_things_is_left_alone(debug_size, tmp_path, capsys):
  source = tmp_path / 'codicodec.safetensors'
  safetensors.numpy.save_file(make_state(), source)
  (tmp_path / 'music').mkdir()
  (tmp_path / 'music' / 'song.wav').write_bytes(b'RIFF')
  status, said = run(source, tmp_path / 'music', capsys=capsys)
  assert status == 1 and 'holds other things' in said.err and os.listdir(tmp_path / 'music') == ['song.wav']


class Bomb:
  """Its pickle makes a directory when it is loaded."""

  def __init__(self, place):
    self.place = place

  def __reduce__(self):
    return os.mkdir, (str(self.place),)


def bomb(place):
  return pickle.dumps({'gen_state_dict': Bomb(place)})


# ---- files of torch (run with -m torch) ----------------------------------------------------------


def torch_state():
  import torch
  return {name: torch.from_numpy(array) for name, array in make_state().items()}


@pytest.mark.torch
@pytest.mark.parametrize('wrap', [
    lambda state: {'gen_state_dict': state}, lambda state: state,
    lambda state: {'it': 7, 'gen_state_dict': state, 'optimizer': {'state': [1.0, None]}},
    lambda state: {name: t.double() if t.is_floating_point() else t for name, t in state.items()}])
def test_import_of_a_torch_checkpoint(debug_size, tmp_path, capsys, wrap):
  import torch
  source, target = tmp_path / 'codicodec.pt', tmp_path / 'snapshot'
  torch.save(wrap(torch_state()), source)
  status, said = run(source, target, capsys=capsys)
  assert status == 0, said.err
  np.testing.assert_array_equal(
      load_snapshot(target).params['encoder']['queries'], make_state()['latents'][0])


@pytest.mark.torch
@pytest.mark.parametrize('change,told', [
    (lambda state: state.pop('latents'), 'latents is missing'),
    (lambda state: state.update(more=state['latents']), 'more is superfluous'),
    (lambda state: state.update(latents=state['latents'][:, :3]), 'should be [1, 8, 64]'),
    (lambda state: state.clear(), "has no 'gen_state_dict'"),
    (lambda state: state.update(latents=3.0), "has no 'gen_state_dict'")])
def test_a_torch_checkpoint_that_is_none_is_refused(debug_size, tmp_path, capsys, change, told):
  import torch
  state = torch_state()
  change(state)
  torch.save({'gen_state_dict': state}, tmp_path / 'codicodec.pt')
  refuse(tmp_path / 'codicodec.pt', tmp_path / 'snapshot', told, capsys=capsys)


@pytest.mark.torch
@pytest.mark.parametrize('form', ['pickle', 'torch', 'torch, old form'])
def test_code_in_a_checkpoint_is_refused_and_never_run(debug_size, tmp_path, capsys, form):
  import torch
  source, place = tmp_path / 'codicodec.pt', tmp_path / 'exploded'
  if form == 'pickle':
    source.write_bytes(bomb(place))
  else:
    torch.save({'gen_state_dict': torch_state(), 'more': Bomb(place)}, source,
               _use_new_zipfile_serialization=form == 'torch')
  refuse(source, tmp_path / 'snapshot', 'nothing of it was executed', capsys=capsys)
  assert not place.exists()
  if form == 'pickle':  # it would have
    pickle.loads(source.read_bytes())
    assert place.exists()


@pytest.mark.torch
@pytest.mark.parametrize('make', [
    lambda torch, x: x.to_sparse(), lambda torch, x: torch.zeros(1).expand(x.shape),
    lambda torch, x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), lambda torch, x: x.to('meta'),
    lambda torch, x: torch.zeros(1).expand(10 ** 6, 10 ** 7)])
def test_tensors_that_are_not_plain_are_refused(debug_size, tmp_path, capsys, make):
  import torch
  state = torch_state()
  state['latents'] = make(torch, state['latents'])
  torch.save({'gen_state_dict': state}, tmp_path / 'codicodec.pt')
  refuse(tmp_path / 'codicodec.pt', tmp_path / 'snapshot', 'latents is not a plain tensor', capsys=capsys)


@pytest.mark.torch
@pytest.mark.parametrize('keep', [0, 1, 100, 5000, 0.5, -1, -100])
def test_a_truncated_torch_checkpoint_is_refused(debug_size, tmp_path, capsys, keep):
  import torch
  source = tmp_path / 'codicodec.pt'
  torch.save({'gen_state_dict': torch_state()}, source)
  whole = source.read_bytes()
  source.write_bytes(whole[:int(keep * len(whole)) if keep == 0.5 else keep])
  refuse(source, tmp_path / 'snapshot', 'is damaged, cut short or not a torch checkpoint', capsys=capsys)


# ---- latents and tokens --------------------------------------------------------------------------


@pytest.fixture(scope='module')
def codec():
  config = json.loads(json.dumps(get_config('debug').to_dict()))
  return Codec(config=config, params=interop.convert_weights(make_state(), make_arch('debug')), fingerprint='cdc')


def make_latents(codec, *, tokens=False, chunks=3):
  rng = np.random.default_rng(0)
  z = rng.uniform(-0.999, 0.999, (1, chunks, 8, 4)).astype(np.float32)
  z = rng.integers(0, 11 ** 4, (1, chunks, 8)).astype(np.int32) if tokens else z
  return Latents(z=z, sample_rate=48000, num_samples=codec.representation.crop_samples(chunks), channels=2,
                 model='cdc')


@pytest.mark.parametrize('width', [4, 8, 16, 32])
def test_public_latents_there_and_back(codec, width):
  latents = make_latents(codec)
  public = interop.to_public(latents, width=width)
  assert public.shape == (3, 32 // width, width) and public.dtype == np.float32
  # Neighbouring embeddings of four numbers stand side by side.
  per_row = width // 4
  for row, part, number in ((0, 0, 0), (32 // width - 1, per_row - 1, 3)):
    z = latents.z[0, 1, row * per_row + part, number]
    np.testing.assert_allclose(public[1, row, part * 4 + number], np.arctanh(z) / 0.8, rtol=1e-5)
  back = interop.from_public(public, codec, sample_rate=48000)
  np.testing.assert_allclose(back.z, latents.z, atol=1e-6)
  assert dataclasses.replace(back, z=0) == dataclasses.replace(latents, z=0)


def test_public_tokens_there_and_back(codec):
  latents = make_latents(codec, tokens=True)
  public = interop.to_public(latents)
  assert public.dtype == np.int32 and public.shape == (3, 8)
  back = interop.from_public(public.astype(np.int64), codec, sample_rate=48000)
  np.testing.assert_array_equal(back.z, latents.z)
  assert codec.decode(back).shape == (2, latents.num_samples)


def test_public_latents_of_a_known_length(codec):
  public = interop.to_public(make_latents(codec), width=8)
  samples = codec.representation.crop_samples(3) - 200
  back = interop.from_public(public, codec, sample_rate=44100, num_samples=samples)
  assert codec.decode(back).shape == (2, samples)
  for wrong, rate in ((9 * samples, 44100), (0, 44100), (samples, 0), (samples, 8000)):
    with pytest.raises(UserError, match='not what 3 chunks hold'):
      interop.from_public(public, codec, sample_rate=rate, num_samples=wrong)


def test_public_latents_of_a_foreign_rate(codec):
  audio = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 5000)).astype(np.float32)
  latents = codec.encode(audio, 22050)
  back = interop.from_public(interop.to_public(latents, width=8), codec, sample_rate=22050, num_samples=5000)
  np.testing.assert_allclose(back.z, latents.z, atol=1e-6)
  assert dataclasses.replace(back, z=0) == dataclasses.replace(latents, z=0)
  with pytest.raises(UserError, match='say num_samples too'):
    interop.from_public(interop.to_public(latents, width=8), codec, sample_rate=22050)


@pytest.mark.parametrize('public', [
    np.zeros((3, 8, 5)), np.zeros((3, 32)), np.zeros((0, 8, 4)), np.zeros((3, 7), int), np.zeros((2, 3, 8), int),
    np.float32(1)])
def test_public_latents_of_a_wrong_shape_are_refused(codec, public):
  with pytest.raises(UserError, match='CoDiCodec latents are'):
    interop.from_public(public, codec, sample_rate=44100)


def test_public_latents_that_are_none_are_refused(codec):
  with pytest.raises(UserError, match='NaN'):
    interop.from_public(np.full((1, 4, 8), np.nan), codec, sample_rate=44100)
  for token in (-1, 11 ** 4, 2 ** 32 + 5):
    with pytest.raises(UserError, match='beyond 0..14640'):
      interop.from_public(np.full((1, 8), token), codec, sample_rate=44100)
  with pytest.raises(UserError, match='width is 5'):
    interop.to_public(make_latents(codec), width=5)
  two = dataclasses.replace(make_latents(codec), z=np.zeros((2, 3, 8, 4), np.float32))
  with pytest.raises(UserError, match='one stream'):
    interop.to_public(two)
