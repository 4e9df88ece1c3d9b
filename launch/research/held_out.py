#!/usr/bin/env python3
"""Measures a model on held-out music, compared with simple codecs of the same rate.

  python launch/research/held_out.py --model=tiny --train=PREPARED --output=runs/held_out

  --model=MODEL      snapshot, workdir or a model in the box
  --music=DIR        default data/music/heldout (launch/get_music.sh)
  --excerpts=FILE    default launch/research/excerpts/heldout.txt: 60 of --seconds=10
  --train=PLACE      music that the PCA is fitted on, as for config.data.root
  --beside=A,B       further models of the same sample rate, one row each, in one step; for example the model that
                     training began with. NAME=MODEL names the row
  --sigma-cond=A,B   noise added to a chunk in two-step decoding: two steps less one, paired, for each
  --workers=N        processes for the signal metrics
  --visqol-every=N   ViSQOL, which is slow, on every N-th excerpt (default 1; 0: none)
  --sounds=N         how many excerpts to write, of every row (default 3)

All at the model's own sample rate. Writes to OUTPUT table.md, report.json, spectrograms.png, swapped.png, rates.png
(nested models) and sounds/ROW/EXCERPT.flac, which `m2l2 evaluate --beside` makes a page of.
The rows: the model in one and in two steps and by parallel decoding; untrained weights of it; a noise vocoder of 16
bands with as many numbers a second; Opus at the nearest bit rate to the latents in float16; PCA of the model's own
spectrogram with as many numbers a second (of its frames eight at a time, fitted on the training music); exact
magnitudes of every bin with phases of noise; the excerpts themselves as a check. +- is a standard error, of Frechet
distances a bootstrap standard deviation.
"""

import argparse
import io
import os
from pathlib import Path
import re
import shutil
import sys

import jax
import numpy as np
import soundfile

from m2l2 import files
from m2l2.codec.codec import Codec, load
from m2l2.data import audio_io
from m2l2.data.pipeline import make_loader
from m2l2.errors import UserError
from m2l2.evaluation import excerpts
from m2l2.evaluation.embedders.embeddings import make_embedder, remembering
from m2l2.evaluation.metrics import pairs, registry
from m2l2.evaluation.metrics.frechet import frechet_distance, paired_difference
from m2l2.evaluation.reports import pictures
from m2l2.evaluation.studies import baselines, judging

EMBEDDING = 'musicnn_mtt'
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
BLOCK = 8              # frames that the PCA takes at once
PARALLEL_STEPS = 3     # CoDiCodec's
CROPS = 600            # of two chunks, that it is fitted on
METRICS = ('ratio', 'mel_l1_db', 'lsd_db', 'coherence', 'coherence_reference', 'si_sdr')
COLUMNS = (*METRICS, 'visqol', 'level_db', EMBEDDING)


def parser():
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--model', required=True)
  flags.add_argument('--music', default='data/music/heldout')
  flags.add_argument('--excerpts', default=os.path.join(os.path.dirname(__file__), 'excerpts', 'heldout.txt'))
  flags.add_argument('--seconds', type=float, default=10.0)
  flags.add_argument('--train', required=True)
  flags.add_argument('--output', type=Path, required=True)
  flags.add_argument('--beside', type=lambda text: text.split(','), default=[])
  flags.add_argument('--sigma-cond', type=lambda text: [float(x) for x in text.split(',')],
                     default=[.03, .1, .3, .965, 3.])
  flags.add_argument('--workers', type=int, default=1)
  flags.add_argument('--visqol-every', type=int, default=1)
  flags.add_argument('--sounds', type=int, default=3)
  return flags


