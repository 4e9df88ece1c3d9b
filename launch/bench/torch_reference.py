"""The other side of bench.py --torch: CoDiCodec's own torch modules, eager and float32, under m2l2's training loss.

Needs `pip install -e '.[codicodec]' codicodec` (the package is CC BY-NC: it is called here, nothing of it is copied).
What it is asked for is what m2l2 computes: encoder and decoder run once a step, their features serve both noise
levels, and only the student has a gradient.
"""

import contextlib
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np

from m2l2 import build
from m2l2.errors import UserError
from m2l2.interop import codicodec as interop

try:
  import codicodec.audio
  import codicodec.inference
  import codicodec.models
  import codicodec.utils
  import torch
except ModuleNotFoundError as error:
  missing = error.name.partition('.')[0]
  raise UserError(f"--torch compares with the original, and {missing} is not installed: "
                  "pip install -e '.[codicodec]' codicodec") from error

RESAMPLERS = {(2, 2): 0, (4, 1): 1, (2, 1): 2, (1, 2): 3}  # the package's numbers of them


@contextlib.contextmanager
def sized(arch, *, hop: int, threads: int):
  """The package in the sizes of an Architecture, in float32, on so many threads; undone at the end.

  It has its sizes as globals of its modules, read when a network is made and when it runs.

  Raises UserError: an architecture that is not of its kind.
  """
  base = arch.widths[0]
  if not arch.fsq or not arch.denoiser_latents or arch.chunks != 2 or arch.stem != (1, 1) or (
      arch.bins != hop or arch.envelope or arch.shortcut_width or arch.magnitude_input or arch.latent_norm
      or arch.feature_norm or arch.registers != arch.denoiser_registers or set(arch.strides) - set(RESAMPLERS)):
    raise UserError('--torch compares with CoDiCodec: take --config=codicodec')
  sizes = {
      'dim': arch.widths[-1], 'head_dim': arch.head_dim, 'heads': arch.widths[-1] // arch.head_dim,
      'mlp_mult': arch.mlp_mult, 'num_layers': arch.layers, 'num_layers_encoder': arch.layers,
      'cond_channels': arch.cond_dim, 'num_latents': arch.num_latents, 'num_more_latents': arch.registers,
      'fsq_levels': [arch.fsq_levels] * arch.latent_dim, 'bottleneck_channels': arch.latent_dim,
      'frontend_base_channels': base, 'frontend_multipliers_list': [width // base for width in arch.widths],
      'frontend_layers_list': list(arch.blocks), 'frontend_encoder_layers_list': list(arch.blocks),
      'frontend_freq_downsample_list': [RESAMPLERS[stride] for stride in arch.strides], 'spec_length': arch.frames,
      'data_length': int(np.prod(arch.grid)), 'stft_channels': 2 * arch.channels, 'stereo': arch.channels == 2,
      'hop': hop, 'mixed_precision': False}
  before = torch.get_num_threads()
  with contextlib.ExitStack() as undo:
    undo.callback(torch.set_num_threads, before)
    torch.set_num_threads(threads)
    for module in (codicodec.audio, codicodec.inference, codicodec.models, codicodec.utils):
      for name, value in sizes.items():
        if hasattr(module, name):
          undo.callback(setattr, module, name, getattr(module, name))
          setattr(module, name, value)
    yield


def make_network(arch, *, seed: int):
  """-> (its network, the same weights as m2l2's parameters). Nothing is zero, so that every part matters."""
  torch.manual_seed(seed)
  network = codicodec.models.UNet()
  with torch.no_grad():
    for parameter in network.parameters():
      if not parameter.any():
        parameter.normal_(0, 0.02)
  state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
  return network, interop.convert_weights(state, arch)


def to_torch(chunks):
  """[B, S, F, T, C] -> tensor [B, C, F, S T]."""
  b, s, f, t, c = chunks.shape
  return torch.from_numpy(np.asarray(chunks).transpose(0, 4, 2, 1, 3).reshape(b, c, f, s * t))


class Training:
  """A step as m2l2 takes it: loss, gradients, RAdam, moving average of the weights.

  Args:
    network: of `make_network`.
    process: m2l2's Consistency, for its loss's constants.
    spec, noise: [B, 2, F, T, C]; high, low: noise levels [B, 2]; rounded: bool [B], whose latents are quantised.
    learning_rate, betas: of RAdam; decay: of the moving average.
  """

  def __init__(self, network, consistency, *, spec, noise, high, low, rounded, learning_rate, betas, decay):
    self.network, self.consistency, self.decay = network.train(), consistency, decay
    self.spec, self.noise = to_torch(spec), to_torch(noise)
    self.high, self.low, self.rounded = (torch.from_numpy(np.array(x)) for x in (high, low, rounded))
    self.trained = [p for p in network.parameters() if p.requires_grad]
    self.ema = [p.detach().clone() for p in self.trained]
    self.optimizer = torch.optim.RAdam(self.trained, lr=learning_rate, betas=betas, foreach=True)

  def loss(self):
    network = self.network
    z = network.encoder_forward(self.spec, dont_quantize=True)
    straight_through = z + (network.fsq.round_continuous(z) - z).detach()
    z = torch.where(self.rounded[:, None, None], straight_through, z)
    features = network.pre_decoder_forward(z)
    student = self._denoise(self.high, z, features)
    with torch.no_grad():
      teacher = self._denoise(self.low, z, features)
    chunks = (student - teacher).unflatten(-1, (2, -1))  # [B, C, F, S, T]
    c = self.consistency.huber * (chunks.shape[1] * chunks.shape[2] * chunks.shape[4]) ** 0.5
    distance = (chunks.square().sum((1, 2, 4)) + c * c).sqrt() - c
    return (distance / (self.high - self.low).clamp(min=1e-12)).mean()

  def _denoise(self, levels, z, features):
    spread = levels.repeat_interleave(self.spec.shape[-1] // 2, dim=1)[:, None, None]  # [B, 1, 1, S T]
    return self.network.decoder_forward(self.spec + spread * self.noise, z, features=features,
                                        sigma_left=levels[:, 0], sigma_right=levels[:, 1])

  def gradients(self):
    """-> (loss, global norm of the gradients); they are left in the parameters."""
    self.optimizer.zero_grad(set_to_none=True)
    loss = self.loss()
    loss.backward()
    return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]).item()

  def __call__(self):
    """The whole update -> loss."""
    loss, _ = self.gradients()
    self.optimizer.step()
    with torch.no_grad():
      torch._foreach_lerp_(self.ema, self.trained, 1 - self.decay)
    return loss


