"""For one instrument and a day of a CPU: a model of rendered piano alone. 4.3 M parameters, mono 11.025 kHz.

    python launch/research/piano.py
    m2l2 train --config=configs/piano.py --config.data.root=data/piano/train --workdir=runs/piano

The recipe of `clip` and the flow's c_skip, without which the latents of a corpus are ironed out in a hundred steps
(launch/research/learning.md). Every level has room for what a patch holds (16 numbers in 32 channels, 128 in 128). It
is rung P of launch/research/ladder.py, which states what must come out.

Expected cost: 59.8 GFLOP a step of 4 pairs after the head start, 1.02 PFLOP in all. Expected time: some eight hours on
one core of an AMD EPYC (from the first steps; not run to the end).
Expected quality: unknown yet.
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
  config.variants.head_start.update(share=0.01, task='magnitudes')
  config.consistency.step_exponent = 2.0

  train = config.train
  train.steps = 17_000
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
