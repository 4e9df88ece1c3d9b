"""What launch/research/uses.py measures, on sounds and makers whose answers are known."""

import types

import numpy as np
import pytest
import soundfile

from launch.research import uses
from m2l2.errors import UserError

RATE = 8000


class Levels:
  """A codec whose chunks of 1.5 s are the level and the pitch of a sine, and that decodes to them."""
  native_rates, fingerprint = (RATE,), 'levels'
  representation = types.SimpleNamespace(chunk_samples=12000)

  def encode(self, audio, rate):
    chunks = [audio[0, i:i + 12000] for i in range(0, audio.shape[1], 12000)]
    z = [[np.abs(x).mean(), np.mean(np.diff(np.signbit(x)))] for x in chunks]
    return types.SimpleNamespace(z=np.float32(z)[None, :, None])

  def features(self, latents):
    return latents.z[0, :, 0]

  def layout(self, samples, rate):
    return types.SimpleNamespace(chunks=-(-samples // 12000))

  def most_samples(self, chunks, rate):
    return 12000 * chunks

  def decode(self, latents, seed, refine):
    return np.repeat(latents.z[0, :, 0].T, 12000, axis=1)[:, :latents.num_samples]  # level and pitch as two channels


@pytest.fixture
def place(tmp_path, monkeypatch):
  """Four files of 40 s, each a tone of its own, a list of an excerpt each, and stand-ins for what is measured with."""
  lines = []
  for number, hz in enumerate((100, 300, 800, 2000)):
    sine = np.sin(2 * np.pi * hz * np.arange(40 * RATE) / RATE) * (0.2 + 0.2 * number)
    soundfile.write(tmp_path / f'{number}.wav', sine, RATE)
    lines.append(f'15\t{number}.wav')
  (tmp_path / 'list.txt').write_text('\n'.join(lines))
  monkeypatch.setattr(uses, 'load', lambda name: Levels())
  monkeypatch.setattr(uses, 'make_embedder', lambda name: lambda audio, sample_rate: audio[:, ::4000].T)
  return tmp_path


def arguments(place, what):
  return [what, f'--music={place}', f'--excerpts={place / "list.txt"}', f'--output={place / "out"}', '--workdir=w']


def test_a_track_is_found_by_its_tone(place):
  report = uses.main(arguments(place, 'similar'))
  assert report['tracks'] == report['excerpts'] == 4 and report['pool'] == 12  # of 40 s three do not overlap
  assert all(figure['mean'] == 1 for figure in report['systems']['mean latents'].values())
  assert (place / 'out' / 'similar.json').is_file()


def test_who_goes_on_rightly_is_nearer_to_its_own_end(place, monkeypatch):
  class Oracle:
    def sample(self, chunks, *, count, seed, prefix, steps, guidance, temperature):
      assert prefix.shape == (4, uses.GIVEN, 1, 2) and count == 4
      return prefix[self.order, -1:].repeat(chunks, axis=1)

  monkeypatch.setattr(uses.generate, 'load', lambda workdir: Oracle())
  for order, right in (([0, 1, 2, 3], True), ([1, 2, 3, 0], False)):
    Oracle.order = order
    systems = uses.main(arguments(place, 'continue'))['systems']
    assert (systems['generated']['own less others']['high'] < 0) == right
    assert systems['its first chunks again']['own less others']['high'] < 0


def test_normal_chunks_have_the_corpus_mean_and_covariance():
  rng = np.random.default_rng(0)
  corpus = 0.1 * rng.standard_normal((50, 6, 4)) @ rng.standard_normal((4, 4)) + np.array([.1, 0, -.1, .2])
  drawn = uses.normal_chunks(corpus.reshape(50, 6, 2, 2), (2000, 6), rng).reshape(-1, 4)
  np.testing.assert_allclose(drawn.mean(axis=0), corpus.reshape(-1, 4).mean(axis=0), atol=0.02)
  np.testing.assert_allclose(np.cov(drawn.T), np.cov(corpus.reshape(-1, 4).T), atol=0.02)


def test_mistakes_are_told(place):
  with pytest.raises(UserError, match='generate needs --workdir and --latents'):
    uses.main(['generate', f'--output={place}'])
  with pytest.raises(UserError, match='continue needs --workdir'):
    uses.main(['continue', f'--output={place}'])
