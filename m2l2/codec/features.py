"""Latents as vectors for music information retrieval: their files, and which pieces are alike."""

from collections.abc import Sequence
import zipfile

import numpy as np

from m2l2 import files
from m2l2.data.audio_io import shown
from m2l2.errors import UserError

EXTENSION = '.npz'
SHRINKAGE = 0.3  # of the covariance to a multiple of one; .1 and 1 did as well on 60 training tracks


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


def load(path, *, model: str) -> np.ndarray:
  """The features of a file, float32 [time, dim]. Raises UserError: it holds none, or those of another model."""
  try:
    with np.load(path, allow_pickle=False) as stored:
      features, fingerprint = stored['features'], str(stored['model'])
  except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
    raise UserError(f'{shown(path)}: is not a file of features (make one with m2l2 encode --features)') from error
  if fingerprint != model:
    raise UserError(f'{shown(path)}: its features are of model {fingerprint}, not of {model}: encode again')
  return features


def similarity(query: np.ndarray, pieces: Sequence[np.ndarray]) -> np.ndarray:
  """How alike a piece and others are, float64 [n] in [-1, 1].

  The cosine between their mean features, less the mean of all, in coordinates in which the features vary alike in all
  directions within a piece: what changes from chunk to chunk of every piece says little of which piece it is
  (within-class covariance normalisation, Hatch et al., 2006).

  Args:
    query: float [time, dim], a piece's features. pieces: n of these, of any lengths.
  """
  every = [np.asarray(piece, np.float64) for piece in (query, *pieces)]
  means = np.stack([piece.mean(axis=0) for piece in every])
  within = np.concatenate([piece - mean for piece, mean in zip(every, means)])
  covariance = within.T @ within / len(within)
  level = max(np.trace(covariance) / len(covariance), 1e-9)  # 0 where all pieces are of one chunk
  factor = np.linalg.cholesky(covariance + SHRINKAGE * level * np.eye(len(covariance)))
  rows = np.linalg.solve(factor, (means - means.mean(axis=0)).T).T
  rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
  return rows[1:] @ rows[0]
