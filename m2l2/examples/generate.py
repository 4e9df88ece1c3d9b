"""New music from latents: flow matching over windows of chunks, small enough for a CPU, and the same file on a pod.

  m2l2 encode-dataset --source=data/music/train --checkpoint=tiny --output=latents
  python -m m2l2.examples train latents --workdir=runs/generate
  python -m m2l2.examples sample new.wav --workdir=runs/generate --checkpoint=tiny --seconds=10
  python -m m2l2.examples sample more.wav --workdir=runs/generate --checkpoint=tiny --prefix=song.mp3

A window of latents x in unit scale and noise e are joined by the straight lines x_t = t x + (1 - t) e; a transformer
learns where each line ends (Lipman et al., 2023), and sampling walks from t = 0 to 1 along what it says. In training
some chunks of a window are given as they are: none, the first few, or those around a gap. So one network samples from
nothing, continues what it is given, and fills gaps. It is told the class of the piece, the folder of the corpus that it
lies in, and is sometimes not told.

In a quarter of an hour of CPU time it learns music that is nearer to its corpus than the corpus's own chunks in random
order are (launch/research/learning.md).

Letters as everywhere; W chunks of a window, N = K d numbers of a chunk, a token each.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import itertools
import os
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from m2l2 import compiling, sharding
from m2l2.codec.codec import Codec
from m2l2.codec.latents import Latents
from m2l2.codec.snapshot import load_snapshot, save_snapshot
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.model.denoiser import NoiseEmbedding, noise_features
from m2l2.model.layers import LayerNorm, Linear
from m2l2.model.parameters import ZEROS, draw_all, normal, param, traced
from m2l2.model.transformer import Transformer

MOST_LOOKED_AT = 2000  # records of a corpus that tell its scale and its classes
UNTOLD = 0.1           # chance that the class is not told
NONE_GIVEN, FIRST_GIVEN = 0.4, 0.8  # chances, summed: nothing is given; the first chunks; else all but a gap
EDGE = 1e-3            # how near to 0 and 1 a time comes
NEAREST = 0.1          # of 1 - t, beyond which the loss weighs no more
TEMPERATURE = 0.6      # of samples; chosen on the training corpus, see launch/research/learning.md


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Sizes of the network and how it is trained; the defaults are a quarter of an hour of CPU time for `tiny`'s latents.

  Attributes:
    window: chunks. dim, layers, heads, mlp_mult, cond_dim: of the transformer.
    time_mean, time_std: of the logit of t in training (Esser et al., 2024).
    preset, fsdp: how parameters lie on a mesh of many devices (m2l2/sharding.py).
  """
  window: int = 8
  dim: int = 512
  layers: int = 4
  heads: int = 8
  mlp_mult: int = 2
  cond_dim: int = 128
  steps: int = 1500
  batch_size: int = 32
  learning_rate: float = 1e-3
  warmup_steps: int = 100
  ema_decay: float = 0.995
  time_mean: float = -0.4
  time_std: float = 1.0
  preset: str = 'hsdp'
  fsdp: int = 1
  log_every: int = 50
  checkpoint_every: int = 500
  seed: int = 0


# ---- the network ---------------------------------------------------------------------------------


class LatentFlow(nnx.Module):
  """A noisy window, which of its chunks are given, the time and the class -> the clean one, [B, W, N]."""

  def __init__(self, recipe: Recipe, *, numbers: int, classes: int, rngs):
    width = recipe.cond_dim
    self.tokens = Linear(numbers + 1, recipe.dim, axes=('latent', 'embed'), rngs=rngs)
    self.time = NoiseEmbedding(width, rngs=rngs)
    self.classes = param(rngs, (classes + 1, width), (None, 'cond'), normal(1.0))  # the last: it is not told
    self.transformer = Transformer(
        recipe.dim, layers=recipe.layers, heads=recipe.heads, mlp_mult=recipe.mlp_mult, tokens=recipe.window,
        cond_dim=width, output_norm=False, remat='none', rngs=rngs)
    self.norm = LayerNorm(recipe.dim, cond_dim=width, rngs=rngs)
    self.out = Linear(recipe.dim, numbers, axes=('embed', 'latent'), init=ZEROS, rngs=rngs)

  def __call__(self, x, given, t, label):
    """x [B, W, N] float32 of unit scale; given [B, W] bool; t [B]; label [B] int32."""
    cond = self.time(noise_features((1 - t) / t, width=self.classes.shape[1])) + self.classes[...][label]
    tokens = self.tokens(jnp.concatenate([x, given[..., None].astype(x.dtype)], axis=-1))
    y = self.transformer(tokens[:, None], cond[:, None])
    return self.out(self.norm(y, cond[:, None])[:, 0])


