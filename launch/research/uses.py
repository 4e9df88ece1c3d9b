#!/usr/bin/env python3
"""What latents are good for beyond coding, measured: new music (m2l2/examples/generate.py), and which pieces are alike.

  python launch/research/uses.py generate --latents=LATENTS --workdir=runs/generate --output=runs/uses
  python launch/research/uses.py continue --workdir=runs/generate --output=runs/uses
  python launch/research/uses.py similar --output=runs/uses

generate: Frechet distance (musicnn) to decoded windows of the corpus, of --count sampled pieces of --seconds, and of
as many: further windows of the corpus; pieces put together of its chunks in random order; pieces of which each chunk is
drawn from one normal distribution with the mean and covariance of the corpus's chunks; held-out excerpts, coded. All
are decoded alike, in one step; deviations are of the pieces drawn anew.

continue: of each held-out excerpt the generator hears the first GIVEN chunks and makes the others. How far is that,
decoded, from the excerpt's own end and from the ends of the others? Cosine distances of mean musicnn embeddings; paired
bootstrap over the excerpts. Beside it: the excerpt's first chunks again, in the place of its end.

similar: for each excerpt of the list, is the nearest of all other excerpts, up to six of each listed track, from end to
end of it, one of the same track? And where each track has but the one that is furthest away in time? By `m2l2 similar`,
by plain cosines of mean latents, and by those of mean log-mel spectra.

  --checkpoint=MODEL  default tiny         --excerpts=FILE     default launch/research/excerpts/heldout.txt
  --music=DIR         where they are, default data/music/heldout
  --seed=N            of samples and decoding, default 0

OUTPUT gets generate.json, continue.json or similar.json, and a few sounds.
"""

import argparse
import collections
import json
from pathlib import Path
import sys

import numpy as np

from m2l2 import files
from m2l2.codec import features
from m2l2.codec.codec import load
from m2l2.data import audio_io
from m2l2.data.latents import latent_source
from m2l2.errors import UserError
from m2l2.evaluation.embedders.embeddings import make_embedder
from m2l2.evaluation.metrics import pairs
from m2l2.evaluation.metrics.frechet import DRAWS, frechet_distance
from m2l2.evaluation.studies import baselines, judging
from m2l2.examples import generate

EMBEDDING = 'musicnn_mtt'
REFERENCES = 300  # windows of the corpus
GIVEN = 4         # chunks of an excerpt that the generator hears
EXCERPT = 10.0    # seconds


def parser():
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('what', choices=STUDIES)
  flags.add_argument('--latents', help='what m2l2 encode-dataset wrote, and the generator was trained on')
  flags.add_argument('--workdir', help="the generator's")
  flags.add_argument('--checkpoint', default='tiny')
  flags.add_argument('--music', default='data/music/heldout')
  flags.add_argument('--excerpts', default=Path(__file__).parent / 'excerpts' / 'heldout.txt')
  flags.add_argument('--output', type=Path, required=True)
  flags.add_argument('--count', type=int, default=100)
  flags.add_argument('--seconds', type=float, default=EXCERPT)
  flags.add_argument('--steps', type=int, default=50)
  flags.add_argument('--guidance', type=float, default=1.0)
  flags.add_argument('--temperature', type=float, default=generate.TEMPERATURE)
  flags.add_argument('--no-held-out', action='store_true', help='of generate: for choices, which they must not touch')
  flags.add_argument('--seed', type=int, default=0)
  return flags


# ---- new music -----------------------------------------------------------------------------------


