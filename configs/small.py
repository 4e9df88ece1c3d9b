"""For one GPU and half an hour: `base` at half its width, with what makes latents matter early. 21.1 M parameters.

    ./launch/get_music.sh
    ./launch/research/train_small.sh

That packs 2.5 hours of music, trains, and leaves bfloat16 weights in runs/small/box. The pack is mono. On other music,
or with `:stereo`:

    m2l2 train --config=configs/small.py --config.data.root=MUSIC --workdir=runs/small

Every level has room for what a patch holds. The recipe is the paper's with the flow's c_skip, linear paths to the
latents and back, and a head start on magnitudes (2 % of the steps), as on the ladder (launch/research/learning.md).

Expected cost: 7.3 TFLOP a step of 16 pairs, 0.14 EFLOP in all. Expected time: 25 minutes on an A100 at a third of its
peak (computed; not run on a GPU).
Expected quality: unknown, and little: 0.14 EFLOP is 1/70 of `day`. See whether probe_ema/swap rises above .1 and
probe_ema/coherence above .25, where models whose phases are noise stay.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  model = config.model
  model.widths = (32, 64, 128, 256)
  model.blocks = (2, 2, 2, 1)
  model.layers = 3
  model.head_dim = 64
  model.cond_dim = 256
  config.variants.flow_skip.on = True
  config.variants.latent_norm.on = True
  config.variants.shortcut.width = 8
  config.variants.head_start.update(share=0.02, task='magnitudes')
  config.consistency.step_exponent = 2.0

  train = config.train
  train.steps = 20_000
  train.learning_rate = 5e-4
  train.final_learning_rate = 2e-5
  train.warmup_steps = 500
  train.b2 = 0.99
  train.ema_decay = 0.999
  train.keep_every = 0
  config.evaluate.every = 500
  return base.finish(config, arg)
