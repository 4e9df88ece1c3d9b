"""m2l2 at full size against CoDiCodec's own outputs (tests/conformance): same weights, inputs and noise, float32.

One seed's latents in every run of the suite, by the encoder's weights alone; what takes longer is soak.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import kit
import numpy as np
import port
import pytest

from m2l2 import build
from m2l2.interop import codicodec as interop


@pytest.fixture(scope='module', params=kit.SEEDS)
def seed(request):
  return request.param


@functools.lru_cache(maxsize=1)  # one seed's weights in memory at a time
def make_codec(seed):
  return port.make_codec(seed)


def hold(outputs):
  """Every output against the reference; prints the errors."""
  rows = kit.check(outputs, names=outputs)
  print(*(f'{error:.2e} {name}' for name, error, _ in rows), sep='\n')
  assert all(passed for _, _, passed in rows), [row for row in rows if not row[2]]


def test_latents_of_one_seed():
  config = port.make_config()
  network = build.network(config)
  state = {name: kit.weight(name, tensor.shape, 0) if tensor.path[:1] in ((), ('encoder',)) else
           np.zeros(tensor.shape, np.float32) for name, tensor in interop.state_dict_table(network.arch).items()}
  params = interop.convert_weights(state, network.arch)

  @jax.jit
  def encode(encoder, spec):
    others = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    return network.arch.make_bottleneck()(network.encode({**others, 'encoder': encoder}, spec))

  spec = port.representation(types.SimpleNamespace(representation=build.representation(config['model'])), kit.audio(0))
  hold({'0/latents': np.asarray(encode(params['encoder'], spec[None])[0])})


@pytest.mark.soak
@pytest.mark.usefixtures('full_optimization')
def test_encoder(seed):
  hold(port.encoder_outputs(make_codec(seed), seed))


@pytest.mark.soak
@pytest.mark.usefixtures('full_optimization')
def test_features_and_denoiser(seed):
  hold(port.network_outputs(make_codec(seed), seed))


# Other lengths are held at a small size, in test_codec, and by `port.py`: three minutes less.
@pytest.mark.soak
@pytest.mark.usefixtures('full_optimization')
@pytest.mark.parametrize('decoder,chunks', [('autoregressive', 1), ('autoregressive', 7), ('parallel', 7)])
def test_decoders(chunks, decoder):
  hold({f'0/{decoder}/{chunks}/waveform': port.waveform(make_codec(0), decoder, chunks=chunks)})


@pytest.mark.soak
@pytest.mark.usefixtures('full_optimization')
def test_live_decoding():
  """Its pieces do not depend on what follows, so the shorter signal is its beginning; 40 chunks: live.py."""
  whole = port.waveform(make_codec(0), 'live', chunks=2)
  hold({f'0/live/{chunks}/waveform': whole[:, :chunks * kit.FRAMES * kit.HOP] for chunks in (1, 2)})


@pytest.mark.soak
@pytest.mark.usefixtures('full_optimization')
def test_one_chunk_alone():
  """A chunk's latents, features and left output do not need the other chunk's presence."""
  seed, codec = 0, make_codec(0)
  audio = kit.audio(seed)[:, :codec.representation.crop_samples(1)]
  hold({f'{seed}/latents': np.concatenate(
      [codec.encode(audio, 44100).z[0], kit.load_reference()[f'{seed}/latents'][1:]])})
  _, decode, denoise = port.calls()
  z, pair = kit.latents(seed, chunks=2)[None], kit.LEVEL_PAIRS[0]
  noisy = kit.noisy_pair(seed, pair)[None]
  both, single = (decode(codec.params, z[:, :chunks]) for chunks in (2, 1))
  for a, b in zip(single['maps'], both['maps']):
    assert np.linalg.norm(a[0, 0] - b[0, 0]) < 1e-5 * np.linalg.norm(b[0, 0])
  left = denoise(codec.params, noisy, np.float32([pair]), both)[0, 0]
  alone = denoise(codec.params, noisy[:, :1], np.float32([pair[:1]]), single)[0, 0]
  assert np.linalg.norm(left - alone) < 1e-5 * np.linalg.norm(left)


@pytest.mark.soak
@pytest.mark.usefixtures('full_optimization')
def test_native_rates_are_processed_as_they_are_and_mono_comes_back_as_mono():
  codec, audio = make_codec(0), kit.audio(0)
  np.testing.assert_array_equal(codec.encode(audio, 44100).z, codec.encode(audio, 48000).z)
  latents = port.whole(codec, kit.latents(0, chunks=1))
  noise = kit.noises(0, chunks=1, roles=3)
  stereo = codec.decode(latents, noise=noise)
  for change, expected in ((dict(sample_rate=48000), stereo), (dict(channels=1), stereo.mean(axis=0, keepdims=True))):
    np.testing.assert_allclose(codec.decode(dataclasses.replace(latents, **change), noise=noise), expected, atol=1e-7)


@pytest.mark.soak
@pytest.mark.usefixtures('full_optimization')
def test_our_two_steps_on_their_weights():
  """Music2Latent2's decoding: one call a chunk, each chunk refined as the next one's left neighbour."""
  codec, latents = make_codec(0), kit.latents(0, chunks=2)
  refined = codec.decode(port.whole(codec, latents), steps=1, refine=True, noise=kit.noises(0, chunks=2, roles=2))
  # Chunk 0 by the definition: one step from sigma_max, re-noised, denoised alone.
  _, decode, denoise = port.calls()
  features = decode(codec.params, latents[None, :1])
  first = denoise(codec.params, 80 * kit.noise(0, 0, 0)[None, None], np.float32([[80]]), features)
  spread = (kit.SIGMA_COND ** 2 - 0.002 ** 2) ** 0.5
  noisy = first + np.float32(spread) * kit.noise(0, 0, 1)[None, None]
  again = denoise(codec.params, noisy, np.float32([[kit.SIGMA_COND]]), features)
  expected = np.asarray(codec.representation.synthesise(again[0])[0])
  got = refined[:, :kit.FRAMES * kit.HOP]
  assert refined.shape == (2, 66560) and np.linalg.norm(got - expected) < 1e-4 * np.linalg.norm(expected)


# ---- the checker itself --------------------------------------------------------------------------


def test_the_checker_sees_what_is_wrong():
  """A sketch's error is that of the arrays; misplaced, missing and near-equal outputs are told apart."""
  name = '0/features/9'
  right = kit.normal('x', shape=(2, 64, 8, 512))
  reference = kit.record(name, right)
  assert kit.relative_error(name, right, reference) < 1e-6
  for size in (1e-6, 1e-3, 1.0):
    off = right + np.float32(size) * kit.normal('y', shape=right.shape)
    np.testing.assert_allclose(kit.relative_error(name, off, reference), size, rtol=0.1)
  for wrong in (right[::-1], np.roll(right, 1, axis=2), right[:, :, ::-1], -right, 1.001 * right):
    assert kit.relative_error(name, wrong, reference) > 9e-4
  swapped = right.copy()
  swapped[0, :2, 0] = right[0, 1::-1, 0]  # two tokens of 1,024 change places
  assert kit.relative_error(name, swapped, reference) > 1e-2
  assert kit.relative_error(name, right * np.nan, reference) == np.inf
  with pytest.raises(ValueError, match=r'is \[64, 2, 8, 512\], should be \[2, 64, 8, 512\]'):
    kit.relative_error(name, right.reshape(64, 2, 8, 512), reference)


