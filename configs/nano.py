"""For tests and first runs on a CPU, 44.1 kHz mono. 3.1 M parameters.

    m2l2 train --config=configs/nano.py --config.data.root=MUSIC --workdir=runs/nano

Expected cost: 22.2 GFLOP a step of 2 pairs after the head start, which is the first half of the steps. Expected time:
2,000 steps in a quarter of an hour on one core of an AMD EPYC.
Expected quality: it follows the spectrum of a few clips chunk by chunk (ratio 0.44 on the one clip it was trained on,
28 Nov 2026, before its linear paths mixed all tokens); for music in general it is too small.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  model = config.model
  model.stem = (8, 4)
  model.widths = (48, 96)
  model.blocks = (1, 1)
  model.strides = ((8, 2),)
  model.layers = 2
  model.head_dim = 48
  model.registers = 4
  model.cond_dim = 128
  model.remat = 'none'
  base.short_run(config)
  config.variants.latent_norm.on = True
  config.variants.shortcut.width = 8
  config.variants.head_start.share = 0.5
  config.variants.envelope.weight = 100.0

  train = config.train
  train.steps = 2000
  train.batch_size = 2
  train.optimizer = 'adam'
  train.learning_rate = 2e-3
  train.final_learning_rate = 2e-5
  train.warmup_steps = 50
  train.b2 = 0.99
  train.ema_decay = 0.98
  train.log_every = 20
  train.probe_every = 200
  train.checkpoint_every = 500
  train.keep_every = 0
  config.evaluate.every = 500
  config.mesh.preset = 'dp'
  return base.finish(config, arg)
