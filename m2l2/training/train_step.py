"""One update, as pure functions of (state, batch): loss, gradients, optimizer, moving average, measurements.

The functions are built for one config by `make_step_functions` and jitted by the caller. Randomness is
fold_in(seed, step, item): it depends neither on the number of devices nor on gradient accumulation.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import optax

from m2l2.consistency import Consistency
from m2l2.model import envelope
from m2l2.model.autoencoder import Network
from m2l2.representation import Representation, coherence
from m2l2.training.optim import ema_decay, ema_update
from m2l2.training.ravel import Apart, Ravel

SIGMA_BANDS = (0.05, 0.5, 5.0)  # borders of the bands that the loss is reported in
PROBED = (0.2, 1.0)             # noise levels that the probe denoises at
HEAD_STARTS = ('data', 'magnitudes', 'envelope')
SATURATED = 0.99                # |z| above this counts as saturated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a run carries from step to step.

  Attributes:
    step: int32[], updates tried (also the skipped ones).
    params, ema: nested dicts of float32 arrays.
    opt_state: optax's.
    skipped, skipped_in_a_row: int32[], updates left out because the gradient was not finite.
  """
  step: jax.Array
  params: dict
  ema: dict
  opt_state: tuple
  skipped: jax.Array
  skipped_in_a_row: jax.Array


@dataclasses.dataclass(frozen=True)
class StepFunctions:
  """What the loop calls.

  init(key) -> TrainState
  pack(state) -> the state as the step takes it, unpack(state) -> as checkpoints and snapshots have it (of any part of
    it, such as state.ema; to be called outside jit): the same, or, with `ravel`, parameters, average and moments as one
    vector each
  train_step(packed state, batch, head=False) -> (packed state, metrics); batch['audio'] is float32
    [B, C, N], N = crop_samples; the first `head_start` steps are to be called with head=True
  probe_step(packed params, batch, key) -> metrics of one-step decoding from sigma_max
  """
  init: Callable
  train_step: Callable
  probe_step: Callable
  logical_axes: dict
  network: Network
  crop_samples: int
  channels: int
  sample_rate: int
  native_rates: tuple
  head_start: int = 0
  pack: Callable = lambda state: state
  unpack: Callable = lambda state: state


