"""For one GPU: 19.3 M parameters, mono 44.1 kHz (append :stereo for stereo).

    m2l2 train --config=configs/small.py --config.data.root=MUSIC --workdir=runs/small

The paper's architecture at half the width, with what short runs need (see README) and a schedule of
60,000 steps of 16 pairs: about 400 hours of audio seen.

Expected cost: 7.6 TFLOP a full step, 0.46 EFLOP in all: 40 minutes at a sustained 200 TFLOP/s. Counted, not run.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  model = config.model
  model.widths = (32, 64, 128, 256)
  model.blocks = (2, 2, 2, 1)
  model.layers = 4
  model.head_dim = 64
  model.cond_dim = 256
  base.short_run(config)

  train = config.train
  train.steps = 60_000
  train.head_start = 0.05
  train.optimizer = 'adam'
  train.learning_rate = 5e-4
  train.warmup_steps = 500
  train.b2 = 0.99
  train.clip_norm = 1.0
  train.ema_decay = 0.999
  return base.finish(config, arg)
