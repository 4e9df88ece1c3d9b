"""Does it learn? Health of latents and features in each step, and the probe: one-step decoding from pure noise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from m2l2.evaluation.metrics.phases import coherence
from m2l2.variants.envelope import log_magnitude

PROBED = (0.2, 1.0)  # noise levels that the probe denoises at
SATURATED = 0.99     # |z| above this counts as saturated


def probe(params, audio: Float[Array, 'B C N'], key: Key[Array, ''], *, network, representation, consistency
          ) -> dict[str, Float[Array, '']]:
  """Does decoding use the latents? One step from sigma_max, of B >= 2 crops.

  swap: relative change of the output when another item's latents meet the same noise.
  energy: RMS of the output over RMS of the source.
  coherence: of the output, see evaluation/metrics/phases.py; coherence_source: what the source has.
  log_magnitude_l1: mean |error| of the output's log-magnitudes; log_magnitude_l1_swapped with the wrong latents.
  snr_{sigma}: SNR in dB of denoising at that level, with the right latents and with the wrong ones.
  """
  spec = representation.analyse(audio)
  pre = network.encode(params, spec)
  z = network.arch.make_bottleneck()(pre)
  noise = jax.vmap(lambda k: consistency.unit_noise(k, representation, spec.shape[1]))(
      jax.random.split(key, len(spec)))
  # Right and wrong latents side by side, and the levels in a loop: one program of each network, not two and six.
  both = lambda right, wrong: jnp.concatenate([right, wrong])
  features = network.decode(params, both(z, jnp.roll(z, 1, axis=0 if z.shape[0] > 1 else 1)))
  denoise = consistency.bind(network, params, features)

  def estimate(level_and_share):
    sigma, share = level_and_share
    base = share * both(spec, spec)
    return denoise(base + sigma * both(noise, noise), jnp.full(base.shape[:2], sigma, jnp.float32))

  levels = (consistency.sigma_max, *PROBED)
  estimates = jax.lax.map(estimate, (jnp.float32(levels), jnp.float32([0, *(1 for _ in PROBED)])))
  decoded, swapped = jnp.split(estimates[0], 2)
  target = log_magnitude(spec)
  metrics = {
      'swap': _norm(decoded - swapped) / jnp.maximum(_norm(decoded), 1e-9),
      'energy': _norm(decoded) / _norm(spec),
      'coherence': jnp.mean(coherence(decoded)), 'coherence_source': jnp.mean(coherence(spec)),
      'log_magnitude_l1': jnp.mean(jnp.abs(log_magnitude(decoded) - target)),
      'log_magnitude_l1_swapped': jnp.mean(jnp.abs(log_magnitude(swapped) - target)),
      **latent_metrics(pre, z)}
  for sigma, estimate_there in zip(PROBED, estimates[1:]):
    for name, half in zip(('', '_swapped'), jnp.split(estimate_there, 2)):
      metrics[f'snr_{sigma}{name}'] = 20 * jnp.log10(_norm(spec) / jnp.maximum(_norm(half - spec), 1e-9))
  return jax.tree.map(jnp.float32, metrics)


def latent_metrics(pre: Float[Array, 'B S L Z'], z: Float[Array, 'B S L Z']) -> dict[str, Float[Array, '']]:
  """Health of the latents: the known failure is a common mode that saturates the tanh.

  rank: in how many directions beyond the first the chunks differ, of as many as 33 chunks (or all, if they are fewer)
  can have: the participation ratio of their covariance, (sum of eigenvalues)^2 / sum of squares, less 1, over that. 0
  when they differ in one direction alone, 1 when so few chunks differ in all alike; large batches may pass 1.
  """
  flat = z.reshape(-1, z.shape[-2] * z.shape[-1])
  spread = jnp.std(flat, axis=0)
  centred = flat - jnp.mean(flat, axis=0, keepdims=True)
  scatter = centred.T @ centred  # over a sharded batch this is a sum, as all else
  rank = jnp.square(jnp.trace(scatter)) / jnp.maximum(jnp.sum(jnp.square(scatter)), 1e-12)
  most = max(2, min(flat.shape[0] - 1, flat.shape[1], 32))
  return {'latent/rank': jnp.maximum(rank - 1, 0.0) / (most - 1), 'latent/mean': jnp.mean(z), 'latent/std': jnp.std(z),
          'latent/pre_rms': jnp.sqrt(jnp.mean(jnp.square(pre))), 'latent/spread': jnp.mean(spread),
          'latent/saturated': jnp.mean((jnp.abs(z) > SATURATED).astype(jnp.float32)),
          'latent/common': jnp.sqrt(jnp.mean(jnp.square(jnp.mean(flat, axis=0))))}


def feature_metrics(features: dict) -> dict[str, Float[Array, '']]:
  """RMS of the cross-connection features, and how much of it differs from chunk to chunk."""
  if 'maps' not in features:
    return {}
  sizes, varieties = [], []
  for m in features['maps']:
    m = m.astype(jnp.float32)
    sizes.append(jnp.sqrt(jnp.mean(jnp.square(m))))
    varieties.append(jnp.sqrt(jnp.mean(jnp.var(m, axis=(0, 1)))))
  rms, varying = jnp.stack(sizes), jnp.stack(varieties)
  return {'feature/rms': jnp.max(rms), 'feature/varying': jnp.mean(varying / jnp.maximum(rms, 1e-9))}


def _norm(x):
  return jnp.sqrt(jnp.sum(jnp.square(x)))