def test_the_checker_counts_tokens():
  z = np.float32([[0.1, 0.3, -0.5, 0.72], [0.1 + 2e-5, 0.3, -0.5, 0.72]]) + np.float32([0.05, 0, 0.03, 0])
  tokens = np.asarray([100, 200])
  assert kit.wrong_tokens(tokens, tokens, z) == (0, 0)
  z = np.float32([[0.15, 0.33, -0.47, 0.72], [0.1 + 2e-5, 0.33, -0.47, 0.72]])  # 5 z = 0.5 + 1e-4
  assert kit.wrong_tokens(tokens + [1, 0], tokens, z) == (1, 0)
  assert kit.wrong_tokens(tokens + [0, 1], tokens, z) == (0, 1)


def test_the_command_of_the_checker(tmp_path, capsys):
  reference = kit.load_reference()
  outputs = {f'{seed}/{kind}': reference[f'{seed}/{kind}'] for seed in kit.SEEDS for kind in kit.RAW}
  outputs['1/latents'] = outputs['1/latents'] * np.float32(1.01)
  np.savez(tmp_path / 'outputs.npz', **outputs)
  assert kit.main(['check', str(tmp_path / 'outputs.npz')]) == 1
  said = capsys.readouterr().out
  assert 'FAIL  1.00e-02  1/latents\n' in said and 'ok    0.00e+00  0/latents\n' in said
  assert f'{3 * len(kit.RAW) - 1} of {len(kit.cases())} cases pass' in said
  assert '2/tokens is missing' not in said and '2/denoiser/4 is missing' in said
  np.savez(tmp_path / 'outputs.npz', **{'0/tokens': reference['0/tokens'][:1], '0/features/9': np.zeros(3)})
  assert kit.main(['check', str(tmp_path / 'outputs.npz')]) == 1
  said = capsys.readouterr().out
  assert 'tokens are [1, 128], should be [2, 128]' in said
  assert '0/features/9 is [3], should be [2, 64, 8, 512]' in said
  (tmp_path / 'outputs.npz').write_bytes(b'PK')
  assert kit.main(['check', str(tmp_path / 'outputs.npz')]) == 2 and kit.main([]) == 2