def run(argv) -> dict:
  """The whole report, which is also written."""
  args = parser().parse_args(argv)
  codec = load(args.model)
  rate = codec.native_rates[0]
  sounds = judging.load(args.excerpts, args.music, seconds=args.seconds, sample_rate=rate)
  beside = {name or Path(model).name: load(model) for name, _, model in (text.rpartition('=') for text in args.beside)}
  if len(beside) < len(args.beside):
    raise UserError('--beside: two of them have the same last name, by which their rows go: give NAME=MODEL')
  for name, other in beside.items():
    if other.native_rates[0] != rate:
      raise UserError(f'--beside: {name} works at {other.native_rates[0]} Hz, --model at {rate} Hz')
  args.output.mkdir(parents=True, exist_ok=True)
  latents = judging.encode(codec, sounds, rate)
  systems, kbps = made_by_all(codec, sounds, latents, rate, args)
  beside_latents = {name: judging.encode(other, sounds, rate) for name, other in beside.items()}
  systems |= {name: judging.decode(other, beside_latents[name], refine=False) for name, other in beside.items()}

  embed = remembering(make_embedder(EMBEDDING))
  embedders = {EMBEDDING: embed}
  judged = {name: judging.judge(sounds, estimates, rate, metrics=METRICS, embedders=embedders, workers=args.workers)
            for name, estimates in systems.items()}
  if args.visqol_every and registry.METRICS['visqol'].is_available():
    some = dict(list(sounds.items())[::args.visqol_every])
    for name, estimates in systems.items():
      heard = judging.judge(some, {key: estimates[key] for key in some}, rate, metrics=['visqol'],
                            workers=args.workers)
      judged[name]['metrics'] |= heard['metrics']
  report = {'model': str(args.model), 'fingerprint': codec.fingerprint, 'sample_rate': rate, 'excerpts': len(sounds),
            'parameters_per_second': numbers_per_second(codec), 'kbps': kbps, 'systems': judged,
            'beside': {name: compare(sounds, systems['m2l2, one step'], systems[name], rate, embed) for name in beside},
            'steps': compare_steps(codec, sounds, latents, rate, systems['m2l2, one step'], args.sigma_cond, embed),
            'swapped': swapped(codec, sounds, latents, rate, args.output, embed),
            'rates': rates(codec, sounds, latents, rate, embed),
            'rates_beside': {name: rates(other, sounds, beside_latents[name], rate, embed)
                             for name, other in beside.items()}}
  write(report, systems, sounds, rate, args.output, args.sounds)
  return report


def numbers_per_second(codec: Codec) -> float:
  arch, rep = codec.network.arch, codec.representation
  return arch.num_latents * arch.latent_dim * codec.native_rates[0] / rep.chunk_samples


def made_by_all(codec, sounds, latents, rate, args):
  """({system: its reconstructions}, {system: kbit/s where that says something})."""
  each = lambda function: {name: function(audio) for name, audio in sounds.items()}
  untrained = Codec(config=codec.config, fingerprint='untrained', params=jax.jit(codec.network.init)(jax.random.key(0)))
  per_second = numbers_per_second(codec)
  coded = each(lambda audio: opus(audio, sample_rate=rate, bits_per_second=16 * per_second))
  systems = {
      'm2l2, one step': judging.decode(codec, latents, refine=False),
      'm2l2, two steps': judging.decode(codec, latents, refine=True),
      'm2l2, parallel': judging.decode(codec, latents, mode='parallel', steps=PARALLEL_STEPS),
      '(a) untrained': judging.decode(untrained, judging.encode(untrained, sounds, rate), refine=False),
      '(b) noise vocoder, 16 bands': each(lambda audio: baselines.noise_vocoder(
          audio, sample_rate=rate, parameters_per_second=per_second)),
      '(c) Opus': {name: audio for name, (audio, _) in coded.items()},
      '(d) PCA': pca_reconstructions(codec, sounds, args.train),
      '(e) exact magnitudes, phases of noise': {name: baselines.noise_phases(audio, codec.representation, seed=number)
                                                for number, (name, audio) in enumerate(sounds.items())},
      'noise with the mean spectrum': each(lambda audio: shaped_noise(audio, rate)),
      'the excerpt itself': sounds}
  return systems, {'m2l2 in float16': 16 * per_second / 1000,
                   '(c) Opus': float(np.mean([bits for _, bits in coded.values()])) / 1000}


