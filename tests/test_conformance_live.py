"""m2l2 beside CoDiCodec's own code, at full size: `pip install -e '.[codicodec]' codicodec`, then -m torch.

tests/conformance/live.py is the same for any number of chunks.
"""

import functools

import kit
import numpy as np
import port
import pytest
import safetensors.numpy

from m2l2.errors import UserError
from m2l2.interop import codicodec as interop

pytestmark = pytest.mark.torch


@functools.cache
def originals():
  import original
  return original


@functools.lru_cache(maxsize=1)
def both(seed):
  return port.make_codec(seed), originals().load(kit.weights(seed))


def error(a, b):
  import live
  return live.error(a, b)


def test_the_reference_is_what_the_original_gives():
  """So reference.npz has not aged: all cases of a seed but the decoders'."""
  names = set()
  reference = kit.load_reference()
  for name, array in originals().outputs(1, both(1)[1]):
    names.add(name)
    assert kit.relative_error(name, array, reference) < 1e-5, name
  assert names == {name for name in kit.cases() if name.startswith('1/')}


@pytest.mark.parametrize('decoder', kit.DECODERS)
def test_decoders(decoder):
  import live
  codec, network = both(0)
  whole, last, *_ = live.compare(decoder, chunks=3, codec=codec, network=network)
  assert whole < kit.TOLERANCE and last < kit.TOLERANCE


@pytest.mark.parametrize('channels', [1, 2])
def test_latents_and_tokens_are_exchanged(channels):
  """Public latents and tokens of either side decode on the other."""
  codec, network = both(0)
  package, audio = originals().package(network), kit.audio(0, channels=channels)
  ours, theirs = codec.encode(audio, 44100), package.encode(audio).numpy()
  public = interop.to_public(ours)
  assert public.shape == theirs.shape and error(public, theirs) < kit.TOLERANCE
  back = interop.from_public(theirs, codec, sample_rate=44100)
  assert error(back.z, ours.z) < kit.TOLERANCE
  tokens, theirs = codec.encode(audio, 44100, discrete=True).z[0], package.encode(audio, discrete=True).numpy()
  assert tokens.dtype == theirs.dtype == np.int32
  wrong, excused = kit.wrong_tokens(tokens, theirs, ours.z[0])
  print(f'{tokens.size} tokens, {excused} differ near an edge')
  assert wrong == 0
  codes = network.fsq.indexes_to_codes(package.encode(audio, discrete=True)).numpy()
  np.testing.assert_allclose(codec._bottleneck.codes(theirs, width=kit.WIDTH), codes, atol=1e-6)


@pytest.mark.parametrize('seed', kit.SEEDS)
def test_bfloat16_errs_no_more_than_torchs_autocast(seed):
  """Each call on its own, fed the same float32 inputs; both against their own float32."""
  import torch
  original = originals()
  _, network = both(seed)
  params = port.make_params(seed)
  z, audio = kit.latents(seed, chunks=2), kit.audio(seed)
  spec = port.representation(port.compiled(), audio)
  features = original.features(network, z)

  @torch.no_grad()
  def theirs(enabled):
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
      yield 'latents', network.encoder_forward(torch.from_numpy(original.to_torch(spec)), dont_quantize=True).float()
      for level, maps in enumerate(network.pre_decoder_forward(original.join(z))):
        yield f'features {level}', maps.float()
      for i, pair in enumerate(kit.LEVEL_PAIRS):
        yield f'denoiser {i}', network.decoder_forward(
            torch.from_numpy(original.to_torch(kit.noisy_pair(seed, pair))), original.join(z),
            features=[torch.from_numpy(original.to_torch(maps)) for maps in features], sigma_left=pair[0],
            sigma_right=pair[1]).float()

  def ours(dtype):
    encode, decode, denoise = port.calls(dtype)
    yield 'latents', encode(params, spec[None])
    for level, maps in enumerate(decode(params, z[None])['maps']):
      yield f'features {level}', maps
    given = {'maps': tuple(maps[None] for maps in features), 'z': z[None]}
    for i, pair in enumerate(kit.LEVEL_PAIRS):
      yield f'denoiser {i}', denoise(params, kit.noisy_pair(seed, pair)[None], np.float32([pair]), given)

  def errors(exact, rounded):
    exact, rounded = list(exact), list(rounded)  # one after the other: autocast is a global state
    return {name: error(np.asarray(b, np.float32), np.asarray(a, np.float32))
            for (name, a), (_, b) in zip(exact, rounded, strict=True)}

  theirs, ours = errors(theirs(False), theirs(True)), errors(ours('float32'), ours('bfloat16'))
  for name, bound in theirs.items():
    print(f'seed {seed}, {name}: {ours[name]:.2e}, torch {bound:.2e}')
    assert ours[name] <= 1.5 * bound, name


@pytest.mark.parametrize('form', ['torch', 'safetensors'])
def test_import_and_verify(tmp_path, capsys, form):
  """The whole command at full size; a network that differs in one tensor is not let through."""
  import torch

  from m2l2 import cli, load
  state = kit.weights(0)
  if form == 'torch':
    source = tmp_path / 'codicodec.pt'
    torch.save({'gen_state_dict': {name: torch.from_numpy(array) for name, array in state.items()}}, source)
  else:
    source = tmp_path / 'codicodec.safetensors'
    safetensors.numpy.save_file(state, source)
  assert cli.main(['import-codicodec', str(source), str(tmp_path / 'snapshot'), '--verify']) == 0
  said = capsys.readouterr().out
  assert 'verified against the original, relative errors: latents' in said and '147,202,888 parameters' in said
  codec = load(tmp_path / 'snapshot')
  audio = kit.audio(0)
  assert error(codec.encode(audio, 44100).z[0], kit.load_reference()['0/latents']) < kit.TOLERANCE


def test_verify_finds_a_difference():
  state, config = kit.weights(0), port.make_config()
  params = port.make_params(0)
  params['denoiser']['output']['conv_out']['bias'] = params['denoiser']['output']['conv_out']['bias'] + 0.01
  with pytest.raises(UserError, match='of denoiser, at most 0.0001 is right; nothing was written'):
    interop.verify_against_torch(state, config, params)
