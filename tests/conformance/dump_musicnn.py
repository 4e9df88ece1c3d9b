"""Dumps musicnn's weights to m2l2/assets/musicnn, and what TensorFlow's graph makes of clips to tests/goldens.

Run once, by hand, in a throw-away environment; m2l2 itself needs none of it:

  pip download --no-deps musicnn==0.1.0   (its pins are of 2019: do not install it)
  unzip musicnn-0.1.0-py3-none-any.whl -d WHEEL
  pip install tensorflow-cpu==2.16.2 'numpy<2' librosa==0.11.0 soundfile soxr
  python tests/conformance/dump_musicnn.py WHEEL

The graph is the wheel's own: its MetaGraphDef is cut to what leads to the penultimate layer and to the tags, and run
with every variable fed from the checkpoint. The golden's input is made by librosa, so the test also holds our log-mel
input.
"""

import pathlib
import shutil
import sys
import tempfile

import librosa
import numpy as np
import soundfile
import soxr
import tensorflow as tf

ROOT = pathlib.Path(__file__).parents[2]
CLIPS = ('train/crystan-credits', 'train/macklin-geoscape-theme', 'train/marino-main-theme',
         'train/obsidian-shell-ezer-ev', 'train/maxstack-through-space')
PENULTIMATE, TAGS = 'model/dense/Relu', 'model/Sigmoid'


def log_mel(path):
  """float32 [frames, 96] as musicnn's own extractor computes it."""
  audio, rate = soundfile.read(path, always_2d=True, dtype='float32')
  mono = soxr.resample(audio.mean(axis=1, dtype=np.float64), rate, 16000, quality='HQ').astype(np.float32)
  mel = librosa.feature.melspectrogram(y=mono, sr=16000, n_fft=512, hop_length=256, n_mels=96).T
  return np.log10(10000 * mel.astype(np.float16).astype(np.float32) + 1)


def windows(frames):
  return np.stack([frames[start:start + 187] for start in range(0, len(frames) - 186, 62)])


def read_checkpoint(folder):
  """The graph and {variable: array}; copied first, because TensorFlow takes no prefix without a name."""
  with tempfile.TemporaryDirectory() as temporary:
    for name in ('.index', '.data-00000-of-00001', '.meta'):
      shutil.copy(folder / name, pathlib.Path(temporary) / f'musicnn{name}')
    reader = tf.train.load_checkpoint(f'{temporary}/musicnn')
    graph = tf.compat.v1.MetaGraphDef.FromString((folder / '.meta').read_bytes()).graph_def
    names = {node.name for node in graph.node}
    return graph, {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map() if name in names}


def run_graph(graph, variables, batch):
  """(penultimate, tags) of float32 [windows, 187, 96]."""
  graph = tf.compat.v1.graph_util.extract_sub_graph(graph, [PENULTIMATE, TAGS])
  for node in graph.node:
    node.attr.pop('_output_shapes', None)  # those stored for the gradients of batch norms are wrong
  with tf.Graph().as_default() as built:
    tf.import_graph_def(graph, name='')
    feed = {'model/Placeholder:0': batch, 'model/Placeholder_2:0': False}
    operations = {operation.name for operation in built.get_operations()}
    feed |= {f'{name}/read:0': value for name, value in variables.items() if f'{name}/read' in operations}
    with tf.compat.v1.Session() as session:
      return session.run([f'{PENULTIMATE}:0', f'{TAGS}:0'], feed)


def main(wheel):
  goldens = {}
  batch = np.concatenate([windows(log_mel(ROOT / 'm2l2' / 'assets' / 'clips' / f'{clip}.ogg')) for clip in CLIPS])
  target = ROOT / 'm2l2' / 'assets' / 'musicnn'
  target.mkdir(exist_ok=True)
  for name in ('mtt', 'msd'):
    graph, variables = read_checkpoint(wheel / 'musicnn' / f'{name.upper()}_musicnn')
    kept = {key: value for key, value in variables.items()
            if 'Adam' not in key and not key.startswith(('beta1', 'beta2')) and value.ndim}
    for key, value in sorted(kept.items()):
      print(name, key, value.shape, value.dtype)
    np.savez_compressed(target / f'{name}.npz', **{
        key.replace('/', '.'): value for key, value in kept.items()})  # float16 would be off by 4e-3
    goldens[f'{name}_penultimate'], goldens[f'{name}_tags'] = run_graph(graph, variables, batch)
  np.savez_compressed(ROOT / 'tests' / 'goldens' / 'musicnn.npz', clips=np.array(CLIPS), **goldens)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