@dataclasses.dataclass(frozen=True)
class Objective:
  """What training minimises: the consistency loss of whole crops, as a pure function of (params, audio, keys).

  Attributes:
    network, representation, consistency: the parts.
    steps: of the whole run, over which the index step shrinks.
    head_start: of those, the first ones, which train on what `head_start_on` says:
      'data': one step from sigma_max is to give the data itself (a regression through all three networks);
      'magnitudes': it is to give the data's log-magnitudes, with whatever phases;
      'envelope': the envelope alone; the denoiser does not even run.
    envelope_weight, envelope_bands: of the envelope's loss, see model/envelope.py.
    nested: chance that a chunk keeps a prefix of its embeddings alone, see `shorten`.
  """
  network: Network
  representation: Representation
  consistency: Consistency
  steps: int
  head_start: int = 0
  head_start_on: str = 'data'
  envelope_weight: float = 0.0
  envelope_bands: int = 0
  nested: float = 0.0

  def loss_fn(self, params, audio, keys, step, *, head: bool = False):
    """Student and teacher at two neighbouring noise levels, from one set of features: (scalar, metrics).

    Args:
      params: nested dict of float32 arrays.
      audio: float32 [B, C, N], N samples of `chunks` chunks.
      keys: [B], an item's randomness: levels, noise, what a bottleneck drops.
      step: int32[], which tells the index step.
      head: the head start's loss instead. (Two programs: as one with a lax.cond inside, XLA's CPU backend runs the
        branch on one thread, three times slower.)
    """
    network, consistency, chunks = self.network, self.consistency, self.network.arch.chunks
    progress = jnp.maximum(step - self.head_start, 0) / max(self.steps - self.head_start, 1)
    with jax.named_scope('analyse'):
      spec = self.representation.analyse(audio)
    level_keys, noise_keys, drop_keys = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)
    high, low = jax.vmap(lambda k: consistency.sample_levels(k, chunks=chunks, progress=progress))(level_keys)
    noise = jax.vmap(lambda k: self.representation.noise(k, chunks, kind=consistency.noise))(noise_keys)

    # Encoder and decoder run once; the teacher sees their features without passing a gradient back.
    pre = network.encode(params, spec)
    z = kept = network.arch.make_bottleneck()(pre, keys=drop_keys)
    if self.nested:
      kept = shorten(z, jax.vmap(lambda k: jax.random.fold_in(k, 0))(drop_keys), chance=self.nested)
    features = network.decode(params, kept)
    data_std = local_deviation(consistency, features)

    metrics = {**latent_metrics(pre, z), **feature_metrics(features)}
    if not head:
      per_chunk = self._consistency_loss(params, spec, noise, high, low, features, data_std)
      loss = jnp.mean(per_chunk)
      metrics |= {'loss/consistency': loss, **_loss_bands(per_chunk, high)}
    elif self.head_start_on != 'envelope':
      top = jnp.full_like(high, consistency.sigma_max)
      loss = metrics['loss/head_start'] = jnp.mean(self._head_loss(params, spec, noise, top, features, data_std))
    else:
      loss = jnp.float32(0)
    if 'log_magnitude' in features:
      error = jnp.mean(envelope.envelope_loss(features['log_magnitude'], spec, bands=self.envelope_bands))
      metrics['loss/envelope'] = error
      loss = loss + self.envelope_weight * error
    return loss, metrics

  def _consistency_loss(self, params, spec, noise, high, low, features, data_std):
    with jax.named_scope('student'):
      student = denoise(self.network, self.consistency, params, spec, noise, high, features, data_std)
    with jax.named_scope('teacher'):
      teacher = denoise(self.network, self.consistency,
                        *jax.lax.stop_gradient((params, spec, noise, low, features, data_std)))
    return self.consistency.loss(student, teacher, high=high, low=low)

  def _head_loss(self, params, spec, noise, top, features, data_std):
    with jax.named_scope('student'):
      estimate = denoise(self.network, self.consistency, params, spec, noise, top, features, data_std)
    if self.head_start_on == 'data':
      return self.consistency.distance(estimate, spec)
    return jnp.mean(jnp.abs(envelope.log_magnitude(estimate) - envelope.log_magnitude(spec)), axis=(2, 3, 4))


def make_step_functions(objective: Objective, *, optimizer: optax.GradientTransformation, schedule: Callable,
                        ema_max: float, seed: int, accumulate: int, native_rates, ravel: bool = False
                        ) -> StepFunctions:
  """Binds an objective and an optimizer to what the loop calls.

  `accumulate` microbatches make one update. `ravel` is for a state on one device, see ravel.py. For the objective's
  first `head_start` steps the loop calls train_step(..., head=True).
  """
  network, representation = objective.network, objective.representation
  stored = Ravel(jax.eval_shape(network.init, jax.random.key(0))) if ravel else Apart()

  def init(key):
    return new_state(network.init(key), optimizer)

  def train_step(state, batch, *, head=False):
    def loss_fn(params, batch, keys, step):
      return objective.loss_fn(params, batch['audio'], keys, step, head=head)
    return update(loss_fn, state, batch, optimizer=optimizer, schedule=schedule, ema_max=ema_max, seed=seed,
                  accumulate=accumulate, stored=stored)

  def probe_step(params, batch, key):
    return probe(stored.tree(params), batch['audio'], key, network=network, representation=representation,
                 consistency=objective.consistency)

  return StepFunctions(
      init=init, pack=stored.pack, unpack=stored.unpack, train_step=train_step, probe_step=probe_step,
      logical_axes=network.logical_axes, network=network,
      crop_samples=representation.crop_samples(network.arch.chunks), channels=representation.channels,
      sample_rate=native_rates[0], native_rates=tuple(native_rates), head_start=objective.head_start)


