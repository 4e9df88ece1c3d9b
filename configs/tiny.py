"""For a CPU: tests, the quickstart, a first look. Mono 44.1 kHz.

    m2l2 train --config=configs/tiny.py --config.data.root=MUSIC --workdir=runs/tiny
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  model = config.model
  model.stem = (4, 2)
  model.widths = (32, 64, 128)
  model.blocks = (1, 1, 1)
  model.strides = ((4, 2), (4, 2))
  model.layers = 2
  model.head_dim = 64
  model.registers = 4
  model.cond_dim = 128
  model.remat = 'none'
  # What short runs need (see README).
  model.magnitude_input = True
  model.shortcut = True
  model.envelope = True
  model.feature_norm = True

  consistency = config.consistency
  consistency.local = True
  consistency.skip = 'flow'
  consistency.step_exponent = 2.0

  train = config.train
  train.steps = 2000
  train.batch_size = 4
  train.optimizer = 'adam'
  train.learning_rate = 1e-3
  train.final_learning_rate = 1e-5
  train.warmup_steps = 50
  train.b2 = 0.99
  train.clip_norm = 1.0
  train.ema_decay = 0.99
  train.envelope_weight = 100.0
  train.log_every = 20
  train.probe_every = 200
  train.checkpoint_every = 500
  train.keep_every = 0
  config.mesh.preset = 'dp'
  return base.finish(config, arg)
