"""Codec: audio -> Latents -> audio, block by block, so that memory does not grow with the signal.

Encoding is chunk-local. Decoding is autoregressive (by default the paper's two steps, figure 2: each
network call refines the chunk before and makes a first estimate of the next) or parallel (CoDiCodec).
Noise belongs to (seed, chunk, role), so any way of cutting the work into blocks gives the same sound.
"""

import atexit
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import gc
import os

import jax
import numpy as np

from m2l2 import build, compiling, no_collection
from m2l2.codec import decoding, encoding, output, programs
from m2l2.codec.latents import Latents
from m2l2.codec.loading import check_params, locate
from m2l2.codec.sampler import Sampler
from m2l2.codec.snapshot import load_snapshot
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.variants.fsq import FSQ

_FILE_SECONDS = 10  # of a file per read
_ENDLESS = 2 ** 31 - 1
atexit.register(gc.freeze)  # else the interpreter scans all traced objects once more at its end, for half a second


def load(path) -> 'Codec':
  """A Codec from a snapshot, a workdir, or the name of a model in the box.

  Programs that are compiled from here on are kept for the next start (m2l2/compiling.py says where).

  Raises UserError: there is no model, or it is damaged.
  """
  compiling.use_cache()
  with no_collection():
    snapshot = load_snapshot(locate(path))
    return Codec(config=snapshot.config, params=snapshot.params, fingerprint=snapshot.fingerprint,
                 latent_scale=snapshot.extra.get('latents'))