def shaped_noise(audio, rate):
  """What `ratio` compares with, at the model's rate."""
  noise = pairs.shaped_noise(audio, sample_rate=rate, seed=1)[None]
  return audio_io.resample(noise, from_rate=pairs.SAMPLE_RATE, to_rate=rate)[:, :audio.shape[1]]


def opus(audio, *, sample_rate: int, bits_per_second: float):
  """-> (audio after Opus at the bit rate nearest to `bits_per_second`, that rate, as its file has it).

  Opus knows no rates below 6 kbit/s. The rate stated is of all bytes but the two headers.

  Raises UserError: libsndfile here writes no Opus.
  """
  if 'OPUS' not in soundfile.available_subtypes('OGG'):
    raise UserError('libsndfile here writes no Opus: update soundfile')
  at_rate = min((rate for rate in OPUS_RATES if rate >= sample_rate), default=OPUS_RATES[-1])
  resampled = audio_io.resample(audio, from_rate=sample_rate, to_rate=at_rate)
  level = float(np.clip((256_000 - bits_per_second) / 250_000, 0, 1))  # libsndfile: 256 to 6 kbit/s a channel
  file, empty = io.BytesIO(), io.BytesIO()
  for target, samples in ((file, resampled), (empty, resampled[:, :1])):
    soundfile.write(target, samples.T, at_rate, format='OGG', subtype='OPUS', compression_level=level)
  bits = 8 * (len(file.getvalue()) - len(empty.getvalue()))
  file.seek(0)
  decoded, rate = soundfile.read(file, dtype='float32', always_2d=True)
  decoded = audio_io.resample(decoded.T, from_rate=rate, to_rate=sample_rate)
  return _as_long(decoded, audio.shape[1]), bits * sample_rate / audio.shape[1]


def _as_long(audio, samples):
  return np.pad(audio[:, :samples], ((0, 0), (0, max(0, samples - audio.shape[1]))))


