"""A snapshot as programs: what an exported folder gives, in a process that has no m2l2."""

import os
import subprocess
import sys

import numpy as np
from test_codec import make_snapshot

from m2l2 import cli
from m2l2.codec import codec as codec_lib

# What a user of the folder does. m2l2 is made impossible to import.
RUN = """
import sys
sys.modules['m2l2'] = None
folder = sys.argv[1]
sys.path.insert(0, folder)
import numpy as np
import load
model = load.Model(folder)
audio = np.load(sys.argv[2])
z = model.encode(np.concatenate([audio[None], 0.5 * audio[None]]))  # any batch
np.savez(sys.argv[3], z=z, audio=model.decode(z[:1], seed=3))
"""


def test_an_exported_folder_is_the_model(tmp_path, capsys):
  make_snapshot(tmp_path / 'model')  # nothing is zero, and its codec's own programs are in the cache
  assert cli.main(['export', str(tmp_path / 'model'), f'--output={tmp_path / "out"}']) == 0
  programs = [f'{name}.stablehlo' for name in ('encode', 'step')]
  assert sorted(os.listdir(tmp_path / 'out')) == sorted(['about.json', 'load.py', 'weights.npz', *programs])
  capsys.readouterr()
  assert cli.main(['export', str(tmp_path / 'model'), f'--output={tmp_path / "out"}']) == 1
  assert 'is there already' in capsys.readouterr().err

  codec = codec_lib.load(tmp_path / 'model')
  audio = np.random.default_rng(0).normal(0, 0.1, (codec.representation.channels, 9000)).astype(np.float32)
  np.save(tmp_path / 'audio.npy', audio)
  subprocess.run([sys.executable, '-c', RUN, tmp_path / 'out', tmp_path / 'audio.npy', tmp_path / 'result.npz'],
                 check=True,
                 env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})
  result = np.load(tmp_path / 'result.npz')
  latents = codec.encode(audio, 44100)
  np.testing.assert_allclose(result['z'][0], latents.z[0], atol=2e-6)
  assert result['z'].shape[0] == 2 and np.abs(result['z'][1] - result['z'][0]).max() > 1e-3
  decoded = codec.decode(latents, seed=3)
  assert np.abs(decoded).max() > 1e-3
  np.testing.assert_allclose(result['audio'][0][:, :9000], decoded, atol=2e-5)