def new_state(params, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first update."""
  return TrainState(step=jnp.int32(0), params=params, ema=jax.tree.map(jnp.copy, params),
                    opt_state=optimizer.init(params), skipped=jnp.int32(0), skipped_in_a_row=jnp.int32(0))


def update(loss_fn: Callable, state: TrainState, batch, *, optimizer: optax.GradientTransformation, schedule: Callable,
           ema_max: float, seed: int, accumulate: int = 1, stored=None):
  """One update of any model: (packed state, batch) -> (packed state, metrics float32).

  Args:
    loss_fn: (params, batch, keys [B], step) -> (loss, metrics); keys are an item's randomness.
    batch: tree of arrays [B, ...]. stored: how the state is packed, a `Ravel`; None: not at all.
  """
  stored = stored or Apart()
  step_key = jax.random.fold_in(jax.random.key(seed), state.step)
  keys = jax.vmap(lambda item: jax.random.fold_in(step_key, item))(jnp.arange(len(jax.tree.leaves(batch)[0])))
  grads, metrics = gradients(loss_fn, stored.tree(state.params), batch, keys, state.step, accumulate=accumulate)
  grads = stored.vector(grads)
  grad_norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  decay = ema_decay(state.step, decay=ema_max)
  ema = ema_update(state.ema, params, decay)

  finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics['loss'])
  params, ema, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (params, ema, opt_state), (state.params, state.ema, state.opt_state))
  state = TrainState(
      step=state.step + 1, params=params, ema=ema, opt_state=opt_state,
      skipped=state.skipped + jnp.where(finite, 0, 1),
      skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1))
  metrics |= {
      'norm/gradients': grad_norm, 'norm/parameters': optax.tree.norm(params),
      'norm/updates': optax.tree.norm(updates), 'learning_rate': schedule(state.step - 1), 'ema_decay': decay,
      'skipped': state.skipped, 'skipped_in_a_row': state.skipped_in_a_row}
  return state, jax.tree.map(jnp.float32, metrics)


def gradients(loss_fn: Callable, params, batch, keys, step, *, accumulate: int):
  """-> (gradients, metrics and the 'loss') of loss_fn(params, batch, keys [B], step) -> (loss, metrics), in
  `accumulate` microbatches one after the other; batch: tree of arrays [B, ...]."""
  grad = jax.value_and_grad(loss_fn, has_aux=True)
  if accumulate == 1:
    (loss, metrics), grads = grad(params, batch, keys, step)
    return grads, {'loss': loss, **metrics}

  def add(total, micro):
    (loss, metrics), grads = grad(params, *micro, step)
    return jax.tree.map(jnp.add, total, grads), {'loss': loss, **metrics}

  # Strided, so that with a sharded batch every device works on every microbatch.
  micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), (batch, keys))
  grads, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), micro)
  grads = jax.tree.map(lambda g: g / accumulate, grads)
  # A microbatch may hold no draw of a sigma band; any other nan must stay one.
  return grads, {name: (jnp.nanmean if name.startswith('loss/sigma') else jnp.mean)(values, axis=0)
                 for name, values in metrics.items()}


def shorten(z, keys, *, chance: float):
  """With this chance a chunk of latents [B, S, L, Z] keeps but its first 1 to L embeddings (equally likely); the others
  become 0. So trained, any prefix can be decoded, and the first embeddings say what matters most."""
  def keep(key):
    chance_key, length_key = jax.random.split(key)
    length = jax.random.randint(length_key, z.shape[1:2], 1, z.shape[2] + 1)
    return jnp.where(jax.random.bernoulli(chance_key, chance, length.shape), length, z.shape[2])

  kept = jnp.arange(z.shape[2])[None, None] < jax.vmap(keep)(keys)[..., None]
  return jnp.where(kept[..., None], z, 0.0)


def probe(params, audio, key, *, network, representation, consistency):
  """Does decoding use the latents? One step from sigma_max on audio [B, C, N], B >= 2.

  swap: relative change of the output when another item's latents meet the same noise.
  energy: RMS of the output over RMS of the source.
  coherence: of the output, see representation.coherence; coherence_source: what the source has.
  log_magnitude_l1: mean |error| of the output's log-magnitudes; log_magnitude_l1_swapped with the wrong latents.
  snr_{sigma}: SNR in dB of denoising at that level, with the right latents and with the wrong ones.
  """
  spec = representation.analyse(audio)
  pre = network.encode(params, spec)
  z = network.arch.make_bottleneck()(pre)
  noise = jax.vmap(lambda k: representation.noise(k, spec.shape[1], kind=consistency.noise))(
      jax.random.split(key, len(spec)))
  # Right and wrong latents side by side, and the levels in a loop: one program of each network, not two and six.
  both = lambda right, wrong: jnp.concatenate([right, wrong])
  features = network.decode(params, both(z, jnp.roll(z, 1, axis=0 if z.shape[0] > 1 else 1)))
  data_std = local_deviation(consistency, features)

  def estimate(level_and_share):
    sigma, share = level_and_share
    base = share * both(spec, spec)
    level = jnp.full(base.shape[:2], sigma, jnp.float32)
    return denoise(network, consistency, params, base, both(noise, noise), level, features, data_std)

  levels = (consistency.sigma_max, *PROBED)
  estimates = jax.lax.map(estimate, (jnp.float32(levels), jnp.float32([0, *(1 for _ in PROBED)])))
  decoded, swapped = jnp.split(estimates[0], 2)
  target = envelope.log_magnitude(spec)
  metrics = {
      'swap': _norm(decoded - swapped) / jnp.maximum(_norm(decoded), 1e-9),
      'energy': _norm(decoded) / _norm(spec),
      'coherence': jnp.mean(coherence(decoded)), 'coherence_source': jnp.mean(coherence(spec)),
      'log_magnitude_l1': jnp.mean(jnp.abs(envelope.log_magnitude(decoded) - target)),
      'log_magnitude_l1_swapped': jnp.mean(jnp.abs(envelope.log_magnitude(swapped) - target)),
      **latent_metrics(pre, z)}
  for sigma, estimate_there in zip(PROBED, estimates[1:]):
    for name, half in zip(('', '_swapped'), jnp.split(estimate_there, 2)):
      metrics[f'snr_{sigma}{name}'] = 20 * jnp.log10(_norm(spec) / jnp.maximum(_norm(half - spec), 1e-9))
  return jax.tree.map(jnp.float32, metrics)


def local_deviation(consistency: Consistency, features):
  """sigma_data per element from the predicted envelope where consistency.local, else None."""
  if not consistency.local:
    return None
  return jax.lax.stop_gradient(envelope.deviation(features['log_magnitude'], floor=consistency.local_floor))


def latent_metrics(pre, z):
  """Health of the latents [B, S, L, Z]: the known failure is a common mode that saturates the tanh.

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


def feature_metrics(features):
  """RMS of the cross-connection features, and how much of it differs from chunk to chunk."""
  if 'maps' not in features:
    return {}
  rms, varying = [], []
  for m in features['maps']:
    m = m.astype(jnp.float32)
    rms.append(jnp.sqrt(jnp.mean(jnp.square(m))))
    varying.append(jnp.sqrt(jnp.mean(jnp.var(m, axis=(0, 1)))))
  rms, varying = jnp.stack(rms), jnp.stack(varying)
  return {'feature/rms': jnp.max(rms), 'feature/varying': jnp.mean(varying / jnp.maximum(rms, 1e-9))}


def denoise(network, consistency, params, spec, noise, sigma, features, data_std=None):
  """The consistency function of spec + sigma noise: arrays [B, S, F, T, 2C], sigma [B, S], the decoder's features.

  data_std: `local_deviation` of the features, where they have one.
  """
  noisy = spec + sigma[:, :, None, None, None] * noise
  return consistency.denoise(lambda x, s: network.denoise(params, x, s, features), noisy, sigma, sigma_data=data_std)


def _loss_bands(per_chunk, sigma):
  """Mean loss by band of the upper noise level; nan where the batch holds none."""
  metrics = {}
  for low, high in zip((0.0, *SIGMA_BANDS), (*SIGMA_BANDS, float('inf'))):
    inside = (sigma >= low) & (sigma < high)
    metrics[f'loss/sigma_{low:g}_{high:g}'] = (
        jnp.sum(jnp.where(inside, per_chunk, 0.0)) / jnp.sum(inside.astype(jnp.float32)))
  return metrics


def _norm(x):
  return jnp.sqrt(jnp.sum(jnp.square(x)))
