"""m2l2 at full size against CoDiCodec's own outputs (tests/conformance): same weights, inputs and noise, float32."""

import functools
import json

from conformance import kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2 import build
from m2l2.codec import Codec
from m2l2.configs import codicodec as recipe
from m2l2.interop import codicodec as interop

CONFIG = json.loads(json.dumps(recipe.get_config().to_dict()))
MODES = {'autoregressive': 'autoregressive', 'parallel': 'parallel'}


@pytest.fixture(scope='module', params=kit.SEEDS)
def seed(request):
  return request.param


@functools.lru_cache(maxsize=1)
def make_codec(seed):
  """One seed's weights in memory at a time; what is compiled serves all."""
  params = interop.convert_weights(kit.weights(seed), build.network(CONFIG['model']).arch)
  codec = _compiled()
  codec.params = jax.tree.map(jnp.asarray, params)
  return codec


@functools.cache
def _compiled():
  net = build.network(CONFIG['model'])
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(net.init, jax.random.key(0)))
  return Codec(config=CONFIG, params=zeros, fingerprint='kit')


def hold(outputs):
  """Every output against the reference."""
  rows = kit.check(outputs, names=outputs)
  print(*(f'{error:.2e} {name}' for name, error, _ in rows), sep='\n')
  assert all(passed for _, _, passed in rows), rows


def test_encoder(seed):
  codec, audio = make_codec(seed), kit.audio(seed)
  mono = kit.audio(seed, channels=1)
  rep = codec.representation
  spec = jax.jit(rep.analyse)(jnp.pad(jnp.asarray(audio), ((0, 0), (0, rep.crop_samples(2) - audio.shape[1]))))
  at_44100, at_48000 = (codec.encode(audio, rate) for rate in (44100, 48000))
  np.testing.assert_array_equal(at_44100.z, at_48000.z)
  hold({f'{seed}/latents': at_44100.z[0], f'{seed}/latents_mono': codec.encode(mono, 44100).z[0],
        f'{seed}/tokens': codec.encode(audio, 44100, discrete=True).z[0]})
