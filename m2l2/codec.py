"""Codec: audio -> Latents -> audio, block by block, so that memory does not grow with the signal.

Encoding is chunk-local. Decoding is two-step autoregressive (paper, figure 2): each network call
refines the chunk before and makes a first estimate of the next. Noise belongs to (seed, chunk,
role), so any way of cutting the work into blocks gives the same sound.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import functools
from importlib import resources
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from m2l2 import build
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.model import envelope
from m2l2.model.bottleneck import FSQ
from m2l2.snapshot import load_snapshot

_MOST_CHANNELS = 64  # more is a transposed array
FIRST, REFINE = 0, 1  # roles of a chunk's noise: its first estimate, its refinement
MODES = ('autoregressive',)
_FORMAT = 'm2l2-latents'
_VERSION = 1
_BLOCK_CHUNKS = 8  # chunks per device call: about 6 s


@dataclasses.dataclass(frozen=True)
class Latents:
  """Summary embeddings of one signal, and what it takes to give it back exactly as long as it was.

  Attributes:
    z: float32 [streams, chunks, K, d] in [-1, 1], the bottleneck's own output; or int32
      [streams, chunks, K] tokens. One stream, or one per channel where a mono model encodes several
      channels.
    sample_rate, num_samples, channels: the source's.
    model: fingerprint of the model that made them.
    version: of the file format.
  """
  z: np.ndarray
  sample_rate: int
  num_samples: int
  channels: int
  model: str
  version: int = _VERSION

  def save(self, path):
    """Writes a safetensors file, the fields as metadata. Raises UserError where it cannot."""
    audio_io.check_writable(path, extensions=None)
    fields = {'sample_rate': self.sample_rate, 'num_samples': self.num_samples,
              'channels': self.channels, 'model': self.model}
    metadata = {'format': _FORMAT, 'version': str(self.version), 'latents': json.dumps(fields)}
    data = safetensors.numpy.save({'z': np.ascontiguousarray(self.z)}, metadata)
    temporary = f'{os.fspath(path)}.{os.getpid()}.part'
    try:
      with open(temporary, 'wb') as file:
        file.write(data)
      os.replace(temporary, path)
    except OSError as error:
      raise UserError(f'{path}: could not be written ({error.strerror})') from error
    finally:
      if os.path.exists(temporary):
        os.unlink(temporary)

  @classmethod
  def load(cls, path) -> 'Latents':
    """Reads what `save` wrote. Raises UserError: missing, not latents, damaged, another version."""
    name = audio_io.shown(path)
    if not os.path.isfile(path):
      raise UserError(f'{name}: there is no such file of latents')
    try:
      with safetensors.safe_open(path, framework='numpy') as file:
        metadata = file.metadata() or {}
        if metadata.get('format') != _FORMAT:
          raise UserError(f'{name}: is a safetensors file, but not of m2l2 latents (make one with '
                          'm2l2 encode)')
        if metadata.get('version') != str(_VERSION):
          raise UserError(f'{name}: holds latents of version {metadata.get("version")}, this m2l2 '
                          f'reads version {_VERSION}: encode the audio again, or update m2l2')
        z = file.get_tensor('z')
        fields = json.loads(metadata['latents'])
      latents = cls(z=z, **fields)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
      if isinstance(error, UserError):
        raise
      reason = ' '.join(str(error).split())
      raise UserError(f'{name}: is not a file of latents, or a damaged one ({reason})') from error
    counts = (latents.sample_rate, latents.num_samples, latents.channels)
    if ((z.dtype, z.ndim) not in ((np.float32, 4), (np.int32, 3)) or not z.size
        or not all(isinstance(count, int) and count > 0 for count in counts)):
      raise UserError(f'{name}: its latents or its metadata make no sense (z is {z.dtype} '
                      f'{list(z.shape)})')
    return latents


def locate(path):
  """A snapshot's or workdir's path as it is; the name of a model in the box -> its path.

  Raises UserError: neither is there.
  """
  if os.path.exists(path):
    return path
  box = resources.files('m2l2') / 'assets' / 'models'
  names = sorted(entry.name for entry in box.iterdir() if entry.is_dir()) if box.is_dir() else []
  if os.fspath(path) not in names:
    raise UserError(f'{audio_io.shown(path)}: no such snapshot or workdir, nor a model in the box '
                    f'({", ".join(names) or "it is empty"})')
  return os.fspath(box / os.fspath(path))


def load(path) -> 'Codec':
  """A Codec from a snapshot, a workdir, or the name of a model in the box.

  Raises UserError: nothing there, or what is there is damaged.
  """
  snapshot = load_snapshot(locate(path))
  return Codec(config=snapshot.config, params=snapshot.params, fingerprint=snapshot.fingerprint)


class Codec:
  """Encodes and decodes with one set of weights.

  Attributes:
    config: the resolved config (nested dict); fingerprint: of the weights.
    network, representation, consistency: the parts built from it.
  """

  def __init__(self, *, config, params, fingerprint: str):
    """params: nested dict of float32 arrays, as in a snapshot.

    Raises UserError: config describes no model, or the weights do not fit it.
    """
    for part in ('model', 'consistency'):
      if not isinstance(config.get(part), Mapping):
        raise UserError(f'the checkpoint\'s config has no "{part}": it is not of an m2l2 model')
    self.config = config
    self.fingerprint = fingerprint
    self.network = build.network(config['model'])
    self.representation = build.representation(config['model'])
    self.consistency = build.consistency(config['consistency'])
    self.native_rates = build.native_rates(config['model'])
    self._bottleneck = self.network.arch.make_bottleneck()
    expected = jax.eval_shape(self.network.init, jax.random.key(0))
    _check_params(params, expected)
    self.params = jax.tree.map(jnp.asarray, params)
    self._encode_block = jax.jit(self._encode_fn)
    self._start = jax.jit(self._start_fn)
    self._advance = jax.jit(self._advance_fn, static_argnames='refine')
    self._finish = jax.jit(self._finish_fn, static_argnames='refine')
    self._noise = jax.jit(self._noise_fn)

  def model_rate(self, sample_rate: int) -> int:
    """The rate that a signal of `sample_rate` is processed at."""
    return sample_rate if sample_rate in self.native_rates else self.native_rates[0]

  # Encoding.

  def check_source(self, *, channels: int, discrete: bool = False):
    """Raises UserError where this model cannot encode `channels` channels, or to tokens."""
    most = self.representation.channels
    if channels > _MOST_CHANNELS:
      raise UserError(f'the audio has {channels} channels: is it [samples, channels]? Give its transpose')
    if channels > most > 1:
      raise UserError(f'the audio has {channels} channels, this model takes at most {most}: mix it '
                      'down first')
    if discrete and not self._discrete:
      raise UserError('this model has no tokens, only continuous latents: encode without discrete')

  @property
  def _discrete(self):
    """Whether the latents have a form as int32 tokens."""
    return (isinstance(self._bottleneck, FSQ)
            and self._bottleneck.levels ** self.network.arch.latent_dim <= 2 ** 31)

  def encode(self, audio, sample_rate: int, *, discrete: bool = False) -> Latents:
    """Audio float32 [channels, samples] or [samples] in [-1, 1] -> Latents.

    A mono model encodes each channel as a stream of its own; a stereo model takes one or two
    channels. Rates that are not native are resampled. discrete: int32 tokens, for a model with an
    FSQ bottleneck.

    Raises UserError: no samples, NaN or infinity, too many channels, or no tokens to be had.
    """
    audio = np.asarray(audio, np.float32)
    audio = audio[None] if audio.ndim == 1 else audio
    if audio.ndim != 2 or not audio.size:
      raise UserError('audio must be [channels, samples] with at least one sample, not of shape '
                      f'{list(audio.shape)}')
    step = _BLOCK_CHUNKS * self.representation.chunk_samples
    blocks = (audio[:, i:i + step] for i in range(0, audio.shape[1], step))
    return self.encode_blocks(
        blocks, sample_rate=sample_rate, channels=audio.shape[0], discrete=discrete)

  def encode_blocks(self, blocks: Iterable, *, sample_rate: int, channels: int,
                    discrete: bool = False) -> Latents:
    """As `encode`, for a signal that comes as blocks [channels, any number of samples]."""
    rep = self.representation
    self.check_source(channels=channels, discrete=discrete)
    resampler = audio_io.StreamResampler(
        from_rate=sample_rate, to_rate=self.model_rate(sample_rate), channels=channels)
    step = _BLOCK_CHUNKS * rep.chunk_samples
    lead = rep.layout(1).lead
    pending = np.zeros((channels, lead), np.float32)
    parts = []
    received = taken = num_samples = 0

    def counted():
      nonlocal num_samples
      for block in blocks:
        num_samples += block.shape[1]
        yield block

    def encode_pending(chunks, valid_frames):
      streams = self._to_streams(pending[:, :chunks * rep.chunk_samples + rep.overlap])
      parts.append(np.asarray(self._encode_block(self.params, streams, valid_frames)))

    for piece in _resampled(counted(), resampler):
      if not np.isfinite(piece).all():
        raise UserError('the audio holds NaN or infinite samples')
      received += piece.shape[1]
      pending = np.concatenate([pending, piece], axis=1)
      # One block is kept back: only the end tells how many of its frames hold signal.
      while pending.shape[1] >= 2 * step + rep.overlap:
        encode_pending(_BLOCK_CHUNKS, _BLOCK_CHUNKS * rep.frames)
        pending, taken = pending[:, step:], taken + _BLOCK_CHUNKS
    if not received:
      raise UserError('the audio holds no samples')
    layout = rep.layout(received)
    while taken < layout.chunks:
      left = layout.chunks - taken
      chunks = min(_BLOCK_CHUNKS, 1 << (left - 1).bit_length())  # few shapes, few compilations
      missing = chunks * rep.chunk_samples + rep.overlap - pending.shape[1]
      pending = np.pad(pending, ((0, 0), (0, max(missing, 0))))
      encode_pending(chunks, min(layout.frames - taken * rep.frames, chunks * rep.frames))
      pending, taken = pending[:, chunks * rep.chunk_samples:], taken + chunks
    z = np.concatenate(parts, axis=1)[:, :layout.chunks]
    if not np.isfinite(z).all():
      raise UserError('encoding gave NaN or infinite latents: the audio goes far beyond [-1, 1], '
                      'or the weights are broken')
    if discrete:
      z = np.asarray(self._bottleneck.tokens(z))
    return Latents(z=z, sample_rate=int(sample_rate), num_samples=num_samples, channels=channels,
                   model=self.fingerprint)

  def _to_streams(self, audio):
    """[channels, N] -> [streams, model channels, N]."""
    if self.representation.channels == 1:
      return audio[:, None]
    return np.broadcast_to(audio, (self.representation.channels, audio.shape[1]))[None]

  def _encode_fn(self, params, audio, valid_frames):
    """audio [streams, C, crop] -> z [streams, S, K, d]; frames past `valid_frames` are silence."""
    spec = self.representation.analyse(audio)
    s, _, t = spec.shape[1:4]
    frame = jnp.arange(s * t).reshape(1, s, 1, t, 1)
    spec = jnp.where(frame < valid_frames, spec, 0.0)
    return self._bottleneck(self.network.encode(params, spec))

  # Decoding.

  def decode(self, latents: Latents, seed: int = 0, *, mode: str = 'autoregressive',
             sigma_cond: float | None = None, refine: bool = True, noise=None) -> np.ndarray:
    """Latents -> audio float32 [channels, samples], exactly the source's channels, samples, rate.

    Args:
      seed: of the noise that decoding starts from, 0 to 2^32 - 1.
      mode: 'autoregressive'.
      sigma_cond: noise put back on the chunk before; the config's by default.
      refine: each chunk is denoised a second time, as the next one's left neighbour, at no cost but
        that of one more call at the end. Without it the first estimates are the output (one step
        from sigma_max).
      noise: for tests, float32 [chunks, 2, F, T, C]: unit noise of each chunk's first estimate and
        refinement.

    Raises UserError: latents of another model or shape, an unknown mode, a bad seed or sigma_cond.
    """
    blocks = self.decode_blocks(latents, seed, mode=mode, sigma_cond=sigma_cond, refine=refine,
                                noise=noise)
    return np.concatenate(list(blocks), axis=1)

  def check_decoding(self, seed: int = 0, *, mode: str = 'autoregressive',
                     sigma_cond: float | None = None):
    """Raises UserError for options that `decode` would refuse: an early look, before long work."""
    process = self.consistency
    if mode not in MODES:
      raise UserError(f'decoding mode {mode!r} is not known: choose from {", ".join(MODES)}')
    if not 0 <= seed < 2 ** 32:
      raise UserError(f'the seed is {seed}; it must lie in 0..{2 ** 32 - 1}')
    if sigma_cond is not None and not process.sigma_min <= sigma_cond <= process.sigma_max:
      raise UserError(f'sigma_cond is {sigma_cond}; it must lie in '
                      f'{process.sigma_min}..{process.sigma_max}')

  def decode_blocks(self, latents: Latents, seed: int = 0, *, mode: str = 'autoregressive',
                    sigma_cond: float | None = None, refine: bool = True,
                    noise=None) -> Iterator[np.ndarray]:
    """As `decode`, in blocks float32 [channels, some samples]. Mistakes raise at the call."""
    self.check_decoding(seed, mode=mode, sigma_cond=sigma_cond)
    sigma_cond = self.consistency.sigma_cond if sigma_cond is None else float(sigma_cond)
    z = self._continuous(latents)
    shape = (z.shape[1], 2, *self._chunk_shape)
    if noise is not None and np.shape(noise) != shape:
      raise UserError(f'noise must have shape {list(shape)}, not {list(np.shape(noise))}')
    rate = self.model_rate(latents.sample_rate)
    layout = self._layout(latents)
    resampler = audio_io.StreamResampler(
        from_rate=rate, to_rate=latents.sample_rate, channels=latents.channels)
    pieces = self._decode_streams(z, seed=seed, sigma_cond=sigma_cond, refine=refine, noise=noise)
    pieces = map(self._from_streams(latents.channels), pieces)
    pieces = _window(pieces, start=layout.lead, length=layout.num_samples)
    pieces = _window(_resampled(pieces, resampler), start=0, length=latents.num_samples)
    return (np.clip(piece, -1.0, 1.0) for piece in pieces)

  def _layout(self, latents):
    """Where the signal behind the latents lies, at the model's rate."""
    return self.representation.layout(audio_io.resampled_length(
        latents.num_samples, from_rate=latents.sample_rate,
        to_rate=self.model_rate(latents.sample_rate)))

  def _continuous(self, latents):
    """The latents as float32 [streams, chunks, K, d], checked against this model."""
    arch = self.network.arch
    if latents.model != self.fingerprint:
      raise UserError(f'these latents are of model {latents.model}, this checkpoint is '
                      f'{self.fingerprint}: decode with the checkpoint that encoded them')
    streams = latents.channels if self.representation.channels == 1 else 1
    shape = (streams, self._layout(latents).chunks, arch.num_latents)
    z = np.asarray(latents.z)
    discrete = np.issubdtype(z.dtype, np.integer)
    if discrete and not self._discrete:
      raise UserError('these latents are tokens, but this model has only continuous ones')
    shape = shape if discrete else (*shape, arch.latent_dim)
    if z.shape != shape or latents.channels > max(streams, self.representation.channels):
      raise UserError(f'latents of shape {list(z.shape)} do not fit: {latents.num_samples} samples '
                      f'of {latents.channels} channels make {list(shape)} with this model')
    if not np.isfinite(z).all():
      raise UserError('the latents hold NaN or infinite numbers')
    if discrete:
      codes = self._bottleneck.levels ** arch.latent_dim
      if z.min() < 0 or z.max() >= codes:
        raise UserError(f'the latents hold tokens beyond 0..{codes - 1}')
      z = np.asarray(self._bottleneck.codes(z, width=arch.latent_dim))
    return z.astype(np.float32)

  def _from_streams(self, channels):
    """[streams, model channels, N] -> [channels, N]; mono stays mono through a stereo model."""
    def merge(audio):
      if self.representation.channels == 1:
        return audio[:, 0]
      return audio[0] if channels > 1 else audio[0].mean(axis=0, keepdims=True)
    return merge

  def _decode_streams(self, z, *, seed, sigma_cond, refine, noise):
    """z [streams, chunks, K, d] -> blocks [streams, C, samples of some chunks], then the tail."""
    chunks = z.shape[1]

    def draw(index):
      """Noise [n, 2, F, T, C] of chunks `index`; those past the end are never used."""
      if noise is None:
        return self._noise(jax.random.key(seed), index)
      return noise[np.minimum(index, chunks - 1)]

    state = self._start(self.params, z[:, 0], draw(np.asarray([0]))[0, FIRST])
    for start in range(1, chunks, _BLOCK_CHUNKS):
      count = min(_BLOCK_CHUNKS, chunks - start)
      block = z[:, start:start + count]
      block = np.pad(block, ((0, 0), (0, _BLOCK_CHUNKS - count), (0, 0), (0, 0)))
      eps = draw(start - 1 + np.arange(_BLOCK_CHUNKS + 1))
      audio, state = self._advance(self.params, state, block, count, eps, sigma_cond, refine=refine)
      audio = np.asarray(audio)[:, :count]  # [streams, n, C, samples of a chunk]
      yield np.moveaxis(audio, 1, 2).reshape(audio.shape[0], audio.shape[2], -1)
    eps = draw(np.asarray([chunks - 1]))[0, REFINE]
    yield np.asarray(self._finish(self.params, state, eps, sigma_cond, refine=refine))

  @property
  def _chunk_shape(self):
    rep = self.representation
    return (rep.bins, rep.frames, rep.spec_channels)

  def _noise_fn(self, key, chunk):
    """chunk int [n] -> unit noise [n, 2, F, T, C]: a function of (seed, chunk, role) alone.

    All streams get the same noise, so that equal channels stay equal.
    """
    def one(chunk, role):
      key_here = jax.random.fold_in(jax.random.fold_in(key, chunk), role)
      return jax.random.normal(key_here, self._chunk_shape)
    return jax.vmap(lambda c: jax.vmap(functools.partial(one, c))(jnp.arange(2)))(chunk)

  def _denoiser(self, params, features):
    """The consistency function bound to features whose leaves are [B, S, ...]."""
    process = self.consistency
    data = None
    if process.local:
      data = envelope.deviation(features['log_magnitude'], floor=process.local_floor)

    def network(x, sigma):
      return self.network.denoise(params, x, sigma, features)
    return lambda x, sigma: process.denoise(network, x, sigma, sigma_data=data)

  def _start_fn(self, params, z, noise):
    """First estimate of chunk 0, a one-chunk call. z [B, K, d], noise [F, T, C] -> state.

    The state of decoding: 'x' the last chunk's first estimate [B, F, T, C], its 'features' (leaves
    [B, 1, ...]: each chunk's are computed once), and the 'tail' of the synthesis [B, C, overlap].
    """
    rep, process = self.representation, self.consistency
    features = self.network.decode(params, z[:, None])
    noise = jnp.broadcast_to(noise, (z.shape[0], 1, *noise.shape))
    x = process.sample(self._denoiser(params, features), (noise,), (process.sigma_max,))
    tail = jnp.zeros((z.shape[0], rep.channels, rep.overlap), jnp.float32)
    return {'x': x[:, 0], 'features': features, 'tail': tail}

  def _advance_fn(self, params, state, z, count, noise, sigma_cond, *, refine):
    """The next `count` <= n chunks: z [B, n, K, d]; noise [n + 1, 2, F, T, C] from one before on.

    -> (audio [B, n, C, chunk_samples] of the chunks before each, of which `count` are filled,
    state).
    """
    rep, process = self.representation, self.consistency
    b, n = z.shape[:2]

    def spread(eps):
      return jnp.broadcast_to(eps, (b, *eps.shape))

    def body(i, carry):
      state, audio = carry
      current = self.network.decode(params, jax.lax.dynamic_slice_in_dim(z, i, 1, axis=1))
      pair = jax.tree.map(lambda *two: jnp.concatenate(two, axis=1), state['features'], current)
      refined, x = process.sample_pair(
          self._denoiser(params, pair), state['x'], left_noise=spread(noise[i, REFINE]),
          right_noise=spread(noise[i + 1, FIRST]), sigma_cond=sigma_cond)
      done = refined if refine else state['x']
      out, tail = rep.synthesise(done[:, None], state['tail'])
      return {'x': x, 'features': current, 'tail': tail}, audio.at[:, i].set(out)

    audio = jnp.zeros((b, n, rep.channels, rep.chunk_samples), jnp.float32)
    state, audio = jax.lax.fori_loop(0, count, body, (state, audio))
    return audio, state

  def _finish_fn(self, params, state, noise, sigma_cond, *, refine):
    """The last chunk, refined by a one-chunk call: exact, as a left chunk never sees its right one.

    -> audio [B, C, chunk_samples + overlap].
    """
    x = state['x'][:, None]
    if refine:
      noisy = self.consistency.add_noise(x, jnp.broadcast_to(noise, x.shape), sigma_cond)
      level = jnp.full(x.shape[:2], sigma_cond, jnp.float32)
      x = self._denoiser(params, state['features'])(noisy, level)
    return jnp.concatenate(self.representation.synthesise(x, state['tail']), axis=-1)


def _resampled(blocks, resampler):
  for block in blocks:
    yield resampler.process(block)
  yield resampler.finish()


def _window(pieces, *, start, length):
  """The samples start .. start + length of a signal in pieces [channels, n].

  With edges 'none' up to hop - 1 samples lie past the last frame: they come back as zeros.
  """
  position, end = 0, start + length
  for piece in pieces:
    low, high = max(start - position, 0), min(end - position, piece.shape[1])
    position += piece.shape[1]
    if high > low:
      yield piece[:, low:high]
  if position < end:
    yield np.zeros((piece.shape[0], end - max(position, start)), np.float32)


def _check_params(params, expected):
  """Raises UserError naming the first parameter that is missing, too many or of another shape."""
  found, wanted = ({_path(path): tuple(np.shape(leaf))
                    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
                   for tree in (params, expected))
  for name in sorted(found.keys() | wanted.keys()):
    if found.get(name) != wanted.get(name):
      raise UserError(f'the weights do not fit their config: {name} is '
                      f'{found.get(name, "missing")}, should be {wanted.get(name, "absent")}')


def _path(path):
  return '/'.join(str(entry.key) for entry in path)
