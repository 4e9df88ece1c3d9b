"""Latents as vectors for music information retrieval, in files that numpy reads alone."""

import os
import zipfile

import numpy as np

from m2l2 import files


def save(path, codec, latents):
  """Writes an .npz: `features` float32 [time, dim] and `times` float64 [time] of the latents, and the `model` that made
  them, a fingerprint; np.load(path) reads it. The same latents give the same bytes.

  Args:
    codec: `Codec` of the model that made the latents.

  Raises UserError: latents of another model, or the file cannot be written.
  """
  arrays = {'features': codec.features(latents), 'times': codec.times(latents), 'model': np.array(latents.model)}
  with files.whole(path) as aside, open(aside, 'wb') as file:
    np.savez(file, **arrays)


def model_of(path) -> str | None:
  """The fingerprint of the model that a file of features is of; None where there is no such file."""
  if not os.path.isfile(path):
    return None
  try:
    with np.load(path, allow_pickle=False) as stored:
      return str(stored['model'])
  except (OSError, ValueError, KeyError, zipfile.BadZipFile):
    return None
