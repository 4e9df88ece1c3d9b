"""For one clip and 20 minutes on a CPU: a model that memorises the clip. 2.9 M parameters, mono 11.025 kHz.

    m2l2 train --config=configs/clip.py --config.data.root=m2l2/assets/clips/train/crystan-credits.ogg \\
      --workdir=runs/clip

The paper's recipe with two changes: linear paths to the latents and back, and a head start (a quarter of the steps
regress from pure noise onto the clip), without which the latents of all chunks stay alike for thousands of steps. It is
rung C of launch/research/ladder.py, which states what must come out. The quickstart trains it for a minute on the
clip's magnitudes alone.

Expected cost: 55.4 GFLOP a step of 4 pairs after the head start, 0.054 PFLOP in all. Expected time: some 20 minutes on
one core of an AMD EPYC.
Expected quality, on the clip itself: SNR of the compressed spectrogram -.1 dB in one step, .2 dB after a second one
from sigma 5, coherence .61 (the clip: .62).
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
  model.widths = (48, 96)
  model.blocks = (2, 1)
  model.strides = ((4, 4),)
  model.layers = 3
  model.head_dim = 32
  model.cond_dim = 96
  model.registers = 4
  model.latent_dim = 32
  model.remat = 'none'
  config.variants.latent_norm.on = True
  config.variants.shortcut.width = 8
  config.variants.head_start.share = 0.25
  config.consistency.step_exponent = 2.0

  train = config.train
  train.steps = 1000
  train.batch_size = 4
  train.learning_rate = 2e-3
  train.final_learning_rate = 1e-4
  train.warmup_steps = 100
  train.b2 = 0.99
  train.ema_decay = 0.98
  train.log_every = 20
  train.probe_every = 200
  train.checkpoint_every = 200
  return base.finish(config, arg)