def test_the_port_computes_every_case(monkeypatch):
  """So that `port.py` and then `kit.py check` can pass; the numbers are the tests' above."""
  results = {}
  for name in ('make_codec', 'calls'):
    monkeypatch.setattr(port, name, lambda *args: None)
  monkeypatch.setattr(port, 'encoder_outputs', lambda codec, seed: {f'{seed}/{n}': 0 for n in (
      'representation', 'latents', 'latents_mono', 'tokens')})
  monkeypatch.setattr(port, 'network_outputs', lambda codec, seed: {
      name: 0 for name in kit.cases() if name.startswith((f'{seed}/features', f'{seed}/denoiser'))})
  monkeypatch.setattr(port, 'waveform', lambda codec, decoder, chunks: 0)
  monkeypatch.setattr(np, 'savez', lambda path, **outputs: results.update(outputs))
  assert port.main(['outputs.npz']) == 0 and set(results) == set(kit.cases())


def test_the_export_holds_what_the_checker_takes_for_granted(tmp_path, monkeypatch):
  monkeypatch.setattr(kit, 'SEEDS', (0,))
  monkeypatch.setattr(kit, 'CHUNKS', (1, 2))
  monkeypatch.setattr(kit, 'tensors', lambda: {'decoder.pe': (1, 4, 8), 'fsq._basis_tensor': (4,)})
  assert kit.main(['export', str(tmp_path / 'kit')]) == 0
  weights, inputs = (np.load(tmp_path / 'kit' / f'{name}0.npz') for name in ('weights', 'inputs'))
  np.testing.assert_array_equal(weights['decoder.pe'], kit.weight('decoder.pe', (1, 4, 8), 0))
  np.testing.assert_array_equal(weights['fsq._basis_tensor'], [1, 11, 121, 1331])
  np.testing.assert_array_equal(inputs['noise'][1, 2], kit.noise(0, 1, 2))
  np.testing.assert_array_equal(inputs['noisy_pair1'], kit.noisy_pair(0, kit.LEVEL_PAIRS[1]))
  assert inputs['latents'].shape == (2, 128, 4) and (tmp_path / 'kit' / 'cases.json').exists()


def test_every_case_is_in_the_reference():
  assert {name.partition('#')[0] for name in kit.load_reference()} == set(kit.cases())
  assert kit.REFERENCE.stat().st_size < 1e6
