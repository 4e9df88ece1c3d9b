"""For one GPU: 19.3 M parameters, mono 44.1 kHz. The recipe of the model in the box, larger.

    ./launch/get_music.sh
    ./launch/research/train_small.sh

That packs 2.5 hours of music, begins at the principal components of its envelopes, trains, and leaves bfloat16 weights
in runs/small/box. The pack is mono. On other music, or with `:stereo`:

    python launch/research/pca_start.py --config=configs/small.py --config.data.root=MUSIC --output=runs/start
    m2l2 train --config=configs/small.py --config.data.root=MUSIC --config.train.init_from=runs/start \\
      --workdir=runs/small

Expected cost: 9.0 TFLOP a step of 16 pairs, 0.18 EFLOP in all: 30 minutes at a sustained 100 TFLOP/s. Counted, not run
on a GPU.
"""

from m2l2.configs import base, tiny22


def get_config(arg=''):
  config = tiny22.get_config()
  wide, model = base.get_config().model, config.model
  for name in ('native_rates', 'window', 'hop', 'bins', 'frames', 'strides', 'stem', 'registers', 'remat'):
    model[name] = wide[name]
  model.widths = (32, 64, 128, 256)
  model.blocks = (2, 2, 2, 1)
  model.layers = 3
  model.head_dim = 64
  model.cond_dim = 256
  model.shortcut_width = 0
  model.linear_sketch = (128, 16)

  train = config.train
  train.steps = 20_000
  train.batch_size = 16
  train.learning_rate = 5e-4
  train.warmup_steps = 500
  train.envelope_bands = 128
  train.checkpoint_every = 1000
  train.probe_every = 1000
  config.mesh.preset = 'hsdp'
  return base.finish(config, arg)