def pca_reconstructions(codec, sounds, train):
  """A linear code of the model's own spectrogram with as many numbers a second, fitted on crops of `train`."""
  rep = codec.representation
  numbers = codec.network.arch.num_latents * codec.network.arch.latent_dim * BLOCK // rep.frames
  analyse, synthesise = jax.jit(rep.analyse), jax.jit(rep.synthesise)
  with make_loader(root=train, sample_rate=codec.native_rates[0], native_rates=codec.native_rates,
                   channels=rep.channels, crop_samples=rep.crop_samples(2), batch_size=4, seed=0) as loader:
    blocks = np.concatenate([blocks_of(np.asarray(analyse(next(loader)['audio']))) for _ in range(CROPS // 4)])
  pca = baselines.fit_pca(blocks, numbers)
  del blocks

  def reconstruct(audio):
    padded, signal = baselines.in_chunks(audio, rep)
    spec = np.asarray(analyse(padded[None]))
    coded = pca.inverse_transform(pca.transform(blocks_of(spec)))
    waveform = np.concatenate(synthesise(from_blocks(coded.astype(np.float32), spec.shape)), axis=-1)[0]
    return waveform[:1, signal]

  return {name: reconstruct(audio) for name, audio in sounds.items()}


def blocks_of(spec):
  """Spectrograms [B, S, F, T, C] -> [B S T / BLOCK, F BLOCK C]: BLOCK frames of all bins."""
  b, s, f, t, c = spec.shape
  return np.moveaxis(spec.reshape(b * s, f, t // BLOCK, BLOCK, c), 2, 1).reshape(-1, f * BLOCK * c)


def from_blocks(blocks, shape):
  b, s, f, t, c = shape
  return np.moveaxis(blocks.reshape(b * s, t // BLOCK, f, BLOCK, c), 1, 2).reshape(shape)


def compare(sounds, ours, other, rate, embed) -> dict:
  """`ours` less `other` in log-mel L1 (dB) and in FD, each with a paired bootstrap over the excerpts: below 0 `ours`
  is the better."""
  mel = lambda side: np.array([pairs.mel_l1_db(sounds[name], side[name], sample_rate=rate) for name in sounds])
  embedded = ([embed(estimates[name], sample_rate=rate) for name in sounds] for estimates in (ours, other, sounds))
  return {'mel_l1_db': baselines.paired_bootstrap(mel(ours) - mel(other)), 'frechet': paired_difference(*embedded)}


def compare_steps(codec, sounds, latents, rate, one_step, sigma_conds, embed) -> dict:
  """`compare` of two steps with one, for each sigma_cond."""
  two = lambda sigma: judging.decode(codec, latents, refine=True, sigma_cond=sigma)
  return {f'{sigma:g}': compare(sounds, two(sigma), one_step, rate, embed) for sigma in sigma_conds}


def rates(codec, sounds, latents, rate, embed) -> dict:
  """Rate and distortion, one step, with the first K embeddings of each chunk alone: {K: figures}, of nested models."""
  by_rate = {}
  for count in range(1, codec.network.arch.num_latents + 1) if codec.nested else ():
    estimates = judging.decode(codec, {name: codec.first(z, count) for name, z in latents.items()}, refine=False)
    judged = judging.judge(sounds, estimates, rate, metrics=('ratio', 'mel_l1_db'), embedders={EMBEDDING: embed})
    by_rate[count] = {'numbers_per_second': numbers_per_second(codec) * count / codec.network.arch.num_latents,
                      'ratio': judged['metrics']['ratio']['mean'], 'mel_l1_db': judged['metrics']['mel_l1_db']['mean'],
                      'frechet': judged['frechet']}
  return by_rate


def swapped(codec, sounds, latents, rate, output, embed) -> dict:
  """Does decoding another piece's latents give the other piece? Means over excerpts of distances to each of the two."""
  estimates = judging.decode(codec, judging.exchanged(latents), refine=False)
  names = list(sounds)
  others = dict(zip(names, judging.away(names), strict=True))
  embedded = {name: embed(audio, sample_rate=rate) for name, audio in sounds.items()}
  estimate = {name: embed(audio, sample_rate=rate) for name, audio in estimates.items()}
  mel = lambda a, b: pairs.mel_l1_db(a, b, sample_rate=rate)
  pictures.save(pictures.spectrograms({
      f'A: {names[0]}': (sounds[names[0]], rate), f'B: {others[names[0]]}': (sounds[others[names[0]]], rate),
      "A's noise, B's latents": (estimates[names[0]], rate)}), output / 'swapped.png')
  over = lambda function: float(np.mean([function(name) for name in names]))
  return {'frechet_to_own': over(lambda name: frechet_distance(estimate[name], embedded[name])),
          'frechet_to_source_of_latents': over(lambda name: frechet_distance(estimate[name], embedded[others[name]])),
          'mel_l1_db_to_own': over(lambda name: mel(sounds[name], estimates[name])),
          'mel_l1_db_to_source_of_latents': over(lambda name: mel(sounds[others[name]], estimates[name]))}


def write(report, systems, sounds, rate, output, kept):
  names = list(sounds)
  rows = {}
  for name in excerpts.evenly(names, 3):
    rows[name] = (sounds[name], rate)
    rows[f'm2l2, one step: {name}'] = (systems['m2l2, one step'][name], rate)
  pictures.save(pictures.spectrograms(rows), output / 'spectrograms.png')
  if report['rates']:
    pictures.save(pictures.rate_distortion(report['rates'].values(), EMBEDDING), output / 'rates.png')
  for system in systems:
    folder = output / 'sounds' / re.sub(r'[^a-z0-9]+', '_', system.lower()).strip('_')
    shutil.rmtree(folder, ignore_errors=True)  # of another model, or of more excerpts
    folder.mkdir(parents=True)
    for name in excerpts.evenly(names, kept):
      audio_io.write(folder / f'{name.replace("/", "_")}.flac', systems[system][name], rate)
  files.write_json(output / 'report.json', report, indent=1)
  files.write_text(output / 'table.md', markdown(report))


def markdown(report) -> str:
  """The table, and below it what one and two steps and swapped latents gave."""
  def value(judged, column):
    if column == EMBEDDING:
      distance = judged['frechet'].get(EMBEDDING)
      return f'{distance["value"]:.1f} +- {distance["bootstrap_sd"] or 0:.1f}' if distance else ''
    if column == 'level_db':
      return f'{judged["level_db"]:+.1f}'
    if column not in judged['metrics']:
      return ''
    metric = judged['metrics'][column]
    return f'{metric["mean"]:.2f}' + (f' +- {metric["sem"]:.2f}' if metric['sem'] else '')

  columns = [c for c in COLUMNS if any(value(judged, c) for judged in report['systems'].values())]
  lines = [['system', *columns], ['---'] * (len(columns) + 1),
           *([name, *(value(judged, c) for c in columns)] for name, judged in report['systems'].items())]
  lines = [f'| {" | ".join(line)} |' for line in lines]
  heard = report['systems']['m2l2, one step']['metrics'].get('visqol', {}).get('per_file', ())
  lines += ['', f'{report["excerpts"]} excerpts (ViSQOL: {len(heard)}) at {report["sample_rate"]} Hz; '
            f'{report["parameters_per_second"]:.1f} numbers a second; kbit/s: '
            + ', '.join(f'{name} {rate:.1f}' for name, rate in report['kbps'].items()) + '.', '',
            '| | log-mel L1, dB (95 %) | FD (95 %) |', '| --- | --- | --- |']
  told = lambda change, digits: (f'{change["mean"]:+.{digits}f} ({change["low"]:+.{digits}f} to '
                                 f'{change["high"]:+.{digits}f})')
  compared = ({f'one step less {name}': diff for name, diff in report['beside'].items()}
              | {f'two steps at sigma_cond {sigma} less one': diff for sigma, diff in report['steps'].items()})
  lines += [f'| {name} | {told(diff["mel_l1_db"], 3)} | {told(diff["frechet"], 1)} |'
            for name, diff in compared.items()]
  lines += rates_table(report)
  swap = report['swapped']
  lines += ['', 'Latents of another piece, means over the excerpts (FD of each by itself, not that of the table): to '
            f'the piece whose noise it is FD {swap["frechet_to_own"]:.0f} and log-mel L1 '
            f'{swap["mel_l1_db_to_own"]:.1f} dB, to the piece whose latents they are '
            f'{swap["frechet_to_source_of_latents"]:.0f} and {swap["mel_l1_db_to_source_of_latents"]:.1f} dB.']
  return '\n'.join(lines) + '\n'


def rates_table(report) -> list[str]:
  """Lines of what each number of embeddings gave, with the FD of the other nested models; none if it is not nested."""
  distance = lambda scores: f'{scores["frechet"][EMBEDDING]["value"]:.1f}' if scores['frechet'] else ''
  others = {name: scores for name, scores in report['rates_beside'].items() if scores}
  rows = [[str(count), f'{scores["numbers_per_second"]:.0f}', f'{scores["ratio"]:.2f}', f'{scores["mel_l1_db"]:.2f}',
           distance(scores), *(distance(other[count]) if count in other else '' for other in others.values())]
          for count, scores in report['rates'].items()]
  head = ['embeddings', 'numbers a second', 'ratio', 'log-mel L1, dB', 'FD', *(f'FD, {name}' for name in others)]
  return ['', *(f'| {" | ".join(row)} |' for row in [head, ['---'] * len(head), *rows])] if rows else []


if __name__ == '__main__':
  try:
    print(markdown(run(sys.argv[1:])))
  except UserError as error:
    sys.exit(f'held_out: {error}')
