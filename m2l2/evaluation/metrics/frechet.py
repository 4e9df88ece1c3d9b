"""Frechet distance between two sets of embeddings, as of normal distributions.

  |mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2)

in float64. The last trace is the sum of the roots of that symmetrised product's eigenvalues; with C = X^T X (X: the
centred rows over sqrt(n - 1)) these roots are the singular values of X_a X_b^T, which is how they are computed: no root
of a small eigenvalue is taken, so fewer windows than dimensions (singular covariances) are as exact as many.

Over few clips it is meaningful only if paired: the same clips on both sides.
"""

from collections.abc import Sequence

import numpy as np

from m2l2.errors import UserError

DRAWS = 40


def frechet_distance(a, b) -> float:
  """The distance of two sets of embeddings, float [n, d] and [m, d]; 0 for equal sets.

  Raises:
    UserError: fewer than two embeddings on a side, not finite, or of different widths.
  """
  mean_a, factor_a = _moments(a)
  mean_b, factor_b = _moments(b)
  if mean_a.shape != mean_b.shape:
    raise UserError(f'embeddings of {len(mean_a)} and of {len(mean_b)} numbers cannot be compared')
  traces = np.sum(factor_a ** 2) + np.sum(factor_b ** 2)
  cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
  return float(max(0., np.sum((mean_a - mean_b) ** 2) + traces - 2 * cross))


def bootstrap_sd(a: Sequence, b: Sequence, *, draws: int = DRAWS, seed: int = 0) -> float | None:
  """Bootstrap standard deviation of the distance: clips are resampled, the same ones on both sides.

  Args:
    a, b: one array [windows, d] a clip, in the same order on both sides.
    draws: number of resampled sets, each of as many clips as given, with replacement.
  Returns:
    None with fewer than two clips.
  """
  if len(a) != len(b):
    raise UserError(f'{len(a)} clips cannot be paired with {len(b)}')
  if len(a) < 2:
    return None
  rng = np.random.default_rng(seed)
  picks = rng.integers(len(a), size=(draws, len(a)))
  distances = [frechet_distance(*(np.concatenate([side[i] for i in pick]) for side in (a, b))) for pick in picks]
  return float(np.std(distances, ddof=1))


def paired_difference(
    a: Sequence, b: Sequence, reference: Sequence, *, draws: int = 400, seed: int = 0) -> dict[str, float]:
  """The distance of a from the reference less that of b, with its 95 % bootstrap interval.

  The same clips are resampled for all three, so the difficulty of a clip cancels; below 0, a is nearer.

  Args:
    a, b, reference: one array [windows, d] a clip, in the same order.
    draws: number of resampled sets, each of as many clips as given, with replacement.
  Returns:
    {'mean': the difference of the two distances, 'low', 'high'}.
  Raises:
    UserError: not as many clips on each side, or fewer than two embeddings in all.
  """
  if not len(a) == len(b) == len(reference):
    raise UserError(f'{len(a)}, {len(b)} and {len(reference)} clips cannot be paired')

  def difference(picks):
    far, near, to = (np.concatenate([side[i] for i in picks]) for side in (a, b, reference))
    return frechet_distance(far, to) - frechet_distance(near, to)

  drawn = np.random.default_rng(seed).integers(len(a), size=(draws, len(a)))
  low, high = np.quantile([difference(picks) for picks in drawn], [.025, .975])
  return {'mean': difference(range(len(a))), 'low': float(low), 'high': float(high)}


def _moments(embeddings) -> tuple[np.ndarray, np.ndarray]:
  """Mean [d] and a factor X [min(n, d), d] of the unbiased covariance X^T X, float64."""
  x = np.asarray(embeddings, np.float64)
  if x.ndim != 2 or len(x) < 2:
    raise UserError(f'a Frechet distance needs two or more embeddings [n, d] a side, not {list(x.shape)}: '
                    'give more or longer clips')
  if not np.isfinite(x).all():
    raise UserError('embeddings that are NaN or infinite have no Frechet distance')
  mean = x.mean(axis=0)
  x = (x - mean) / np.sqrt(len(x) - 1)
  return mean, np.asarray(np.linalg.qr(x, mode='r')) if len(x) > x.shape[1] else x