class Original:
  """Its network with weights of `seed`, and what bench.py runs of it. `params`: the same weights as m2l2's."""
  version = f'torch {torch.__version__}, eager, codicodec {importlib.metadata.version("codicodec")}'

  def __init__(self, arch, *, seed):
    self.network, self.params = make_network(arch, seed=seed)

  def training(self, config, audio):
    """Training on audio [B, C, N] with the noise that m2l2's first step draws."""
    consistency, rep = build.consistency(config), build.representation(config['model'])
    bottleneck = build.network(config).arch.make_bottleneck()
    step_key = jax.random.fold_in(jax.random.key(config['seed']), 0)

    @jax.jit
    @jax.vmap
    def draw(item, spec):
      level_key, noise_key, drop_key = jax.random.split(jax.random.fold_in(step_key, item), 3)
      high, low = consistency.sample_levels(level_key, chunks=2, progress=0.0)
      return {'high': high, 'low': low, 'noise': jax.random.normal(noise_key, spec.shape),
              'rounded': ~jax.random.bernoulli(drop_key, bottleneck.dropout)}

    spec = rep.analyse(audio)
    train = config['train']
    return Training(self.network, consistency, spec=spec, **draw(jnp.arange(len(spec)), spec),
                    learning_rate=train['learning_rate'], betas=(train['b1'], train['b2']), decay=train['ema_decay'])

  def codec(self, audio, *, steps: int):
    """{'encode', 'decode'}: calls of its user-facing object, autoregressive as m2l2 decodes by default."""
    codec = object.__new__(codicodec.inference.EncoderDecoder)  # its constructor would fetch the published weights
    codec.device, codec.gen = torch.device('cpu'), self.network
    codec.latents_per_timestep = codicodec.models.num_latents
    codec.bottleneck_channels = width = codicodec.models.bottleneck_channels
    codec.reset()
    latents = codec.encode(audio, desired_channels=width)
    return {'encode': lambda: codec.encode(audio, desired_channels=width).numpy(),
            'decode': lambda: codec.decode(latents, mode='autoregressive', denoising_steps=steps).numpy()}
