"""The paper's recipe, and every field there is: `base`, mono, 147.5 M parameters.

    m2l2 train --config=configs/base.py --config.data.root=MUSIC --workdir=runs/base

Expected cost: 48.9 TFLOP a step of 16 pairs, student and teacher; 39 EFLOP for the 800,000 steps of the ancestor's
recipe. Expected time: 3.6 days on an A100 at 40 % of its peak, 1.1 days on an H100 (computed; not run).
Expected quality: the paper's (m2l2/evaluation/README.md has its figures). No run here was long enough to tell.

Other configs state what they change of this one. Append `:debug` to any of them to shrink it so that it runs in
seconds and logs every step.
"""

import ml_collections


def get_config(arg=''):
  config = ml_collections.ConfigDict()
  config.seed = 0

  model = config.model = ml_collections.ConfigDict()
  # Representation. A chunk is `frames` frames: 64 x 512 = 32768 samples.
  model.native_rates = (44100, 48000)  # not resampled; other rates are resampled to the first
  model.channels = 1                   # 1: mono; 2: stereo
  model.window = 2048                  # samples of the Hann window
  model.hop = 512                      # samples between frames
  model.bins = 1024                    # frequency bins kept (1024 of 1025: the Nyquist bin is dropped)
  model.frames = 64                    # frames a chunk
  model.transform = 'polar'            # polar: |c| is compressed, the phase stays; component: re and im apart
  model.alpha = 0.65                   # exponent of the compression
  model.beta = 0.34                    # gain of the compression
  model.edges = 'pad'                  # pad: the ends of a file are padded, so that they do not fade; none: no padding
  # Patchifiers: from 1024 x 64 down to 64 x 8 = 512 tokens.
  model.stem = (1, 1)                  # (F, T) patch folded into channels first; (1, 1) is none
  model.widths = (64, 128, 256, 512)   # channels of each level; the last is the transformers' width
  model.blocks = (3, 3, 3, 1)          # residual conv blocks of each level
  model.strides = ((2, 2), (4, 2), (2, 2))  # (F, T) between the levels
  # Transformers: encoder, decoder and denoiser alike.
  model.layers = 12
  model.head_dim = 128
  model.mlp_mult = 4                   # SwiGLU's inner projection is width -> mlp_mult * width (two halves)
  model.registers = 8                  # extra tokens of encoder and decoder
  model.cond_dim = 512                 # width of the noise embedding
  model.chunks = 2                     # chunks the denoiser sees at once; 1: each is decoded alone
  # Summary embeddings.
  model.num_latents = 8                # K
  model.latent_dim = 64                # d: K d = 512 numbers for 32768 samples
  # How it runs.
  model.remat = 'products'             # recomputed in the backward pass: none; products: all but those; blocks; full
  model.attention = 'auto'             # auto, xla, cudnn or pallas_tpu: kernels/chunk_causal.py
  model.dtype = 'auto'                 # of activations: float32, bfloat16, or auto: bfloat16 where that is fast

  consistency = config.consistency = ml_collections.ConfigDict()
  consistency.sigma_min = 0.002
  consistency.sigma_max = 80.0
  consistency.rho = 7.0                # warp of sigma(index)
  consistency.sigma_data = 0.5         # assumed deviation of the compressed spectrogram
  consistency.p_mean = -1.1            # of ln sigma in training
  consistency.p_std = 2.0
  consistency.sigma_cond = 0.965       # noise put back on the previous chunk in decoding
  consistency.step_start = 0.1         # index step at the start ...
  consistency.step_exponent = 3.0      # ... and step_start ** this at the end
  consistency.huber = 0.00054          # c = huber sqrt(D)
  consistency.refine = True            # decoding: a chunk is denoised again as the next one's left neighbour
  consistency.steps = 1                # denoisings of a chunk in autoregressive decoding, before the refinement

  # Departures from the paper (m2l2/variants), each a group of its own, off here. launch/research/learning.md says what
  # each is worth.
  variants = config.variants = ml_collections.ConfigDict()
  # The decoder also predicts log-magnitudes, which the denoiser sees. weight: of their loss, in which `bands`, as wide
  # as an ear's, count alike; 0: bins do.
  variants.envelope = dict(on=False, weight=0.0, bands=0)
  # A linear autoencoder of the envelope, added to it. cells: (bands, stretches of frames); (): none.
  variants.sketch = dict(cells=())
  # sigma_data is each bin's own, from the predicted envelope.
  variants.local_scale = dict(on=False)
  # Log-magnitudes are further input channels of the encoder.
  variants.magnitude_input = dict(on=False)
  # Linear paths tokens -> latents -> tokens, parallel to the transformers. width: numbers per token on them; 0: none.
  variants.shortcut = dict(width=0)
  # Each embedding has RMS 0.4 before the bottleneck, so tanh cannot saturate.
  variants.latent_norm = dict(on=False)
  # Features of the cross connections are scaled to unit mean square.
  variants.feature_norm = dict(on=False)
  # c_skip is exact for Gaussian data.
  variants.flow_skip = dict(on=False)
  # Noise is the spectrogram of white noise; in the paper every number is its own.
  variants.signal_noise = dict(on=False)
  # share: of the steps, from the first on, that train on an easier task: to regress the data, or its magnitudes, from
  # sigma_max, or the envelope alone: 'data', 'magnitudes' or 'envelope'.
  variants.head_start = dict(share=0.0, task='data')
  # chance: that a chunk keeps only a random prefix of its embeddings.
  variants.nested = dict(chance=0.0)
  # CoDiCodec's quantised latents. levels: of a dimension; dropout: chance that an item's stay unrounded in training.
  variants.fsq = dict(on=False, levels=11, dropout=0.75)
  # Further tokens of the denoiser: the embeddings, as in CoDiCodec, and registers. 512 tokens fill 128-wide tiles;
  # these spill over.
  variants.denoiser = dict(latents=False, registers=0)
  # CoDiCodec's noise put back in decoding, x + sqrt(sigma^2 - sigma_min^2) eps; the paper's is x + sigma eps.
  variants.variance_renoise = dict(on=False)
  # CoDiCodec's parallel decoding, where it is asked for. steps: denoisings.
  variants.staggered = dict(steps=4)
  # Ablations: what the paper's choices are worth (launch/research/ablate.py). Embeddings see their own slot of frames;
  # decoder maps do not enter the denoiser (set denoiser.latents).
  variants.local_embeddings = dict(on=False)
  variants.no_cross_connections = dict(on=False)
  # Maps narrower than tile are packed, which changes no result: 0, 128, 256, or auto: a TPU's matrix unit, elsewhere 0.
  variants.packing = dict(tile=any_type('auto'))

  train = config.train = ml_collections.ConfigDict()
  train.steps = 800_000
  train.batch_size = 16                # crops of two chunks, over all devices
  train.accumulate = 1                 # microbatches an update
  train.reduction = 'activations'      # what devices sum gradients in: the dtype of activations, or float32
  train.optimizer = 'radam'            # radam or adam
  train.learning_rate = 1e-4
  train.final_learning_rate = 1e-6     # end of the cosine
  train.warmup_steps = 10_000
  train.b1 = 0.9
  train.b2 = 0.999
  train.clip_norm = any_type(None)     # largest gradient norm; None in the paper
  train.ema_decay = 0.9999             # with warm-up min(decay, (1 + n) / (10 + n)); less in short runs
  train.log_every = 100
  train.probe_every = 1000             # steps between probes (swap, energy, SNR); 0: never
  train.checkpoint_every = 1000
  train.keep_last = 3                  # the newest checkpoints are kept
  train.keep_every = 50_000            # and one every so many steps for good; 0: none
  train.max_skipped_in_a_row = 20      # that many non-finite gradients in a row end the run
  train.compiler_options = ''          # NAME=VALUE,... for XLA
  train.profile = ''                   # FIRST:LAST, steps whose profiler trace goes to workdir/profile
  train.init_from = ''                 # snapshot, workdir or model in the box whose weights a new run starts from

  # How the recipe follows the batch: k is train.batch_size over `batch`, for which the numbers of `train` were written.
  # A field that the command line gives stays as it is given. None of these rules was tried here at pods' batches.
  scaling = config.scaling = ml_collections.ConfigDict()
  scaling.batch = 0                    # 0: off, the numbers hold for any batch; the paper's are for 16
  # Learning rates x k^this. 1/2: Adam and its kind (arXiv 2205.10287, whose 1 - b1 and 1 - b2 would grow by k as well:
  # from k = 10 on they cannot); 1: plain SGD (arXiv 1706.02677).
  scaling.rate_power = 0.5
  # Steps / k^this. 1: as many samples (arXiv 1706.02677); 0: as many updates (arXiv 1705.08741). Beyond the critical
  # batch the steps that a loss takes fall ever less (arXiv 1812.06162): 1/2 keeps rate x steps.
  scaling.steps_power = 0.5
  # Warm-up / k^this. 1: as many samples (arXiv 1706.02677), but no fewer updates than least_warmup, about 2 / (1 - b2)
  # (arXiv 1910.04209), or than were written.
  scaling.warmup_power = 1.0
  scaling.least_warmup = 2000
  # Half-life of the average in samples, in place of ema_decay (arXiv 2206.00364; as decay^k, arXiv 2307.13813); 0: off.
  # 0.9999 at a batch of 16 is 110,898.
  scaling.ema_half_life = 0
  # The index step shrinks over the run, by the share of its steps done (arXiv 2310.14189), so it follows by itself.
  # The last one / k^this, on top: a smaller step has less bias and more variance, which a large batch averages out.
  scaling.step_power = 0.0

  data = config.data = ml_collections.ConfigDict()
  data.source = 'auto'                 # auto: root is what is there; folder: one folder, glob or file, commas and all
  data.root = ''                       # audio files, m2l2 prepare's output, tfds:NAME, or 3*PLACE,1*PLACE: sources.py
  data.split = 'train'                 # of datasets
  data.rms_floor = 1e-3                # crops below this RMS are drawn again
  data.gain_db = 0.0                   # each crop is scaled at random within +-gain_db dB
  data.mix = 0.0                       # chance that a sample is the sum of two crops, clipped (CoDiCodec: 0.5)
  data.num_workers = -1                # processes that read ahead; 0: threads of this one; -1: as many as it needs
  data.num_threads = -1                # crops read at once, in each of them; -1: by what a crop costs and devices take
  data.prefetch = 8                    # batches read ahead, by each worker
  data.worker_buffer = 1               # further batches that each worker holds ready
  data.device_prefetch = 1             # of them, batches already put on the devices

  evaluate = config.evaluate = ml_collections.ConfigDict()
  evaluate.root = ''                   # held-out music that the averaged weights are measured on; '': never
  evaluate.every = 5000                # steps between; and after the last
  evaluate.clips = 8                   # files, evenly over all there are
  evaluate.seconds = 10.0              # from the middle of each
  evaluate.metrics = 'si_sdr,mel_l1_db,ratio,musicnn_mtt'  # as for m2l2 evaluate
  evaluate.raw = False                 # also the raw weights, not only the averaged ones
  evaluate.best = ''                   # one of the metrics: the best snapshot so far is kept in workdir/best

  mesh = config.mesh = ml_collections.ConfigDict()
  mesh.preset = 'hsdp'                 # table of logical axes: dp, fsdp, hsdp or tp
  mesh.data = -1                       # devices along each axis; -1: what is left
  mesh.fsdp = 1
  mesh.tensor = 1
  return finish(config, arg)


