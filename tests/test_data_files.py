"""Which files are found, in which order."""

import os

import pytest

from m2l2.data.sources import find_audio_files
from m2l2.errors import UserError


def touch(root, *names):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'')


def test_order_depends_on_relative_names_alone(tmp_path):
  names = ['b/2.flac', 'a.wav', 'b/1.OGG', 'B/x.Mp3', 'a/z.opus', 'c.aif', 'd.aiff', 'e.oga',
           'b.wav', 'ä.wav']
  touch(tmp_path / 'one', *names)
  touch(tmp_path / 'longer' / 'root', *reversed(names))
  touch(tmp_path / 'one', 'notes.txt', '.hidden.wav', '.git/x.wav', '._a.wav', 'cover.jpg')
  first = find_audio_files(tmp_path / 'one')
  two = find_audio_files(str(tmp_path / 'longer' / 'root') + '/')
  assert first.names == two.names == tuple(sorted(names)) and len(first) == 10
  assert first.fingerprint == two.fingerprint
  assert all(os.path.isfile(first.path(i)) for i in range(10))
  touch(tmp_path / 'one', 'new.wav')
  assert find_audio_files(tmp_path / 'one').fingerprint != first.fingerprint


def test_globs_and_single_files(tmp_path, monkeypatch):
  touch(tmp_path, 'x/1/a.wav', 'x/2/a.wav', 'x/2/b.mp3', 'x/2/b.txt', 'y [live]/c.wav')
  assert find_audio_files(tmp_path / 'x/*/a.wav').names == ('1/a.wav', '2/a.wav')
  assert find_audio_files(tmp_path / '**').names == (
      'x/1/a.wav', 'x/2/a.wav', 'x/2/b.mp3', 'y [live]/c.wav')
  single = find_audio_files(tmp_path / 'x/2/b.mp3')
  assert single.names == ('b.mp3',) and single.path(0) == str(tmp_path / 'x/2/b.mp3')
  # A directory whose name looks like a glob is that directory.
  assert find_audio_files(tmp_path / 'y [live]').names == ('c.wav',)
  monkeypatch.chdir(tmp_path / 'x')
  assert find_audio_files('2').path(0) == '2/a.wav'
  assert find_audio_files('*/b.mp3').names == ('2/b.mp3',)
  assert find_audio_files('.').names == ('1/a.wav', '2/a.wav', '2/b.mp3')
  monkeypatch.chdir(tmp_path / 'x/2')
  assert find_audio_files('a.wav').path(0) == 'a.wav'
  monkeypatch.setenv('HOME', str(tmp_path))
  assert find_audio_files('~/x').names == ('1/a.wav', '2/a.wav', '2/b.mp3')


def test_links(tmp_path):
  touch(tmp_path, 'music/a.wav', 'elsewhere/b.wav', 'far.wav')
  (tmp_path / 'music/loop').symlink_to(tmp_path / 'music')
  (tmp_path / 'music/more').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'elsewhere/back').symlink_to(tmp_path / 'music')
  (tmp_path / 'music/far.wav').symlink_to(tmp_path / 'far.wav')
  (tmp_path / 'music/dangling.wav').symlink_to(tmp_path / 'nothing.wav')
  assert find_audio_files(tmp_path / 'music').names == ('a.wav', 'far.wav', 'more/b.wav')


def test_nothing_there(tmp_path):
  touch(tmp_path, 'docs/readme.txt')
  for root in (tmp_path / 'missing', tmp_path / 'docs', tmp_path / 'docs/*.wav',
               tmp_path / 'docs/readme.txt', ''):
    with pytest.raises(UserError) as error:
      find_audio_files(root)
    assert '\n' not in str(error.value) and str(root) in str(error.value)