class Codec:
  """Encodes and decodes with one set of weights.

  Attributes:
    config: the resolved config (nested dict); fingerprint: of the weights.
    network, representation, consistency: the parts built from it; sampler: decodes with them.
    latent_scale: {'mean', 'std'} of the latents, measured in training; None if the checkpoint has none.
  """

  def __init__(self, *, config, params, fingerprint: str, latent_scale: Mapping | None = None):
    """params: nested dict of float32 arrays, as in a snapshot.

    Raises UserError: config describes no model, or the weights do not fit it.
    """
    for part in ('model', 'consistency'):
      if not isinstance(config.get(part), Mapping):
        raise UserError(f'the checkpoint\'s config has no "{part}": it is not of an m2l2 model')
    self.config = config
    self.fingerprint = fingerprint
    self.latent_scale = latent_scale
    # The implementation of attention depends on the device, not on the weights.
    self.network = build.network({**config, 'model': {**config['model'], 'attention': 'auto'}})
    self.representation = build.representation(config['model'])
    self.consistency = build.consistency(config)
    self.native_rates = build.native_rates(config['model'])
    self._bottleneck = self.network.arch.make_bottleneck()
    check_params(params, self.network.shapes)
    self.params = jax.device_put(params)
    self.sampler = Sampler(representation=self.representation, network=self.network, consistency=self.consistency)
    self._programs = programs.compiled_programs(self.sampler, self._bottleneck)

  def __repr__(self):
    arch, rate = self.network.arch, self.native_rates[0]
    seconds = self.representation.chunk_samples / rate
    mono, numbers = self.representation.channels == 1, arch.num_latents * arch.latent_dim
    count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
    return (f'<Codec {self.fingerprint}: {"mono" if mono else "stereo"}, {rate:,} Hz, {count / 1e6:.3g} M parameters, '
            f'{arch.num_latents} x {arch.latent_dim} numbers for {seconds:.3g} s: {numbers / seconds:,.0f} a second'
            f'{" and channel" * mono}>')

  def model_rate(self, sample_rate: int) -> int:
    """The sample rate (Hz) at which a signal of `sample_rate` is encoded and decoded."""
    sample_rate = encoding.whole_rate(sample_rate)
    return sample_rate if sample_rate in self.native_rates else self.native_rates[0]

  def at_model_rate(self, audio, sample_rate: int) -> tuple[np.ndarray, int]:
    """Audio [channels, samples] at any rate -> (audio at `model_rate`, that rate)."""
    rate = self.model_rate(sample_rate)
    return audio_io.resample(audio, from_rate=encoding.whole_rate(sample_rate), to_rate=rate), rate

  # Encoding.

  def check_source(self, *, channels: int, discrete: bool = False):
    """Raises UserError if this model cannot encode `channels` channels, or has no tokens."""
    encoding.check_channels(channels, most=self.representation.channels)
    if discrete and not self._discrete:
      raise UserError('this model has no tokens, only continuous latents: encode without discrete')

  @property
  def _discrete(self):
    """Whether the model has int32 tokens."""
    return (isinstance(self._bottleneck, FSQ)
            and self._bottleneck.levels ** self.network.arch.latent_dim <= 2 ** 31)

  def encode_fn(self, params, audio, frames):
    """`encoding.encode_chunks` of this model, to be compiled: audio [B, C, crop_samples(S)] -> z [B, S, K, d]."""
    return encoding.encode_chunks(params, audio, frames, representation=self.representation, network=self.network,
                                  bottleneck=self._bottleneck)

  def tokens(self, z):
    """Latents float [..., K, d] -> int32 [..., K], for a model that has tokens."""
    return self._bottleneck.tokens(z)

  def encode(self, audio, sample_rate: int | None = None, *, discrete: bool = False) -> Latents:
    """Audio float32 [channels, samples] or [samples] in [-1, 1], or the path of an audio file -> Latents.

    A mono model encodes each channel as a stream of its own; a stereo model takes one or two
    channels. Audio at a rate that is not native is resampled. sample_rate: in Hz, for arrays only; a file is read in
    blocks, and its tags are kept. discrete: int32 tokens, for a model with an FSQ bottleneck.

    Raises UserError: no samples, integers, NaN or infinity, too many channels, a rate that is not a whole number of
      Hz, a model without tokens, or a file that cannot be read.
    """
    if isinstance(audio, str | os.PathLike):
      return self._encode_file(audio, sample_rate, discrete)
    if sample_rate is None:
      raise UserError('say the sample rate of the audio too: encode(audio, 44100)')
    audio = encoding.as_samples(audio)
    audio = audio[None] if audio.ndim == 1 else audio
    if audio.ndim != 2 or not audio.size:
      raise UserError('audio must be [channels, samples] with at least one sample, not of shape '
                      f'{list(audio.shape)}')
    step = programs.block_chunks() * self.representation.chunk_samples
    blocks = (audio[:, i:i + step] for i in range(0, audio.shape[1], step))
    return self.encode_blocks(
        blocks, sample_rate=sample_rate, channels=audio.shape[0], discrete=discrete)

  def _encode_file(self, path, sample_rate, discrete):
    info = audio_io.info(path)
    if sample_rate not in (None, info.sample_rate):
      raise UserError(f'{audio_io.shown(path)}: is at {info.sample_rate} Hz, not {sample_rate}; leave sample_rate out')
    self.check_source(channels=info.channels, discrete=discrete)
    blocks = audio_io.read_blocks(path, block_samples=_FILE_SECONDS * info.sample_rate, check_finite=True)
    latents = self.encode_blocks(blocks, sample_rate=info.sample_rate, channels=info.channels, discrete=discrete)
    return dataclasses.replace(latents, tags=dict(info.tags))

  def encode_blocks(self, blocks: Iterable, *, sample_rate: int, channels: int,
                    discrete: bool = False) -> Latents:
    """As `encode`, for a signal that comes as blocks [channels, any number of samples]."""
    sample_rate = encoding.whole_rate(sample_rate)
    self.check_source(channels=channels, discrete=discrete)
    windows = self._windows(blocks, sample_rate, channels=channels, width=programs.block_chunks())
    encoded = [encoding.check_finite(block) for block in output.on_host(map(self._encode_window, windows))]
    z = np.concatenate(encoded, axis=1)[:, :windows.layout.chunks]
    if discrete:
      z = self.tokens(z)
    return Latents(z=z, sample_rate=sample_rate, num_samples=windows.num_samples, channels=channels,
                   model=self.fingerprint)

  def stream_encode(self, audio_blocks: Iterable, sample_rate: int, *, channels: int,
                    discrete: bool = False) -> Iterator[np.ndarray]:
    """Encodes a live signal: yields the latents of a chunk as soon as its last sample has arrived.

    Together they equal `encode(...).z` of the whole signal up to rounding. If the rate is not native, the resampler
    delays by some hundred samples more; models with unpadded edges need `overlap` samples beyond the chunk.

    Args:
      audio_blocks: float32 [channels, any number of samples] each.
      sample_rate: Hz. channels: of the signal. discrete: tokens instead, for a model with an FSQ bottleneck.

    Returns:
      An iterator of float32 [streams, K, d], or int32 [streams, K] tokens, one per chunk: what `stream` takes.

    Raises UserError as `encode_blocks` does.
    """
    sample_rate = encoding.whole_rate(sample_rate)
    self.check_source(channels=channels, discrete=discrete)
    return self._stream_encode(self._windows(audio_blocks, sample_rate, channels=channels, width=1), discrete)

  def _stream_encode(self, windows, discrete):
    for window in windows:
      z = encoding.check_finite(np.asarray(self._encode_window(window)))[:, 0]
      yield self.tokens(z) if discrete else z

  def _windows(self, blocks, sample_rate, *, channels, width):
    return encoding.Windows(blocks, representation=self.representation, from_rate=sample_rate,
                            to_rate=self.model_rate(sample_rate), channels=channels, width=width)

  def _encode_window(self, window):
    """-> z float32 [streams, chunks, K, d] on the device."""
    audio, frames = window
    streams = encoding.to_streams(audio, channels=self.representation.channels)
    return self._programs.encode_block(self.params, streams, np.int32(frames))

  # Decoding.

  def decode(self, latents: Latents, seed: int = 0, *, mode: str = 'autoregressive',
             steps: int | None = None, sigma_cond: float | None = None, refine: bool | None = None,
             clip: bool = True, noise=None) -> np.ndarray:
    """Latents -> audio float32 [channels, samples], exactly the source's channels, samples, rate.

    Args:
      seed: of the noise that decoding starts from, 0 to 2^32 - 1.
      mode: 'autoregressive': each chunk is sampled together with the one before, to which noise of level
        `sigma_cond` is added. 'parallel': all chunks are sampled at once, in pairs that alternate between steps
        (CoDiCodec); time and memory of a block grow with the steps, so many steps are inefficient for short signals.
      steps: denoisings of each chunk from sigma_max down, at most 16; the config's by default (1 in the paper's
        autoregressive decoding, which `refine` makes two).
      sigma_cond: noise put back on the chunk before; the config's by default. Autoregressive only.
      refine: each chunk is denoised once more, as the left neighbour of the next, at the cost of one more call at
        the end. The config's by default (true except in CoDiCodec's). Not for parallel decoding.
      clip: limit samples to [-1, 1], as a file of integers would.
      noise: for tests, float32 [chunks, steps + 1, F, T, C]: unit noise for each use in a chunk: for the first
        estimate, as left neighbour, then before each further step.

    Raises UserError: latents of another model or shape, an unknown mode, a bad seed, steps or sigma_cond.
    """
    blocks = self.decode_blocks(latents, seed, mode=mode, steps=steps, sigma_cond=sigma_cond,
                                refine=refine, clip=clip, noise=noise)
    return np.concatenate(list(blocks), axis=1)

  def check_decoding(self, seed: int = 0, *, mode: str = 'autoregressive', steps: int | None = None,
                     sigma_cond: float | None = None):
    """Raises UserError for options that `decode` would refuse; to be called before long work."""
    decoding.check_options(self.consistency, chunks=self.network.arch.chunks, seed=seed, mode=mode, steps=steps,
                           sigma_cond=sigma_cond)

  def check_latents(self, latents: Latents):
    """Raises UserError for latents that `decode` would refuse: of another model or shape, or not finite."""
    self._continuous(latents)

  def decode_blocks(self, latents: Latents, seed: int = 0, **options) -> Iterator[np.ndarray]:
    """As `decode`, but yields blocks float32 [channels, any number of samples]. Errors are raised at the call."""
    pieces = self.decode_together([latents], seed, **options)
    return (piece for (piece,) in pieces if piece.shape[1])

  def decode_together(self, many: Sequence[Latents], seed: int = 0, *, mode: str = 'autoregressive',
                      steps: int | None = None, sigma_cond: float | None = None, refine: bool | None = None,
                      clip: bool = True, noise=None) -> Iterator[list[np.ndarray]]:
    """Decodes several signals at once, each as by `decode` (up to rounding); faster on GPUs and TPUs.

    Returns an iterator of lists: for each signal its next block, float32 [channels, any number of samples].
    Errors are raised at the call.
    """
    self.check_decoding(seed, mode=mode, steps=steps, sigma_cond=sigma_cond)
    values = [self._continuous(latents) for latents in many]
    if not values:
      raise UserError('there are no latents to decode')
    outputs = [self._output(latents, clip=clip) for latents in many]
    z, chunks = decoding.side_by_side(values)
    decoder = self._decoder
    draw, sigmas = decoder.sampling(seed, mode=mode, steps=steps, noise=noise, chunks=z.shape[1])
    if mode == 'parallel':
      pieces = decoder.parallel(z, draw, chunks, sigmas=sigmas)
    else:
      width = programs.block_chunks()
      blocks = (z[:, start:start + width] for start in range(0, z.shape[1], width))
      pieces = decoder.autoregressive(blocks, draw, chunks, sigmas=sigmas, sigma_cond=sigma_cond, refine=refine,
                                      width=width)

    def written():
      ends = np.cumsum([len(z) for z in values])
      for piece in output.on_host(pieces):
        yield [out.take(piece[end - len(value):end]) for out, value, end in zip(outputs, values, ends)]
      yield [out.finish() for out in outputs]
    return written()

  def stream(self, latent_chunks: Iterable, seed: int = 0, *, steps: int | None = None,
             sigma_cond: float | None = None, refine: bool | None = None,
             noise=None) -> Iterator[np.ndarray]:
    """Decodes chunk by chunk as latents arrive (CoDiCodec's live decoding), autoregressively.

    The pieces together equal the result of `decode` for the same latents, seed and options, up to the end of the
    last chunk. A piece is yielded as soon as the latents of its chunk have arrived or, with `refine`, those of the
    next chunk: the latency is one chunk, or two, plus the time of one call of the networks.

    Args:
      latent_chunks: each [K, d] float in [-1, 1] or [K] int tokens; a mono model also takes [streams, ...]. Of
        `Latents`: `np.moveaxis(latents.z, 1, 0)`.
      seed, steps, sigma_cond, refine, noise: as for `decode`; noise may have more chunks than arrive.

    Returns:
      An iterator of float32 [channels, samples of a chunk] at the model's rate; the first piece is shorter
      where the signal's beginning was padded, the last also holds what the last frames add beyond their chunk.

    Raises UserError: at the call for bad options, from the iterator for latents of a wrong shape.
    """
    self.check_decoding(seed, steps=steps, sigma_cond=sigma_cond)
    decoder = self._decoder
    draw, sigmas = decoder.sampling(seed, mode='autoregressive', steps=steps, noise=noise, chunks=None)
    rep = self.representation
    streams = 1 if rep.channels > 1 else None  # of a mono model: as many as the first chunk has

    def continuous(chunk):
      nonlocal streams
      z = np.asarray(chunk)
      z = z[None] if z.ndim == (1 if np.issubdtype(z.dtype, np.integer) else 2) else z
      streams = streams or len(z)
      return self._values(z[:, None], (streams, 1))

    pieces = decoder.autoregressive(map(continuous, latent_chunks), draw, np.array([_ENDLESS], np.int32), sigmas=sigmas,
                                    sigma_cond=sigma_cond, refine=refine, width=1)
    pieces = (piece[:, 0] if rep.channels == 1 else piece[0] for piece in map(np.asarray, pieces))
    cut = output.Cut(start=rep.layout(1).lead)
    return (np.clip(piece, -1.0, 1.0) for piece in map(cut.take, pieces) if piece.shape[1])

  # Latents at chunk borders.

  def features(self, latents: Latents, *, per: str = 'chunk') -> np.ndarray:
    """The latents as vectors for music information retrieval (paper, section 5.5: mean-pooled over time).

    Returns float32 [time, dim] = [chunks, K d], at `times`, or [K d] with per='file'; a mono model's streams averaged.
    Raises UserError: latents of another model, or an unknown `per`.
    """
    if per not in ('chunk', 'file'):
      raise UserError(f"per is {per!r}; choose 'chunk' or 'file'")
    z = self._continuous(latents).mean(axis=0)
    z = z.reshape(len(z), -1)
    return z if per == 'chunk' else z.mean(axis=0)

  def times(self, latents: Latents) -> np.ndarray:
    """When each chunk begins, float64 [chunks], in seconds of the source: the times of `features`' rows."""
    layout, rate = self._layout(latents), self.model_rate(latents.sample_rate)
    return np.maximum(self.representation.chunk_samples * np.arange(layout.chunks) - layout.lead, 0) / rate

  def to_unit(self, z):
    """Scales latents to about zero mean and unit variance over all numbers, for generative models: (z - mean) / std.

    Raises UserError: the checkpoint does not state the scale of its latents.
    """
    scale = self._scale()
    return (z - scale['mean']) / scale['std']

  def from_unit(self, z):
    """The inverse of `to_unit`, clipped to [-1, 1] as `decode` needs it. Raises UserError as `to_unit` does."""
    scale = self._scale()
    return np.clip(z * scale['std'] + scale['mean'], -1.0, 1.0)

  def _scale(self):
    if not self.latent_scale:
      raise UserError('this checkpoint does not tell the scale of its latents (training measures it with each probe, '
                      'train.probe_every): take mean and deviation of your own corpus')
    return self.latent_scale

  def cut(self, latents: Latents, start: int, stop: int) -> Latents:
    """The chunks start ... stop - 1 as Latents of their own, which decode to the sound of these chunks.

    With padded edges that is `stop - start` chunks less the overlap of frames. The last chunk may contain only what
    its frames add to the chunk before: then `num_samples` is 1, and `padding` tells `join` how much less it is.
    Raises UserError: there are no such chunks.
    """
    chunks = latents.z.shape[1]
    if not 0 <= start < stop <= chunks:
      raise UserError(f'there are no chunks {start} to {stop} in latents of {chunks}')
    return self._ending(latents, latents.z[:, start:stop], self._missing(latents) if stop == chunks else 0)

  def join(self, parts: Sequence[Latents]) -> Latents:
    """Concatenates latents, chunk by chunk: the inverse of `cut`. The last chunk of a part is padded with silence.

    Raises UserError: no parts, or parts of other models, rates, channels or forms.
    """
    parts = list(parts)
    kinds = {(p.model, p.sample_rate, p.channels, p.z.dtype, p.z.shape[0], *p.z.shape[2:]) for p in parts}
    if len(kinds) != 1:
      raise UserError('latents to join must be of one model, rate, number of channels and form' if kinds else
                      'there are no latents to join')
    return self._ending(parts[-1], np.concatenate([part.z for part in parts], axis=1), self._missing(parts[-1]))

  def _missing(self, latents):
    """How many samples the signal is shorter than its chunks could hold."""
    return self.most_samples(latents.z.shape[1], latents.sample_rate) - latents.num_samples + latents.padding

  def _ending(self, latents, z, missing):
    """Latents of `z` whose signal is `missing` samples shorter than its chunks could hold, as far as it keeps these
    chunks."""
    chunks, rate = z.shape[1], latents.sample_rate
    samples = self.most_samples(chunks, rate) - missing
    fewest = self.most_samples(chunks - 1, rate) + 1 if chunks > 1 else 1
    return dataclasses.replace(latents, z=z, num_samples=max(samples, fewest), padding=max(fewest - samples, 0))

  def first(self, latents: Latents, embeddings: int) -> Latents:
    """Keeps the first `embeddings` of every chunk, a lower rate that a model trained with variants.nested can decode.

    Raises UserError: another model, or a number of embeddings that is out of range.
    """
    self.check_first(embeddings, most=latents.z.shape[2])
    return dataclasses.replace(latents, z=latents.z[:, :, :embeddings])

  def check_first(self, embeddings: int, most: int | None = None):
    """Raises UserError if `first` would, for `most` embeddings per chunk (by default all of the model's)."""
    most = most or self.network.arch.num_latents
    if not self.nested:
      raise UserError('this model needs all its embeddings: it never learned to decode the first few (variants.nested)')
    if not 1 <= embeddings <= most:
      raise UserError(f'there are 1 to {most} embeddings a chunk to keep, not {embeddings}')

  @property
  def nested(self) -> bool:
    """Whether any prefix of a chunk's embeddings can be decoded."""
    return not self._discrete and build.variants(self.config).get('nested_chance', 0) > 0

  def most_samples(self, chunks, sample_rate):
    """The number of samples of the longest signal at `sample_rate` that has `chunks` chunks."""
    rep = self.representation
    samples = chunks * rep.chunk_samples + (-rep.overlap if rep.edges == 'pad' else rep.window - 1)
    samples = samples * sample_rate // self.model_rate(sample_rate)
    while self.layout(samples + 1, sample_rate).chunks <= chunks:
      samples += 1
    while self.layout(samples, sample_rate).chunks > chunks:
      samples -= 1
    return samples

  def _layout(self, latents):
    """The layout of the latents' signal at the model's rate."""
    return self.layout(latents.num_samples, latents.sample_rate)

  def layout(self, num_samples: int, sample_rate: int):
    """The layout of a signal of `num_samples` at `sample_rate` in frames and chunks: a representation.SignalLayout."""
    return self.representation.layout(audio_io.resampled_length(
        num_samples, from_rate=encoding.whole_rate(sample_rate), to_rate=self.model_rate(sample_rate)))

  def _continuous(self, latents):
    """The latents as float32 [streams, chunks, K, d], checked against this model."""
    if latents.model != self.fingerprint:
      raise UserError(f'these latents are of model {latents.model}, this checkpoint is '
                      f'{self.fingerprint}: decode with the checkpoint that encoded them')
    streams = latents.channels if self.representation.channels == 1 else 1
    if latents.channels > max(streams, self.representation.channels):
      raise UserError(f'latents of {latents.channels} channels do not fit: this model has at most '
                      f'{self.representation.channels}')
    return self._values(latents.z, (streams, self._layout(latents).chunks))

  def _values(self, z, lead):
    return decoding.to_continuous(z, lead, arch=self.network.arch, nested=self.nested,
                                  tokens=self._bottleneck if self._discrete else None)

  @property
  def _decoder(self):
    return decoding.BlockDecoder(sampler=self.sampler, consistency=self.consistency, compiled=self._programs,
                                 params=self.params)

  def _output(self, latents, *, clip):
    return output.Output(layout=self._layout(latents), model_channels=self.representation.channels,
                         model_rate=self.model_rate(latents.sample_rate), channels=latents.channels,
                         sample_rate=latents.sample_rate, num_samples=latents.num_samples, clip=clip)