def new_music(args) -> dict:
  codec, generator = load(args.checkpoint), generate.load(args.workdir)
  rate, embed = codec.native_rates[0], make_embedder(EMBEDDING)
  chunks = codec.layout(round(args.seconds * rate), rate).chunks
  source, rng = latent_source(args.latents, window=chunks), np.random.default_rng(args.seed)
  rows = [source[int(i)] for i in np.linspace(0, len(source) - 1, REFERENCES + args.count).astype(int)]
  is_other = np.zeros(len(rows), bool)
  is_other[rng.permutation(len(rows))[:args.count]] = True
  corpus = np.stack([row['z'] for row in rows])
  labels = [generate.class_of(row['source']) for row, other in zip(rows, is_other) if other]
  sampled = lambda count, label: generator.sample(chunks, count=count, seed=args.seed, label=label, steps=args.steps,
                                                  guidance=args.guidance, temperature=args.temperature)
  counts = collections.Counter(label if label in generator.classes else None for label in labels)
  systems = {
      'samples': sampled(args.count, None),
      'samples, classes as in the corpus': np.concatenate([sampled(n, label) for label, n in counts.items()]),
      'other windows of the corpus': corpus[is_other],
      'shuffled chunks': rng.permutation(corpus.reshape(-1, *corpus.shape[2:]))[:args.count * chunks].reshape(
          args.count, chunks, *corpus.shape[2:]),
      'a normal distribution for each chunk': normal_chunks(corpus, (args.count, chunks), rng)}
  if not args.no_held_out:
    sounds = judging.load(args.excerpts, args.music, seconds=args.seconds, sample_rate=rate)
    systems['held-out excerpts'] = np.stack([z.z[0] for z in judging.encode(codec, sounds, rate).values()])

  def embedded(many, first_seed):
    """One array [windows, 200] a piece, and the first few sounds."""
    sounds = (codec.decode(generate.as_latents(codec, z, seconds=args.seconds), seed=first_seed + i, refine=False)
              for i, z in enumerate(many))
    windows, kept = [], []
    for sound in sounds:
      windows.append(embed(sound, sample_rate=rate))
      kept = [*kept, sound][:3]
    return windows, kept

  reference, _ = embedded(corpus[~is_other], 10_000)
  whole, report = np.concatenate(reference), {}
  for name, many in systems.items():
    produced, kept = embedded(many, args.seed)
    report[name] = {'pieces': len(produced), 'frechet': frechet_distance(np.concatenate(produced), whole),
                    'sd': deviation(produced, whole)}
    print(name, json.dumps(report[name]), flush=True)
    for number, sound in enumerate(kept if name.startswith('samples') else ()):
      audio_io.write(args.output / f'{name.replace(", ", "_").replace(" ", "_")}_{number}.wav', sound, rate)
  return {'embedding': EMBEDDING, 'references': len(reference), 'seconds': args.seconds, 'systems': report}


def normal_chunks(corpus, shape, rng):
  """[*shape, K, d] in [-1, 1], each chunk from the normal distribution of the corpus's [windows, chunks, K, d]."""
  flat = corpus.reshape(-1, np.prod(corpus.shape[2:])).astype(np.float64)
  centred = (flat - flat.mean(axis=0)) / np.sqrt(len(flat) - 1)
  drawn = rng.standard_normal((np.prod(shape), len(flat))) @ centred + flat.mean(axis=0)
  return np.clip(drawn, -1, 1).astype(np.float32).reshape(*shape, *corpus.shape[2:])


def deviation(embedded, reference, *, seed: int = 0) -> float:
  """Of the distance, when the pieces are drawn anew."""
  picks = np.random.default_rng(seed).integers(len(embedded), size=(DRAWS, len(embedded)))
  return float(np.std([frechet_distance(np.concatenate([embedded[i] for i in pick]), reference) for pick in picks],
                      ddof=1))


# ---- what goes on --------------------------------------------------------------------------------


def continuations(args) -> dict:
  codec, generator = load(args.checkpoint), generate.load(args.workdir)
  rate, embed = codec.native_rates[0], make_embedder(EMBEDDING)
  sounds = judging.load(args.excerpts, args.music, seconds=EXCERPT, sample_rate=rate)
  z = np.stack([latents.z[0] for latents in judging.encode(codec, sounds, rate).values()])
  wanted = z.shape[1] - GIVEN
  sampled = generator.sample(wanted, count=len(z), seed=args.seed, prefix=z[:, :GIVEN], steps=args.steps,
                             guidance=args.guidance, temperature=args.temperature)
  again = z[:, GIVEN - wanted:GIVEN]
  start = GIVEN * codec.representation.chunk_samples

  def vectors(ends):
    """Mean embeddings [n, 200], of length 1, of decoded ends; they are decoded behind what was given."""
    rows = []
    for number, (given, end) in enumerate(zip(z[:, :GIVEN], ends, strict=True)):
      latents = generate.as_latents(codec, np.concatenate([given, end]), seconds=EXCERPT)
      sound = codec.decode(latents, seed=args.seed + number, refine=False)
      rows.append(embed(sound[:, start:], sample_rate=rate).mean(axis=0))
      if number < 3 and ends is sampled:
        audio_io.write(args.output / f'continued_{number}.wav', sound, rate)
    return np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)

  true, names = vectors(z[:, GIVEN:]), [name.rpartition('@')[0] for name in sounds]
  same = np.array([[a == b for b in names] for a in names])  # of one track
  report = {}
  for name, ends in (('generated', sampled), ('its first chunks again', again)):
    distance = 1 - vectors(ends) @ true.T
    own = np.diag(distance)
    others = np.array([row[~of_track].mean() for row, of_track in zip(distance, same)])
    report[name] = {'own': float(own.mean()), 'others': float(others.mean()),
                    'own less others': baselines.paired_bootstrap(own - others),
                    'nearer to its own than to the mean other': float(np.mean(own < others)),
                    'its own is nearer than a random other': float(np.mean(
                        [np.mean(row[~of_track] > row[i]) for i, (row, of_track) in enumerate(zip(distance, same))]))}
  return {'embedding': EMBEDDING, 'excerpts': len(z), 'given': GIVEN, 'made': wanted, 'systems': report}


