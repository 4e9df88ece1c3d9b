"""For one instrument and two hours of a CPU: the model `piano` in the box. 4.3 M parameters, mono 11.025 kHz.

    python launch/research/piano.py
    m2l2 train --config=configs/piano.py --config.data.root=data/piano/train --workdir=runs/piano

The recipe of `clip` and the flow's c_skip, without which the latents of a corpus are ironed out in a hundred steps
(launch/research/learning.md). Every level has room for what a patch holds (16 numbers in 32 channels, 128 in 128). It
is rung P of launch/research/ladder.py, which states what must come out.

Expected cost: 59.8 GFLOP a step of 4 pairs after the head start, 0.30 PFLOP in all. Expected time: 80 minutes on two
cores of an Intel Xeon.
Expected quality: m2l2/assets/models/piano/MODEL.md.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  model = config.model
  model.native_rates = (11025,)
  model.window = 512
  model.hop = 128
  model.bins = 256
  model.stem = (4, 2)
  model.widths = (32, 128)
  model.blocks = (1, 1)
  model.strides = ((4, 2),)
  model.layers = 3
  model.head_dim = 32
  model.cond_dim = 96
  model.registers = 4
  model.latent_dim = 32
  model.remat = 'none'
  config.variants.flow_skip.on = True
  config.variants.latent_norm.on = True
  config.variants.shortcut.width = 8
  config.variants.head_start.update(share=0.036, task='magnitudes')
  config.consistency.step_exponent = 2.0
  config.consistency.sigma_cond = 0.3  # the best of .1, .3, .965 and 3 on held-out pieces

  train = config.train
  train.steps = 5_000
  train.batch_size = 4
  train.learning_rate = 1e-3
  train.final_learning_rate = 2e-5
  train.warmup_steps = 100
  train.b2 = 0.99
  train.ema_decay = 0.999
  train.log_every = 50
  train.probe_every = 500
  train.checkpoint_every = 200
  return base.finish(config, arg)