@dataclasses.dataclass(frozen=True)
class Flow:
  """The network as pure functions of its parameters, nested dicts of float32 arrays.

  numbers: N. classes: their names, in the order of labels; label len(classes): it is not told.
  """
  recipe: Recipe
  numbers: int
  classes: tuple[str, ...]

  @functools.cached_property
  def traced(self):
    return traced(lambda: LatentFlow(
        self.recipe, numbers=self.numbers, classes=len(self.classes), rngs=nnx.Rngs(params=jax.random.key(0))))

  def init(self, key):
    _, shapes, inits, _ = self.traced
    return draw_all(key, shapes, inits)

  def estimate(self, params, x, given, t, label):
    """Where the line through x_t [B, W, N] ends; its given chunks are clean. The network says it by itself, without x_t
    beside it: what its width cannot carry is then noise, not what noise leaves (Li and He, 2025)."""
    r = jnp.hypot(t, 1 - t)[:, None, None]
    network = nnx.merge(self.traced[0], params)
    return network(jnp.where(given[..., None], x, x / r), given, t, label)

  def loss_fn(self, params, batch, keys, step):
    """Mean square error of the line's direction over the chunks that are not given: (scalar, metrics).

    batch: {'z': float32 [B, W, N] in unit scale, 'label': int32 [B]}. keys [B]: an item's randomness.
    """
    clean, label = batch['z'], batch['label']
    t, noise, given, untold = jax.vmap(functools.partial(self.draw, shape=clean.shape[1:]))(keys)
    at = t[:, None, None]
    x = jnp.where(given[..., None], clean, at * clean + (1 - at) * noise)
    estimate = self.estimate(params, x, given, t, jnp.where(untold, len(self.classes), label))
    error = jnp.mean(jnp.square(estimate - clean), axis=-1) * ~given
    weighted = error / jnp.square(jnp.maximum(1 - t, NEAREST))[:, None]
    return jnp.sum(weighted) / jnp.sum(~given), {'error': jnp.sum(error) / jnp.sum(~given)}

  def draw(self, key, *, shape):
    """What is random of an item of [W, N]: (t, noise [W, N], given [W], whether the class is untold)."""
    recipe, place = self.recipe, jnp.arange(shape[0])
    keys = jax.random.split(key, 6)
    t = jax.nn.sigmoid(recipe.time_mean + recipe.time_std * jax.random.normal(keys[0]))
    kind = jax.random.uniform(keys[1])
    start = jax.random.randint(keys[2], (), 1, shape[0])
    length = jax.random.randint(keys[3], (), 1, shape[0] // 2 + 1)
    given = (place < start) & (kind >= NONE_GIVEN) | (place >= start + length) & (kind >= FIRST_GIVEN)
    return (jnp.clip(t, EDGE, 1 - EDGE), jax.random.normal(keys[4], shape), given,
            jax.random.bernoulli(keys[5], UNTOLD))

  def sample(self, params, key, known, given, label, guidance, temperature=1.0, *, steps: int):
    """A window: from noise to x by Euler's method, whose given chunks are those of `known`.

    Args:
      known: [B, W, N] in unit scale; given: [B, W] bool. label: [B] int32.
      guidance: how far beyond what the class adds (Ho and Salimans, 2022); 1: no further.
      temperature: deviation of the noise; below 1 for what is more likely, with less variety.
    """
    shown, untold = given[..., None], jnp.full_like(label, len(self.classes))

    def walk(i, x):
      t = jnp.full(len(label), jnp.maximum(i / steps, EDGE), jnp.float32)
      end = self.estimate(params, x, given, t, label)

      def further():
        plain = self.estimate(params, x, given, t, untold)
        return plain + guidance * (end - plain)

      end = jax.lax.cond(guidance == 1, lambda: end, further)
      return jnp.where(shown, known, x + (end - x) / (steps - i))  # (end - x) / (1 - t), for a time of 1 / steps

    noise = temperature * jax.random.normal(key, known.shape)
    return jax.lax.fori_loop(0, steps, walk, jnp.where(shown, known, noise))


# ---- the corpus ----------------------------------------------------------------------------------


def class_of(name: str) -> str:
  """The folder of the corpus that a record's source lies in; '' at the top."""
  return name.partition('/')[0] if '/' in name else ''


def facts_of(directory) -> dict:
  """What training has to know of a corpus of latents, from at most MOST_LOOKED_AT of its records, evenly spaced.

  Returns {'classes': their sorted names, () where there are fewer than two; 'mean', 'std': float32 [K, d]; 'model':
  fingerprint}. Raises UserError: no latents there, or tokens.
  """
  from m2l2.data.latents import latent_source
  source = latent_source(directory)
  total, square, count, classes = 0.0, 0.0, 0, set()
  for number in range(0, len(source), -(-len(source) // MOST_LOOKED_AT)):
    row = source[number]
    if row['z'].ndim != 4:
      raise UserError(f'{audio_io.shown(directory)}: holds tokens, and flow matching needs continuous latents')
    z = row['z'].astype(np.float64)
    total, square = total + z.sum(axis=(0, 1)), square + np.square(z).sum(axis=(0, 1))
    count += z.shape[0] * z.shape[1]
    classes.add(class_of(row['source']))
  mean = total / count
  std = np.sqrt(np.maximum(square / count - np.square(mean), 1e-8))
  return {'classes': tuple(sorted(classes)) if len(classes) > 1 else (), 'mean': np.float32(mean),
          'std': np.float32(std), 'model': source.model}


def batches(directory, recipe: Recipe, facts: dict, *, first: int, own, of: int) -> Iterator[dict]:
  """This process's rows of each step's batch from step `first` on; what they are depends on (seed, step) alone.

  own, of: `sharding.batch_blocks`.
  """
  import grain

  from m2l2.data.latents import latent_source
  source = latent_source(directory, window=recipe.window, hop=1)
  rows = grain.MapDataset.source(source).seed(recipe.seed).shuffle().repeat()
  labels, size = {name: i for i, name in enumerate(facts['classes'])}, recipe.batch_size // of
  for step in itertools.count(first):
    numbers = [step * recipe.batch_size + block * size + i for block in own for i in range(size)]
    read = [rows[number] for number in numbers]
    z = np.stack([(row['z'] - facts['mean']) / facts['std'] for row in read])
    yield {'z': z.reshape(*z.shape[:2], -1),
           'label': np.array([labels.get(class_of(row['source']), len(labels)) for row in read], np.int32)}


# ---- training ------------------------------------------------------------------------------------


def train(directory, workdir, recipe: Recipe) -> int:
  """Trains to recipe.steps, or until it is told to stop; the same call goes on. Returns the steps done.

  Args:
    directory: what `m2l2 encode-dataset` wrote. workdir: gets metrics.jsonl, checkpoints/ and snapshot/.

  Raises UserError: no latents there, sizes that do not go together, or a workdir of another model.
  """
  from m2l2.data.pipeline import Ahead
  from m2l2.training import checkpoint, hosts, metrics, optim, preflight, programs, ravel, train_step
  mesh = sharding.make_mesh(fsdp=recipe.fsdp)
  check(recipe, shards=sharding.batch_shards(mesh))
  workdir, main = preflight.local(workdir), jax.process_index() == 0
  compiling.use_cache(workdir)
  facts = facts_of(directory)
  flow = Flow(recipe, facts['mean'].size, facts['classes'])
  optimizer, schedule = optim.make_optimizer(
      name='adam', learning_rate=recipe.learning_rate, warmup_steps=recipe.warmup_steps, total_steps=recipe.steps,
      final_learning_rate=recipe.learning_rate / 100, b1=0.9, b2=0.99, clip_norm=1.0)
  stored = ravel.Ravel(flow.traced[1]) if sharding.is_one_cpu(mesh) else ravel.Apart()
  step_of = functools.partial(train_step.update, flow.loss_fn, optimizer=optimizer, schedule=schedule,
                              ema_max=recipe.ema_decay, seed=recipe.seed, stored=stored)
  functions = types.SimpleNamespace(train_step=step_of, logical_axes=flow.traced[3])
  init = lambda: train_step.new_state(flow.init(jax.random.key(recipe.seed)), optimizer)
  config = {'recipe': dataclasses.asdict(recipe), 'classes': list(facts['classes']), 'codec': facts['model'],
            'shape': list(facts['mean'].shape)}

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    abstract, _ = programs.abstract_state(functions, init, mesh, preset=recipe.preset)
    preflight.make_workdir(workdir)
    if main:
      stack.enter_context(preflight.locked(workdir))
    checkpoints = stack.enter_context(checkpoint.Checkpoints(os.path.join(workdir, 'checkpoints'), keep_last=1))
    restored = checkpoints.restore(abstract, config=config)
    first = restored.step if restored else 0
    state = restored.state if restored else jax.jit(
        init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
    del restored
    state = stored.ravel(state)
    own, of = sharding.batch_blocks(mesh)
    rows = Ahead(batches(directory, recipe, facts, first=first, own=own, of=of),
                 lambda batch: sharding.put_batch(batch, mesh), ahead=2)
    stack.callback(rows.close)
    log = metrics.make_writers(workdir, resume_step=first, total_steps=recipe.steps) if main else metrics.Writers()
    stack.callback(log.close)
    stop = stack.enter_context(checkpoint.StopSignal(checkpoints))
    batch = next(rows)
    program = programs.lower_step(functions, state, batch, mesh).compile()
    hosts.meet('compiled')
    step = first
    while True:
      stopping = step < recipe.steps and stop.reached(step)
      if step > first and (step % recipe.checkpoint_every == 0 or step == recipe.steps or stopping):
        checkpoints.save(step, stored.unravel(state), config=config, position={'step': step})
        averaged = sharding.fetch(stored.unravel(state.ema), here=main)
        if main:
          save_snapshot(os.path.join(workdir, 'snapshot'), config=config, step=step,
                        params={'network': averaged, 'mean': facts['mean'], 'std': facts['std']})
      if stopping or step >= recipe.steps:
        return step
      state, values = program(state, batch)
      step += 1
      if step in (1, recipe.steps) or step % recipe.log_every == 0:
        scalars = jax.device_get(values)
        log.write(step, scalars)
        metrics.check_skipped(step, scalars, limit=10)
      if step < recipe.steps:
        batch = next(rows)


def check(recipe: Recipe, *, shards: int):
  """Raises UserError for a recipe that cannot work on a mesh that splits a batch into `shards`."""
  if recipe.window < 2 or recipe.steps < 1 or min(recipe.dim, recipe.layers, recipe.heads, recipe.log_every) < 1:
    raise UserError('--window must be 2 chunks or more, and all other sizes 1 or more')
  if recipe.dim % recipe.heads:
    raise UserError(f'--heads={recipe.heads} must divide --dim={recipe.dim}')
  if recipe.batch_size < 1 or recipe.batch_size % shards:
    raise UserError(f'--batch-size={recipe.batch_size} must be a multiple of {shards}, the parts a batch is split into')


# ---- sampling ------------------------------------------------------------------------------------


class Generator:
  """A trained model with the scale of its latents; latents here are as `codec.encode` gives them, in [-1, 1].

  Attributes:
    flow, params: the network. classes: names that `label` may have. codec: fingerprint of the codec it is for.
  """

  def __init__(self, config: dict, params: dict):
    self.flow = Flow(Recipe(**config['recipe']), int(np.prod(config['shape'])), tuple(config['classes']))
    self.classes, self.codec, self.shape = self.flow.classes, config['codec'], tuple(config['shape'])
    self.params, self._mean, self._std = jax.device_put(params['network']), params['mean'], params['std']
    self._sample = jax.jit(self.flow.sample, static_argnames='steps')

  def sample(self, chunks: int, *, count: int = 1, seed: int = 0, prefix=None, label: str | None = None,
             steps: int = 50, guidance: float = 1.0, temperature: float = TEMPERATURE) -> np.ndarray:
    """`count` pieces of `chunks` chunks, float32 [count, chunks, K, d].

    Args:
      prefix: float [count, some chunks, K, d] (or [chunks, K, d], for all) that is gone on with; it is not returned.
      label: a class; None: whatever class. steps, guidance, temperature: see `Flow.sample`.

    Raises UserError: no such class, or a prefix of another shape.
    """
    parts, have = [], 0
    for block in self._blocks(count, seed, prefix, label, steps, guidance, temperature):
      parts.append(block)
      have += block.shape[1]
      if have >= chunks:
        return np.concatenate(parts, axis=1)[:, :chunks]
    raise AssertionError('blocks never end')

  def stream(self, *, seed: int = 0, prefix=None, label: str | None = None, steps: int = 50,
             guidance: float = 1.0, temperature: float = TEMPERATURE) -> Iterator[np.ndarray]:
    """Chunks [K, d] without end, for `codec.stream`; the same as `sample`'s with count=1."""
    for block in self._blocks(1, seed, prefix, label, steps, guidance, temperature):
      yield from block[0]

  def fill(self, z, start: int, stop: int, *, seed: int = 0, label: str | None = None, steps: int = 50,
           guidance: float = 1.0, temperature: float = TEMPERATURE) -> np.ndarray:
    """z [chunks, K, d] with its chunks start ... stop - 1 made anew, to go with those on both sides.

    Raises UserError: no such chunks, or more than a window less two, or fewer chunks than a window.
    """
    window = self.flow.recipe.window
    if not 0 <= start < stop <= len(z) or stop - start > window - 2 or len(z) < window:
      raise UserError(f'chunks {start} to {stop} of {len(z)} cannot be filled: a window has {window} chunks, of which '
                      'two at least must be given')
    first = int(np.clip((start + stop - window) // 2, 0, len(z) - window))
    known = self._to_unit(np.asarray(z)[None, first:first + window])
    place = first + np.arange(window)
    given = ((place < start) | (place >= stop))[None]
    x = self._sample(self.params, jax.random.key(seed), known, given, self._label(label, 1), guidance, temperature,
                     steps=steps)
    filled = np.array(z, np.float32)
    filled[start:stop] = self._from_unit(x)[0, start - first:stop - first]
    return filled

  def _blocks(self, count, seed, prefix, label, steps, guidance, temperature):
    """New chunks [count, some, K, d], each window beginning with the end of the one before."""
    window, labels = self.flow.recipe.window, self._label(label, count)
    prefix = np.zeros((count, 0, *self.shape), np.float32) if prefix is None else np.asarray(prefix, np.float32)
    if prefix.shape[-2:] != self.shape or prefix.ndim not in (3, 4):
      raise UserError(f'a prefix must be [{count}, chunks, {self.shape[0]}, {self.shape[1]}], not {list(prefix.shape)}')
    known = self._to_unit(np.broadcast_to(prefix, (count, *prefix.shape[-3:])))
    for number in itertools.count():
      keep = known.shape[1] if known.shape[1] < window else window // 2
      filled = np.zeros((count, window, self.flow.numbers), np.float32)
      filled[:, :keep] = known[:, known.shape[1] - keep:]
      given = np.broadcast_to(np.arange(window) < keep, (count, window))
      known = np.asarray(self._sample(self.params, jax.random.fold_in(jax.random.key(seed), number), filled, given,
                                      labels, guidance, temperature, steps=steps))
      yield self._from_unit(known[:, keep:])

  def _label(self, label, count):
    if label is not None and label not in self.classes:
      raise UserError(f'there is no class {label!r}, but {", ".join(self.classes) or "none"}')
    return np.full(count, len(self.classes) if label is None else self.classes.index(label), np.int32)

  def _to_unit(self, z):
    z = (z - self._mean) / self._std
    return z.reshape(*z.shape[:2], self.flow.numbers).astype(np.float32)

  def _from_unit(self, x):
    x = np.asarray(x)
    return np.clip(x.reshape(*x.shape[:2], *self.shape) * self._std + self._mean, -1, 1).astype(np.float32)


def load(workdir) -> Generator:
  """Raises UserError: nothing there, or not of `train`."""
  snapshot = load_snapshot(workdir)
  if not {'recipe', 'classes', 'codec', 'shape'} <= set(snapshot.config):
    raise UserError(f'{audio_io.shown(workdir)}: its model makes no latents: train one with '
                    'python -m m2l2.examples train')
  return Generator(snapshot.config, snapshot.params)


def as_latents(codec: Codec, z, *, seconds: float | None = None) -> Latents:
  """Chunks [chunks, K, d] as `Latents` of one channel at the codec's rate, of all their sound or of `seconds` of it.

  Raises UserError: the chunks do not last so long.
  """
  rate = codec.native_rates[0]
  most = codec.most_samples(len(z), rate)
  samples = most if seconds is None else round(seconds * rate)
  if not 0 < samples <= most:
    raise UserError(f'{len(z)} chunks are {most / rate:.2f} s, not {seconds:g} s')
  z = np.asarray(z, np.float32)[None, :codec.layout(samples, rate).chunks]
  return Latents(z=z, sample_rate=rate, num_samples=samples, channels=1, model=codec.fingerprint)