def any_type(value):
  """A field that takes values of every type. Other fields refuse values of another type than their first value's."""
  return ml_collections.FieldReference(value, field_type=object)


def short_run(config):
  """Sets what lets a run of minutes or hours learn. All of it is off in the paper's recipe; see
  launch/research/learning.md."""
  variants = config.variants
  for variant in ('envelope', 'local_scale', 'flow_skip'):
    variants[variant].on = True
  variants.head_start.task = 'envelope'
  config.consistency.step_exponent = 2.0
  config.evaluate.raw = True  # the average lags behind in the first thousands of steps


def stereo(config):
  """Makes a mono config stereo, with what keeps stereo runs from collapsing in their warm-up.

  variants.latent_norm gives each embedding RMS 0.4 before tanh, whatever its length, so tanh cannot saturate; a linear
  sketch begins at that RMS by itself. Half the learning rate and twice the warm-up are our choice, too.
  """
  config.model.channels = 2
  config.variants.latent_norm.on |= not config.variants.sketch.cells
  config.train.learning_rate /= 2
  config.train.warmup_steps *= 2


def finish(config, arg=''):
  """Applies the words after the colon (`debug`, `mono`, `stereo`; comma-separated, in any order) and locks the config.

  Raises ValueError: another word.
  """
  words = [word for word in arg.split(',') if word]
  for word in words:
    if word not in ('debug', 'mono', 'stereo'):
      raise ValueError(f'config argument {word!r} is not known: use debug, mono or stereo')
  if 'stereo' in words and config.model.channels == 1:
    stereo(config)
  if 'mono' in words:
    config.model.channels = 1
  if 'debug' in words:
    debug(config)
  return config.lock()  # a misspelt field in a config file is an error, not a new field


def debug(config):
  """Shrinks every size and keeps every choice."""
  model, train, variants = config.model, config.train, config.variants
  shifts = model.window // model.hop
  model.window, model.hop, model.bins, model.frames = 256, 256 // shifts, 128, 16
  model.widths = tuple(8 * width // model.widths[0] for width in model.widths)
  model.blocks = tuple(1 for _ in model.blocks)
  model.layers, model.head_dim, model.registers, model.cond_dim = 2, model.widths[-1] // 2, 2, 16
  variants.sketch.cells = (32, 4) if variants.sketch.cells else ()
  model.num_latents, model.latent_dim = min(model.num_latents, 8), min(model.latent_dim, 8)
  train.steps, train.batch_size, train.warmup_steps = 8, 8, 2
  config.scaling.batch = min(config.scaling.batch, train.batch_size)
  variants.envelope.bands = min(variants.envelope.bands, 32)
  train.log_every, train.probe_every, train.checkpoint_every, train.keep_every = 1, 4, 4, 0
  config.evaluate.every, config.evaluate.clips, config.evaluate.seconds = 4, 1, 0.1
