"""One update, as pure functions of (state, batch): loss, gradients, optimizer, moving average, measurements.

The functions are built for one config by `make_step_functions` and jitted by the caller. Randomness is
fold_in(seed, step, item): it depends neither on the number of devices nor on gradient accumulation.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import optax

from m2l2.consistency import Consistency
from m2l2.model.autoencoder import Network
from m2l2.representation import Arrays, Representation
from m2l2.training.examine import examine
from m2l2.training.optim import ema_decay, ema_update
from m2l2.training.probe import feature_metrics, latent_metrics, probe
from m2l2.training.ravel import Apart, Ravel
from m2l2.training.reduction import reduced

SIGMA_BANDS = (0.05, 0.5, 5.0)  # borders of the bands that the loss is reported in
MAIN = 'consistency'            # the phase of training that the paper has


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a run carries from step to step.

  Attributes:
    step: int32[], updates tried (also the skipped ones).
    params, ema: dicts of dicts of float32 arrays.
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
  ravel(state) -> the state as the step takes it, unravel(state) -> as checkpoints and snapshots have it (of any part
    of it, such as state.ema; to be called outside jit): the same, or parameters, average, moments as one vector each
  train_step(ravelled state, batch, phase=MAIN) -> (ravelled state, metrics); batch['audio'] is float32
    [B, C, N], N = crop_samples
  probe_step(ravelled params, batch, key) -> metrics of one-step decoding from sigma_max
  phases: ((name, the step it ends at), ...), in order; `phase(step)` says which one the next update belongs to. (Each
    is a program of its own: as one with a lax.cond inside, XLA's CPU backend runs the branch on one thread, three
    times slower.)
  examine_step(ravelled state, batch, phase=MAIN) -> what of this update is not finite, item by item: examine.py
  """
  init: Callable
  train_step: Callable
  probe_step: Callable
  examine_step: Callable
  logical_axes: dict
  network: Network
  crop_samples: int
  channels: int
  sample_rate: int
  native_rates: tuple
  phases: tuple
  ravel: Callable = lambda state: state
  unravel: Callable = lambda state: state

  def phase(self, step: int) -> str:
    """Of the update that comes after `step` updates; the last one for good."""
    return next((name for name, end in self.phases if step < end), self.phases[-1][0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
  """What a step draws for its crops: unit noise, noise levels, keys for what a bottleneck drops."""
  spec: Float[Arrays, 'B S F T 2*C']
  noise: Float[Array, 'B S F T 2*C']
  high: Float[Array, 'B S']
  low: Float[Array, 'B S']
  keys: Key[Array, ' B']


@dataclasses.dataclass(frozen=True)
class Objective:
  """What training minimises: the consistency loss of whole crops, as a pure function of (params, audio, keys).

  Attributes:
    network, representation, consistency: the parts.
    steps: of the whole run, over which the index step shrinks.
  """
  network: Network
  representation: Representation
  consistency: Consistency
  steps: int

  @property
  def phases(self) -> tuple:
    return ((MAIN, self.steps),)

  def loss_fn(self, params, audio: Float[Array, 'B C N'], keys: Key[Array, ' B'], step, *, phase: str = MAIN,
              watch: Callable = lambda **seen: None) -> tuple[Float[Array, ''], dict]:
    """Student and teacher at two neighbouring noise levels, from one set of features: (scalar, metrics).

    Args:
      params: dict of dicts of float32 arrays.
      audio: of N samples, `chunks` chunks.
      keys: an item's randomness: levels, noise, what a bottleneck drops.
      step: int32[], which tells the index step.
      phase: one of `phases`.
      watch: is told the arrays [B, S, ...] on the way to the loss (or trees of them), as they are computed.
    """
    draw = self.draw(audio, keys, step / max(self.steps, 1), watch)
    # Encoder and decoder run once; the teacher sees their features without passing a gradient back.
    pre, z = self.encode(params, draw)
    features = self.network.decode(params, z)
    watch(latents_before_bottleneck=pre, latents=z, features=features)
    loss, metrics = self.consistency_loss(params, draw, features, watch)
    return loss, {**latent_metrics(pre, z), **feature_metrics(features), **metrics}

  def draw(self, audio: Float[Array, 'B C N'], keys: Key[Array, ' B'], progress, watch) -> Draw:
    """Of crops, at a fraction of training."""
    chunks, consistency = self.network.arch.chunks, self.consistency
    with jax.named_scope('analyse'):
      spec = self.representation.analyse(audio)
    level_keys, noise_keys, drop_keys = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)
    high, low = jax.vmap(lambda k: consistency.sample_levels(k, chunks=chunks, progress=progress))(level_keys)
    noise = jax.vmap(lambda k: consistency.unit_noise(k, self.representation, chunks))(noise_keys)
    watch(spectrogram=spec, sigma_high=high, sigma_low=low)
    return Draw(spec, noise, high, low, drop_keys)

  def encode(self, params, draw: Draw) -> tuple[Float[Array, 'B S L Z'], Float[Array, 'B S L Z']]:
    """-> what enters the bottleneck and what leaves it."""
    pre = self.network.encode(params, draw.spec)
    return pre, self.network.arch.make_bottleneck()(pre, keys=draw.keys)

  def consistency_loss(self, params, draw: Draw, features, watch) -> tuple[Float[Array, ''], dict]:
    """-> (loss, metrics)."""
    with jax.named_scope('student'):
      student = self.denoise(params, draw, draw.high, features)
    with jax.named_scope('teacher'):
      teacher = self.denoise(*jax.lax.stop_gradient((params, draw, draw.low, features)))
    watch(student=student, teacher=teacher)
    per_chunk = self.consistency.loss(student, teacher, high=draw.high, low=draw.low)
    loss = jnp.mean(per_chunk)
    return loss, {'loss/consistency': loss, **_loss_bands(per_chunk, draw.high)}

  def denoise(self, params, draw: Draw, sigma: Float[Array, 'B S'], features) -> Float[Array, 'B S F T D']:
    """The consistency function of the crops with noise at levels sigma."""
    noisy = draw.spec + sigma[:, :, None, None, None] * draw.noise
    return self.consistency.bind(self.network, params, features)(noisy, sigma)


def make_step_functions(objective: Objective, *, optimizer: optax.GradientTransformation, schedule: Callable,
                        ema_max: float, seed: int, accumulate: int, native_rates, ravel: bool = False,
                        reduction: str = 'activations') -> StepFunctions:
  """Binds an objective and an optimizer to what the loop calls.

  `accumulate` microbatches make one update. `ravel` is for a state on one device, see ravel.py; `reduction` of its
  gradients, see reduction.py.
  """
  network, representation = objective.network, objective.representation
  stored = Ravel(jax.eval_shape(network.init, jax.random.key(0))) if ravel else Apart()

  def init(key):
    return new_state(network.init(key), optimizer)

  def train_step(state, batch, *, phase=MAIN):
    return update(functools.partial(objective.loss_fn, phase=phase), state, batch['audio'], optimizer=optimizer,
                  schedule=schedule, ema_max=ema_max, seed=seed, accumulate=accumulate, stored=stored,
                  reduction=reduction)

  def probe_step(params, batch, key):
    return probe(stored.tree(params), batch['audio'], key, network=network, representation=representation,
                 consistency=objective.consistency)

  def examine_step(state, batch, *, phase=MAIN):
    audio = batch['audio']
    return examine(functools.partial(objective.loss_fn, phase=phase), stored.tree(state.params), audio,
                   item_keys(seed, state.step, audio), state.step)

  return StepFunctions(
      init=init, ravel=stored.ravel, unravel=stored.unravel, train_step=train_step, probe_step=probe_step,
      examine_step=examine_step,
      logical_axes=network.logical_axes, network=network,
      crop_samples=representation.crop_samples(network.arch.chunks), channels=representation.channels,
      sample_rate=native_rates[0], native_rates=tuple(native_rates), phases=objective.phases)


def new_state(params, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first update."""
  return TrainState(step=jnp.int32(0), params=params, ema=jax.tree.map(jnp.copy, params),
                    opt_state=optimizer.init(params), skipped=jnp.int32(0), skipped_in_a_row=jnp.int32(0))


def item_keys(seed: int, step, rows) -> Key[Array, ' B']:
  """The keys of a step's items: rows, a tree of arrays [B, ...]."""
  step_key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(lambda item: jax.random.fold_in(step_key, item))(jnp.arange(len(jax.tree.leaves(rows)[0])))


def update(loss_fn: Callable, state: TrainState, rows, *, optimizer: optax.GradientTransformation, schedule: Callable,
           ema_max: float, seed: int, accumulate: int = 1, stored=None, reduction: str = 'activations'
           ) -> tuple[TrainState, dict]:
  """One update of any model: (ravelled state, rows) -> (ravelled state, metrics float32).

  Args:
    loss_fn: (params, rows, keys [B], step) -> (loss, metrics); keys are an item's randomness.
    rows: tree of arrays [B, ...], what loss_fn takes. stored: how the state is ravelled; None: not at all.
    accumulate, reduction: see `gradients` and reduction.py.
  """
  stored = stored or Apart()
  of_rows = reduced(functools.partial(gradients, loss_fn, accumulate=accumulate), reduction)
  grads, metrics = of_rows(stored.tree(state.params), rows, item_keys(seed, state.step, rows), state.step)
  grads = stored.vector(grads)
  grad_norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  decay = ema_decay(state.step, decay=ema_max)
  rate = schedule(state.step - state.skipped)  # the optimizer counts no update that was skipped
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
      'norm/updates': optax.tree.norm(updates), 'learning_rate': rate, 'ema_decay': decay,
      'skipped': state.skipped, 'skipped_in_a_row': state.skipped_in_a_row}
  return state, jax.tree.map(jnp.float32, metrics)


def gradients(loss_fn: Callable, params, rows, keys: Key[Array, ' B'], step, *, accumulate: int) -> tuple[Any, dict]:
  """-> (gradients, metrics and the 'loss') of loss_fn(params, rows, keys, step) -> (loss, metrics), in `accumulate`
  microbatches one after the other; rows: as of `update`."""
  grad = jax.value_and_grad(loss_fn, has_aux=True)
  if accumulate == 1:
    (loss, metrics), grads = grad(params, rows, keys, step)
    return grads, {'loss': loss, **metrics}

  def add(total, micro):
    (loss, metrics), grads = grad(params, *micro, step)
    return jax.tree.map(jnp.add, total, grads), {'loss': loss, **metrics}

  # Strided, so that with a sharded batch every device works on every microbatch.
  micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), (rows, keys))
  grads, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), micro)
  grads = jax.tree.map(lambda g: g / accumulate, grads)
  # A microbatch may hold no draw of a sigma band; any other nan must stay one.
  return grads, {name: (jnp.nanmean if name.startswith('loss/sigma') else jnp.mean)(values, axis=0)
                 for name, values in metrics.items()}


def _loss_bands(per_chunk, sigma):
  """Mean loss by band of the upper noise level; nan where the batch holds none."""
  metrics = {}
  for low, high in zip((0.0, *SIGMA_BANDS), (*SIGMA_BANDS, float('inf'))):
    inside = (sigma >= low) & (sigma < high)
    metrics[f'loss/sigma_{low:g}_{high:g}'] = (
        jnp.sum(jnp.where(inside, per_chunk, 0.0)) / jnp.sum(inside.astype(jnp.float32)))
  return metrics