# ---- what is alike -------------------------------------------------------------------------------


def alike(args) -> dict:
  codec = load(args.checkpoint)
  rate = codec.native_rates[0]
  listed = judging.read_list(args.excerpts)
  queries = list(judging.load(args.excerpts, args.music, seconds=EXCERPT, sample_rate=rate).values())
  pool = [(name, *excerpt) for name in sorted({name for _, name in listed})
          for excerpt in spread_excerpts(Path(args.music) / name, rate)]
  of_track, places = np.array([name for name, *_ in pool]), np.array([place for _, place, _ in pool])
  sounds = [audio for *_, audio in pool]
  latents = lambda audio: codec.features(codec.encode(audio, rate))
  mel = lambda audio: pairs.log_mel_db(audio, sample_rate=rate).T
  report = {'excerpts': len(listed), 'tracks': len(set(of_track)), 'pool': len(pool), 'systems': {}}
  for name, features_of, compare in (
      ('m2l2 similar', latents, features.similarity), ('mean latents', latents, cosines),
      ('log-mel means', mel, cosines)):
    asked, others = [features_of(audio) for audio in queries], [features_of(audio) for audio in sounds]
    nearest, single = [], []
    for (start, track), query in zip(listed, asked):
      near = (of_track == track) & (np.abs(places - start) < EXCERPT)
      ranked = compare(query, others)
      nearest.append(of_track[np.argmax(np.where(near, -2, ranked))] == track)
      far = np.where(near, -1, np.abs(places - start))  # of each track the one excerpt that is furthest in time
      chosen = [np.flatnonzero(of_track == other)[np.argmax(far[of_track == other])] for other in np.unique(of_track)]
      one_each = compare(query, [others[i] for i in chosen])
      single.append(of_track[chosen[int(np.argmax(one_each))]] == track)
    report['systems'][name] = {title: baselines.paired_bootstrap(np.float64(right)) for title, right in (
        ('another excerpt of the track is the nearest of all', nearest),
        ('of one excerpt a track, the furthest in time, its own is the nearest', single))}
    print(name, json.dumps(report['systems'][name]), flush=True)
  return report


def cosines(query, pieces):
  """Between mean features, less the mean of all."""
  means = np.stack([piece.mean(axis=0) for piece in (query, *pieces)])
  rows = means - means.mean(axis=0)
  rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
  return rows[1:] @ rows[0]


def spread_excerpts(path, rate: int, most: int = 6) -> list:
  """(start in s, audio mono at `rate`) of excerpts of EXCERPT seconds from one end of a file to the other."""
  with audio_io.AudioReader(path) as reader:
    own = reader.info.sample_rate
    seconds = reader.info.frames / own - 0.1  # a file that promises more than it holds is short by less
    spread = []
    for start in np.linspace(0, seconds - EXCERPT, min(most, int(seconds // EXCERPT))):
      audio = reader.read(start=int(start * own), frames=int(EXCERPT * own), check_finite=True)
      spread.append((float(start), audio_io.resample(audio.mean(axis=0, keepdims=True), from_rate=own, to_rate=rate)))
  return spread


STUDIES = {'generate': new_music, 'continue': continuations, 'similar': alike}


def main(argv) -> dict:
  args = parser().parse_args(argv)
  if args.what != 'similar' and not args.workdir or args.what == 'generate' and not args.latents:
    raise UserError(f'{args.what} needs --workdir' + ' and --latents' * (args.what == 'generate'))
  args.output.mkdir(parents=True, exist_ok=True)
  report = {**STUDIES[args.what](args), 'checkpoint': args.checkpoint, 'seed': args.seed, 'steps': args.steps,
            'guidance': args.guidance, 'temperature': args.temperature}
  files.write_json(args.output / f'{args.what}.json', report)
  return report


if __name__ == '__main__':
  try:
    print(json.dumps(main(sys.argv[1:]), indent=1))
  except UserError as error:
    sys.exit(f'uses: {error}')
