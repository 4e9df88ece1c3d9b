"""Reading tensors from untrusted files: .safetensors, or a torch checkpoint, without executing code in it."""

from collections.abc import Mapping
import os
import pickle
import re
import warnings

import numpy as np
import safetensors
import safetensors.numpy

from m2l2.codec.latents import is_safetensors
from m2l2.data import audio_io
from m2l2.errors import UserError, first_line

STATE_DICT = 'gen_state_dict'  # its place in the published checkpoint


def read_state_dict(path, *, nested: str = STATE_DICT, of: str = 'CoDiCodec',
                    published: str = 'codicodec.pt') -> dict[str, np.ndarray]:
  """Tensors by name from a .safetensors file, or from a torch checkpoint; nothing in the file is executed.

  Args:
    nested: the state dict's place in a torch checkpoint that holds more. of, published: the model and its file, for
      messages.
  Raises UserError: no such file, damaged, not a checkpoint of the model, or torch is needed and not installed.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise UserError(f'{audio_io.shown(path)}: there is no such file (the published one is {published})')
  try:
    open(path, 'rb').close()
  except OSError as error:
    raise UserError(f'{audio_io.shown(path)}: cannot be read ({error.strerror})') from error
  return _read_safetensors(path) if is_safetensors(path) else _read_torch(path, nested, of)


def _read_safetensors(path):
  try:
    return safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{audio_io.shown(path)}: is damaged, cut short or not a safetensors file of floats '
                    f'({first_line(error, most=200)})') from error


def _read_torch(path, nested, of):
  shown = audio_io.shown(path)
  try:
    import torch
  except ModuleNotFoundError as error:
    raise UserError(f"{shown}: reading a torch checkpoint needs torch: pip install 'm2l2[codicodec]', or give a "
                    '.safetensors file of the same tensors') from error
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # torch's own, about odd pickles
      # weights_only: tensors and plain containers are rebuilt by torch's own unpickler, anything else is refused.
      checkpoint = torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:
    refused = _refused_global(str(error))
    if refused:
      raise UserError(f'{shown}: holds more than tensors ({refused}), which could run code; nothing of it was '
                      'executed. If you trust its source, save its tensors as .safetensors and import those') from error
    raise UserError(f'{shown}: is damaged, cut short or not a torch checkpoint; nothing of it was executed') from error
  except Exception as error:  # any exception that a damaged archive causes in torch
    raise UserError(f'{shown}: is damaged, cut short or not a torch checkpoint '
                    f'({first_line(error, most=200)})') from error
  if isinstance(checkpoint, Mapping) and nested in checkpoint:
    checkpoint = checkpoint[nested]
  if not isinstance(checkpoint, Mapping) or not checkpoint or not all(
      isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in checkpoint.items()):
    raise UserError(f'{shown}: has no {nested!r} and is not a state dict itself: not a checkpoint of {of}')
  for name, tensor in checkpoint.items():
    if not _is_plain(torch, tensor):
      raise UserError(f'{shown}: {shown_name(name)} is not a plain tensor with all its numbers in the file')
  return {name: _as_numpy(tensor) for name, tensor in checkpoint.items()}


def _is_plain(torch, tensor) -> bool:
  """Whether a tensor is dense with all its numbers stored: an expanded tensor of some bytes can claim terabytes."""
  if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != 'cpu':
    return False
  return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _as_numpy(tensor):
  tensor = tensor.detach()
  return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()


def _refused_global(message) -> str:
  """The name that torch's loader refused, from its message; '' if none."""
  match = re.search(r'[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) ([\w.]+)', message)
  return match[1] if match else ''


def shown_name(name: str) -> str:
  """A name from an untrusted file, safe to print."""
  return audio_io.shown(name if len(name) <= 80 else f'{name[:77]}...')
