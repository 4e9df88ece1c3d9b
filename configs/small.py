"""For one GPU and half an hour: the recipe of `tiny` at 44.1 kHz on a larger network. 19.3 M parameters, mono.

    ./launch/get_music.sh
    ./launch/research/train_small.sh

That packs 2.5 hours of music, begins at the principal components of its envelopes, trains, and leaves bfloat16 weights
in runs/small/box. The pack is mono. On other music, or with `:stereo`:

    python launch/research/pca_start.py --config=configs/small.py --config.data.root=MUSIC --output=runs/start
    m2l2 train --config=configs/small.py --config.data.root=MUSIC --config.train.init_from=runs/start \\
      --workdir=runs/small

Expected cost: 9.0 TFLOP a step of 16 pairs, 0.18 EFLOP in all. Expected time: 30 minutes on an A100 at a third of its
peak (computed; not run on a GPU).
Expected quality: better than its start, which has ratio .53, log-mel L1 4.35 dB and FD 338 on ten held-out tracks.
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
  base.short_run(config)
  config.consistency.refine = False

  variants = config.variants
  variants.sketch.cells = (128, 16)
  variants.signal_noise.on = True
  variants.easy.share = 0.3            # the first steps denoise plainly
  variants.envelope.update(weight=30.0, bands=128)
  variants.nested.chance = 0.25

  train = config.train
  train.steps = 20_000
  train.optimizer = 'adam'
  train.learning_rate = 5e-4
  train.final_learning_rate = 2e-5
  train.warmup_steps = 500
  train.b2 = 0.99
  train.clip_norm = 1.0
  train.ema_decay = 0.999
  train.keep_every = 0
  config.evaluate.every = 500
  return base.finish(config, arg)
