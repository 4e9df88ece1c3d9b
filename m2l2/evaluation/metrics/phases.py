"""What phases say: how far partials carry theirs along."""


def coherence(spec, *, lag: int = 4):
  """How far partials carry their phase along: of a spectrogram [..., F, T, 2C], of numpy or of JAX -> [...] in [0, 1].

  sum_f |sum_t X[f, t + lag] conj(X[f, t])| / sum_f sum_t |X[f, t + lag]| |X[f, t]|, over all frames given: figures here
  are of 64 at a hop of a quarter of the window; frames 4 apart do not overlap then. A steady tone has 1, music .5 to
  .8, exact magnitudes with random phases .2 to .28, white noise .18. Silence has no phase: 0.
  """
  (a, b), (c, d) = ((part[..., 0::2], part[..., 1::2]) for part in (spec[..., lag:, :], spec[..., :-lag, :]))
  real, imaginary = a * c + b * d, b * c - a * d
  size = lambda x, y: (x * x + y * y) ** 0.5
  total = size(real, imaginary).sum(axis=(-3, -2, -1))
  return size(real.sum(axis=-2), imaginary.sum(axis=-2)).sum(axis=(-2, -1)) / (total + 1e-12)
