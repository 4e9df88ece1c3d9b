"""Compares the original with m2l2 on one input and the same weights; needs torch and the package codicodec."""

import numpy as np

from m2l2 import build
from m2l2.errors import UserError


def require_package():
  """Raises UserError: the original, or a part of it, is not installed."""
  try:
    import codicodec.models  # noqa: F401
  except ImportError as error:
    missing = (error.name or 'a part of it').partition('.')[0]
    raise UserError(f'verifying runs the original beside m2l2, and {missing} is not installed: '
                    "pip install 'm2l2[codicodec]' codicodec") from error


def verify_against_torch(state, config, params, *, tolerance: float = 1e-4) -> dict:
  """Runs one input through the original and through m2l2, float32, on the CPU.

  Args:
    state: the state dict; config, params: the converted model.
    tolerance: largest relative error ||a - b|| / ||b||.

  Returns:
    {'latents', 'features', 'denoiser'}: relative errors (of features the worst level's).

  Raises UserError: an error beyond the tolerance.
  """
  from codicodec.models import UNet
  import jax
  import torch

  net, consistency = build.network(config), build.consistency(config)
  rep = build.representation(config['model'])
  rng = np.random.default_rng(0)
  shape = (1, 2, rep.bins, rep.frames, rep.spec_channels)
  spec, noise = (rng.standard_normal(shape, np.float32) for _ in range(2))
  spec *= np.float32(0.3)
  levels = np.array([[consistency.sigma_cond, consistency.sigma_max]], np.float32)
  noisy = spec + levels[:, :, None, None, None] * noise

  original = UNet().eval()
  original.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})
  with torch.no_grad():
    z = original.encoder_forward(_to_torch(torch, spec), dont_quantize=True)
    features = original.pre_decoder_forward(z)
    out = original.decoder_forward(_to_torch(torch, noisy), z, features=features, sigma_left=float(levels[0, 0]),
                                   sigma_right=float(levels[0, 1]))
  z = z.numpy().reshape(1, 2, -1, z.shape[-1])

  @jax.jit
  def run(params, spec, z, noisy, levels):
    pre = net.encode(params, spec)
    features = net.decode(params, z)
    return net.arch.make_bottleneck()(pre), features['maps'], consistency.bind(net, params, features)(noisy, levels)

  try:
    cpu = jax.devices('cpu')[0]
  except RuntimeError as error:
    raise UserError('verifying runs on the CPU, which JAX_PLATFORMS leaves out: add ,cpu to it') from error
  with jax.default_device(cpu):
    ours = run(params, spec, z, noisy, levels)
  errors = {'latents': _relative_error(ours[0], z),
            'features': float(np.max([_relative_error(_join_chunks(a), _from_torch(b))
                                      for a, b in zip(ours[1], features)])),
            'denoiser': _relative_error(_join_chunks(ours[2]), _from_torch(out))}
  for name, value in errors.items():
    if not value <= tolerance:  # nan neither
      raise UserError(f'm2l2 and the original differ: relative error {value:.2g} of {name}, at most {tolerance:g} is '
                      'right; nothing was written')
  return errors


def _to_torch(torch, spec):
  """[1, S, F, T, C] -> tensor [1, C, F, S T]."""
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(_join_chunks(spec), -1, 1)))


def _from_torch(tensor):
  """[1, C, F, T] -> [1, F, T, C]."""
  return np.moveaxis(tensor.numpy(), 1, -1)


def _join_chunks(x):
  """[1, S, F, T, C] -> [1, F, S T, C]."""
  return np.concatenate(list(np.moveaxis(np.asarray(x), 1, 0)), axis=2)


def _relative_error(a, b) -> float:
  return float(np.linalg.norm(np.ravel(a) - np.ravel(b)) / np.linalg.norm(np.ravel(b)))
