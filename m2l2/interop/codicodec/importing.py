"""CoDiCodec's weights into a snapshot: `m2l2 import-codicodec`."""

import json
from typing import Any

import jax

from m2l2 import build
from m2l2.codec.snapshot import check_place, save_snapshot
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.interop.codicodec.exchange import LATENT_SCALE
from m2l2.interop.codicodec.reading import read_state_dict
from m2l2.interop.codicodec.verification import require_package, verify_against_torch
from m2l2.interop.codicodec.weights import convert_weights, state_dict_table


def import_codicodec(source, target, *, verify: bool = False) -> dict:
  """Writes CoDiCodec's weights as an m2l2 snapshot.

  Args:
    source: codicodec.pt, or a .safetensors file of its state dict.
    target: the snapshot's directory.
    verify: first run both implementations on one input (needs torch and codicodec); see `verify_against_torch`.

  Returns:
    {'fingerprint', 'parameters', 'unused': names of unused tensors, 'errors'?: of `verify`}

  Raises UserError: the source is not such a file, the two implementations differ, or the target cannot be written.
  Nothing is written then.
  """
  from m2l2.configs import codicodec as recipe

  check_place(target)
  config = json.loads(json.dumps(recipe.get_config().to_dict()))
  arch = build.network(config).arch
  if verify:
    require_package()
  state = read_state_dict(source)
  try:
    params = convert_weights(state, arch)
  except UserError as error:
    raise UserError(f'{audio_io.shown(source)}: {error}') from error
  report: dict[str, Any] = {'unused': sorted(
      name for name, tensor in state_dict_table(arch).items() if not tensor.path and tensor.value is None)}
  if verify:
    report['errors'] = verify_against_torch(state, config, params)
  extra = {'source': 'CoDiCodec', 'licence': 'CC BY-NC 4.0 (the licence of the published weights)',
           'latent_scale': LATENT_SCALE}
  report['fingerprint'] = save_snapshot(target, params=params, config=config, step=0, extra=extra)
  report['parameters'] = sum(array.size for array in jax.tree.leaves(params))
  return report
