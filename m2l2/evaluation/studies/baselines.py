"""Baselines: codecs of the same rate that have learned little or nothing.

All take and return float32 [1, samples] at a sample rate.
"""

import numpy as np

from m2l2.errors import UserError


def noise_vocoder(audio, *, sample_rate: int, parameters_per_second: float, bands: int = 16, seed: int = 0):
  """White noise in `bands` bands of equal width on the mel scale, each with the RMS of its band of `audio`.

  The RMS is taken over parameters_per_second / bands blocks per second, and interpolated linearly between their
  centres.
  """
  samples = audio.shape[1]
  block = max(1, round(sample_rate * bands / parameters_per_second))
  edges = _mel_edges(bands, sample_rate / 2)
  spectrum = np.fft.rfft(audio[0].astype(np.float64))
  noise = np.fft.rfft(np.random.default_rng(seed).standard_normal(samples))
  hz = np.fft.rfftfreq(samples, 1 / sample_rate)
  starts = np.arange(0, samples, block)
  lengths = np.diff([*starts, samples])
  output = np.zeros(samples)
  for low, high in zip(edges, edges[1:]):
    inside = (hz >= low) & (hz < high)
    if not inside.any():
      continue
    band, carrier = (np.fft.irfft(np.where(inside, x, 0), samples) for x in (spectrum, noise))
    rms = np.sqrt(np.add.reduceat(np.square(band), starts) / lengths)
    gain = np.interp(np.arange(samples), starts + lengths / 2, rms)
    output += gain * carrier / np.sqrt(np.mean(np.square(carrier)))
  return output[None].astype(np.float32)


def noise_phases(audio, representation, *, seed: int = 0):
  """`audio`, at the representation's rate, with its magnitudes and the phases of white noise: what a model comes to
  that knows all but phases. Independent random phases cancel where frames overlap, and are 6 dB softer."""
  padded, signal = in_chunks(audio, representation)
  noise = np.random.default_rng(seed).standard_normal(padded.shape).astype(np.float32)
  spec, carrier = (np.asarray(representation.analyse(sound)) for sound in (padded, noise))
  magnitude, own = (np.linalg.norm(x.reshape(*x.shape[:-1], representation.channels, 2), axis=-1, keepdims=True)
                    for x in (spec, carrier))
  turned = carrier * np.repeat(magnitude / np.maximum(own, 1e-12), 2, axis=-1).reshape(spec.shape)
  sound = np.concatenate(representation.synthesise(turned), axis=-1)
  return sound[:1, signal]


def in_chunks(audio, representation) -> tuple[np.ndarray, slice]:
  """audio [1, samples] on all of the representation's channels, in silence up to whole chunks: (float32 [channels,
  crop_samples], where the audio is in it, less what is over of a frame where edges are 'none')."""
  layout = representation.layout(audio.shape[1])
  padded = np.zeros((representation.channels, representation.crop_samples(layout.chunks)), np.float32)
  signal = slice(layout.lead, min(layout.lead + audio.shape[1], padded.shape[1]))
  padded[:, signal] = audio[:, :signal.stop - signal.start]
  return padded, signal


def _mel_edges(bands, nyquist):
  """Borders in Hz, 0 to just beyond `nyquist`, equally far apart on the mel scale 2595 log10(1 + hz / 700)."""
  mel = np.linspace(0, 2595 * np.log10(1 + nyquist / 700), bands + 1)
  edges = 700 * (10 ** (mel / 2595) - 1)
  edges[-1] = 2 * nyquist
  return edges


def fit_pca(blocks, components: int):
  """sklearn.decomposition.PCA fitted to blocks [m, n], m > components, by subspace iteration (Halko et al., 2011).

  Raises UserError: too few blocks.
  """
  from sklearn.decomposition import PCA  # here: it takes a second to import
  if len(blocks) <= components:
    raise UserError(f'{components} principal components need more than {len(blocks)} blocks to be fitted')
  return PCA(components, svd_solver='randomized', iterated_power=8, random_state=0).fit(blocks)


def paired_bootstrap(differences, *, draws: int = 10_000, seed: int = 0) -> dict[str, float]:
  """Mean of paired differences [n], and the 95 % bootstrap interval of the mean."""
  values = np.asarray(differences, np.float64)
  picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
  low, high = np.quantile(values[picks].mean(axis=1), [.025, .975])
  return {'mean': float(values.mean()), 'low': float(low), 'high': float(high)}
