"""launch/get_music.sh, with stand-ins for apt-get and dpkg-deb that serve packages made here."""

import os
import pathlib
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import soundfile

SCRIPT = pathlib.Path(__file__).parent.parent / 'launch' / 'get_music.sh'

APT_GET = '''#!/bin/sh
echo "$@" >> "$PACKAGES/calls"
for last; do :; done
case "$*" in
  *update*) exit 0 ;;
  *) [ -f "$PACKAGES/$last.tar" ] || { echo "E: Unable to locate $last"; exit 100; }
     cp "$PACKAGES/$last.tar" "$last.deb" ;;
esac
'''
DPKG_DEB = '''#!/bin/sh
mkdir "$3" && tar -xf "$2" -C "$3"
'''


def run(*options, path=None, packages=None):
  environment = dict(os.environ, PACKAGES=str(packages))
  if path is not None:
    environment['PATH'] = f'{path}:{environment["PATH"]}'
  return subprocess.run(['bash', SCRIPT, *options], env=environment, text=True,
                        capture_output=True, check=False)


def write_tone(path, *, seconds, sample_rate=44100):
  path.parent.mkdir(parents=True, exist_ok=True)
  time = np.arange(seconds * sample_rate) / sample_rate
  tone = (.2 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
  with soundfile.SoundFile(path, 'w', sample_rate, 1, format='OGG', subtype='VORBIS') as file:
    for start in range(0, len(tone), 4096):
      file.write(tone[start:start + 4096])


def pack(folder, name):
  with tarfile.open(folder.parent / f'{name}.tar', 'w') as archive:
    archive.add(folder, arcname='.')


@pytest.fixture
def packages(tmp_path):
  """A folder with two packages and the stand-in commands in bin/."""
  folder = tmp_path / 'packages'
  plain = folder / 'wesnoth'
  music = plain / 'usr/share/games/wesnoth/music'
  write_tone(music / 'long.ogg', seconds=21)
  write_tone(music / 'sad/also-long.ogg', seconds=25, sample_rate=48000)
  write_tone(music / 'short.ogg', seconds=3)
  write_tone(music / 'poor.ogg', seconds=21, sample_rate=11025)
  (music / 'license.txt').write_text('free')
  (music / 'map.txt').write_text('no music')
  (music / 'broken.ogg').write_bytes(b'OggS')
  documents = plain / 'usr/share/doc/wesnoth-1.16-music'
  documents.mkdir(parents=True)
  (documents / 'copyright').write_text('GPL-2+')
  pack(plain, 'wesnoth-1.16-music')

  zipped = folder / 'ufoai'
  (zipped / 'usr/share/doc/ufoai-music').mkdir(parents=True)
  (zipped / 'usr/share/doc/ufoai-music/copyright').write_text('CC BY 3.0')
  (zipped / 'usr/share/games/base').mkdir(parents=True)
  with zipfile.ZipFile(zipped / 'usr/share/games/base/0music.pk3', 'w') as archive:
    archive.write(music / 'long.ogg', 'music/theme.ogg')
    archive.write(music / 'short.ogg', 'music/hit.ogg')
  pack(zipped, 'ufoai-music')

  (folder / 'bin').mkdir()
  for name, text in (('apt-get', APT_GET), ('dpkg-deb', DPKG_DEB)):
    (folder / 'bin' / name).write_text(text)
    (folder / 'bin' / name).chmod(0o755)
  return folder


def test_help_shows_an_example():
  done = run('--help')
  assert done.returncode == 0 and 'Example: launch/get_music.sh' in done.stdout


@pytest.mark.parametrize('option, message', [
    ('--everything', "unknown option '--everything'"),
    ('train', "unknown option 'train'"),
    ('--only=', "unknown option '--only='"),
    ('--only=train,chess-music', "no package 'chess-music'"),
])
def test_bad_options_end_with_one_line(option, message):
  done = run(option)
  assert done.returncode == 1 and done.stdout == ''
  assert done.stderr.startswith(f'get_music: {message}') and done.stderr.count('\n') == 1


def test_output_that_is_a_file_is_refused(tmp_path, packages):
  (tmp_path / 'file').write_text('')
  done = run(f'--output={tmp_path}/file', path=packages / 'bin', packages=packages)
  assert done.returncode == 1 and 'cannot write to' in done.stderr
  assert done.stderr.count('\n') == 1


def test_only_the_music_and_its_licences_are_kept(tmp_path, packages):
  output = tmp_path / 'music'
  done = run('--only=wesnoth-1.16-music,ufoai-music', f'--output={output}',
             path=packages / 'bin', packages=packages)
  assert done.returncode == 0, done.stderr
  files = {path.relative_to(output).as_posix() for path in output.rglob('*') if path.is_file()}
  assert files == {
      'train/wesnoth-1.16-music/long.ogg', 'train/wesnoth-1.16-music/sad/also-long.ogg',
      'train/ufoai-music/theme.ogg',
      'licences/wesnoth-1.16-music/copyright', 'licences/wesnoth-1.16-music/license.txt',
      'licences/ufoai-music/copyright'}
  assert 'wesnoth-1.16-music: 2 tracks, 0.01 hours' in done.stdout
  assert 'warning: ufoai-music has 0.006 hours where 4.00 were expected' in done.stderr
  assert {path.name for path in output.iterdir()} == {'train', 'licences'}


def test_what_is_there_is_not_fetched_again_and_failures_are_named(tmp_path, packages):
  output = tmp_path / 'music'
  options = ('--only=wesnoth-1.16-music,nexuiz-music', f'--output={output}')
  first = run(*options, path=packages / 'bin', packages=packages)
  assert first.returncode == 1
  assert 'cannot fetch nexuiz-music: E: Unable to locate nexuiz-music' in first.stderr
  assert first.stderr.splitlines()[-1].startswith('get_music: 1 not fetched: nexuiz-music;')
  assert {path.name for path in output.iterdir()} == {'train', 'licences'}

  (packages / 'ufoai-music.tar').rename(packages / 'nexuiz-music.tar')
  (packages / 'calls').unlink()
  second = run(*options, path=packages / 'bin', packages=packages)
  assert second.returncode == 1
  assert 'cannot unpack nexuiz-music' in second.stderr  # its licence lies under another name
  calls = (packages / 'calls').read_text()
  assert 'nexuiz-music' in calls and 'wesnoth' not in calls
