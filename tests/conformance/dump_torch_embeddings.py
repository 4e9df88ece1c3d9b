"""Runs the reference VGGish and LAION-CLAP on made-up weights; writes tests/goldens/torch_embeddings.npz.

Run once, by hand, in a throw-away environment; m2l2 itself needs none of it:

  pip install torch librosa torchlibrosa soundfile soxr && pip install --no-deps torchvggish
  git clone https://github.com/LAION-AI/CLAP
  python tests/conformance/dump_torch_embeddings.py CLAP/src/laion_clap/clap_module

The golden holds the embeddings, and names and shapes of the references' tensors, so that m2l2's loaders are held to
both.
"""

import importlib.util
import json
import pathlib
import sys
import types
from unittest import mock

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
CLIP = ROOT / 'm2l2' / 'assets' / 'clips' / 'train' / 'maxstack-through-space.ogg'


def made_weights(shapes):
  """{name: float32 array} that depend on the names' order and the shapes alone; of the size that trained ones have."""
  rng = np.random.default_rng(0)
  weights = {}
  for name in sorted(shapes):
    shape = tuple(shapes[name])
    values = rng.standard_normal(shape, np.float32)
    if name.endswith(('running_var', 'melW')):
      weights[name] = np.abs(values) + np.float32(.01)
    elif len(shape) == 1 and name.endswith('weight'):  # of norms
      weights[name] = 1 + values / 10
    else:
      weights[name] = values / np.float32(np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 10))
  return weights


def resampled(rate):
  """The clip's downmix at `rate` Hz, float64 [samples]."""
  import soundfile
  import soxr
  audio, source_rate = soundfile.read(CLIP, always_2d=True, dtype='float32')
  return soxr.resample(audio.astype(np.float64).mean(axis=1), source_rate, rate, quality='HQ')


def shapes_of(module):
  """Those of the tensors that are learned or that the embedding is computed from, the STFT's matrices apart."""
  unused = ('spectrogram_extractor', 'relative_position_index', 'attn_mask', 'num_batches_tracked', 'tscam_conv',
            'head.')
  return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()
          if not any(part in name for part in unused)}


def load_made(module, torch):
  shapes = shapes_of(module)
  weights = {name: torch.from_numpy(values) for name, values in made_weights(shapes).items()}
  missing, unexpected = module.load_state_dict(weights, strict=False)
  assert not unexpected
  module.eval()
  return shapes


def vggish(torch):
  sys.modules['resampy'] = types.ModuleType('resampy')  # imported there, not needed at 16 kHz
  from torchvggish import torchvggish, vggish_input
  module = torchvggish.VGG(torchvggish.make_layers(), postprocess=False)
  shapes = load_made(module, torch)
  module.embeddings = torch.nn.Sequential(*list(module.embeddings.children())[:-1])  # "use_activation=False"
  examples = vggish_input.waveform_to_examples(resampled(16000), 16000)
  with torch.no_grad():
    return shapes, module(examples).numpy()


def clap(torch, folder):
  sys.modules['clap_module'] = package = types.ModuleType('clap_module')
  package.__path__ = [str(folder)]
  unneeded = ('torchvision', 'torchvision.ops', 'torchvision.ops.misc', 'h5py')
  with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in unneeded}):
    spec = importlib.util.spec_from_file_location('clap_module.htsat', folder / 'htsat.py')
    htsat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(htsat)
  config = types.SimpleNamespace(**json.loads((folder / 'model_configs' / 'HTSAT-tiny.json').read_text())['audio_cfg'])
  module = torch.nn.Module()
  module.audio_branch = htsat.create_htsat_model(config)
  module.audio_projection = torch.nn.Sequential(torch.nn.Linear(768, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512))
  shapes = load_made(module, torch)
  audio = resampled(48000).astype(np.float32)  # 6 s: once, and zeros
  audio = torch.from_numpy(np.pad(audio, (0, 480000 - len(audio))))[None]
  with torch.no_grad():
    embedding = module.audio_projection(module.audio_branch({'waveform': audio})['embedding'])
    return shapes, torch.nn.functional.normalize(embedding, dim=-1).numpy()


def main(folder):
  import torch
  stored = {}
  for name, (shapes, embedding) in (('vggish', vggish(torch)), ('clap', clap(torch, folder))):
    print(name, embedding.shape, len(shapes), np.abs(embedding).max(), embedding.std(axis=0).max())
    stored[name] = embedding
    stored[f'{name}_shapes'] = np.array(json.dumps(shapes))
  np.savez_compressed(ROOT / 'tests' / 'goldens' / 'torch_embeddings.npz', **stored)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
