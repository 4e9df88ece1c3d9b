"""Probes: scores against slow twins, tasks from tables, the command on notes made here, the stand-ins' MIDI."""

import dataclasses
import json
import sys
import types

import jax
import mido
import numpy as np
import pytest
from test_codec import load_once, make_snapshot

from launch.research import probe_data
from m2l2 import cli
from m2l2.codec import codec as codec_lib
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation.reports import pictures
from m2l2.evaluation.studies import probes, tasks

RATE = 44100


# ---- scores --------------------------------------------------------------------------------------


def test_tag_scores_equal_their_definitions():
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 6, size=(40, 3)).astype(np.float32)  # with ties
  targets = (rng.random((40, 3)) < .3).astype(np.float32)
  aucs, precisions = [], []
  for score, has in zip(scores.T, targets.T > 0):
    aucs.append(np.mean([(a > b) + .5 * (a == b) for a in score[has] for b in score[~has]]))
    thresholds = sorted(set(score), reverse=True)
    recalls = [0, *(np.mean(score[has] >= t) for t in thresholds)]
    precisions.append(sum((recalls[i + 1] - recalls[i]) * has[score >= t].mean() for i, t in enumerate(thresholds)))
  assert probes.roc_auc(scores, targets) == pytest.approx(np.mean(aucs))
  assert probes.average_precision(scores, targets) == pytest.approx(np.mean(precisions))
  assert probes.roc_auc(targets, targets) == probes.average_precision(targets, targets) == 1
  everywhere = np.concatenate([targets, np.ones((40, 1), np.float32)], axis=1)  # a tag that tells nothing apart
  assert probes.roc_auc(np.pad(scores, ((0, 0), (0, 1))), everywhere) == pytest.approx(np.mean(aucs))
  assert probes.roc_auc(scores[:, :1], targets[:, :1]) == pytest.approx(aucs[0])
  assert probes.average_precision(scores[:, :1], targets[:, :1]) == pytest.approx(precisions[0])
  assert np.isnan(probes.roc_auc(scores, np.ones((40, 3), np.float32)))


@pytest.mark.parametrize('truth, said, score', [
    ('C major', 'C major', 1), ('C major', 'G major', .5), ('C major', 'F major', 0), ('A minor', 'E minor', .5),
    ('C major', 'A minor', .3), ('A minor', 'C major', .3), ('C major', 'C minor', .2), ('D minor', 'D major', .2),
    ('C major', 'D major', 0), ('C major', 'E minor', 0)])
def test_the_weighted_key_score(truth, said, score):
  scores = np.eye(24)[[tasks.KEYS.index(said)]]
  assert probes.key_score(scores, np.array([tasks.KEYS.index(truth)])) == score


@pytest.mark.parametrize('text, key', [
    ('Bb minor', 'A# minor'), ('C', 'C major'), ('F#m', 'F# minor'), ('Cb major', 'B major'), ('d Minor', 'D minor'),
    ('x', ''), ('A dorian', ''), ('', ''), ('H major', '')])
def test_names_of_keys(text, key):
  assert tasks.key_of(text) == key


# ---- the probes ----------------------------------------------------------------------------------


def make_task(kind, targets, splits, classes):
  return tasks.Task(kind, tuple(classes), np.arange(len(targets)), np.array(splits), targets)


def test_probes_learn_what_is_there_and_nothing_else():
  rng = np.random.default_rng(0)
  n = 240
  y = rng.integers(0, 3, n).astype(np.int32)
  splits = np.array(['train', 'train', 'valid', 'test'])[np.arange(n) % 4]
  telling = rng.normal(size=(n, 6)) + 1.2 * np.eye(3)[y] @ rng.normal(size=(3, 6))
  task = make_task('class', y, splits, 'abc')
  linear = probes.run(task, telling.astype(np.float32) * 100, hidden=(), seeds=2)
  blind = probes.run(task, rng.normal(size=(n, 6)).astype(np.float32), hidden=(), seeds=2)
  assert linear['accuracy']['mean'] > .75 > .55 > blind['accuracy']['mean']
  assert 0 < linear['accuracy']['error'] < .1
  tags = make_task('tags', np.float32(np.stack([y == 0, y > 0], axis=1)), splits, 'ab')
  assert probes.run(tags, np.float32(telling), hidden=(16, 8), seeds=1)['roc_auc']['mean'] > .9
  assert probes.majority(task)['accuracy']['mean'] == pytest.approx(
      np.mean(y[splits == 'test'] == np.bincount(y[splits == 'train']).argmax()))
  assert probes.majority(tags)['roc_auc']['mean'] == .5


# ---- labelled music --------------------------------------------------------------------------------


def write_notes(folder):
  """Decaying notes of two synthetic instruments; every third note is for another split."""
  rows, time = [], np.arange(RATE // 10) / RATE
  folder.mkdir()
  for number, (kind, pitch) in enumerate((kind, pitch) for kind in ('soft', 'bright') for pitch in range(48, 84, 3)):
    partials = {'soft': (1,), 'bright': (1, 2, 3, 4, 5)}[kind]
    hertz = 440 * 2 ** ((pitch - 69) / 12)
    note = sum(np.sin(2 * np.pi * hertz * k * time) / len(partials) for k in partials) * np.exp(-4 * time)
    audio_io.write(folder / f'{number}.wav', .5 * np.float32(note)[None], RATE)
    rows.append({'path': f'{number}.wav', 'split': ('train', 'valid', 'test')[pitch // 3 % 3], 'instrument': kind,
                 'key': f'{"C" if kind == "soft" else "D"} major' if number % 2 else '', 'tags': f'all;{kind}'})
  tasks.write_table(folder, rows)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  root = tmp_path_factory.mktemp('probe')
  write_notes(root / 'notes')
  make_snapshot(root / 'model')
  return root


def test_a_table_is_read(place):
  music = tasks.read(str(place / 'notes'))
  assert music.name == 'notes' and len(music.paths) == 24 and list(music.labels) == ['instrument', 'key', 'tags']
  task, warnings = tasks.task(music, 'key')
  assert task.kind == 'key' and len(task.files) == 12 and task.classes == tasks.KEYS and warnings == []
  assert set(task.targets) == {tasks.KEYS.index('C major'), tasks.KEYS.index('D major')}
  task, _ = tasks.task(music, 'tags')
  assert task.classes == ('all', 'bright', 'soft') and task.targets[0].tolist() == [1, 0, 1]
  less, rows = tasks.only(task, np.arange(3, 20))
  assert less.files.tolist() == list(range(3, 20)) and rows.tolist() == list(range(17))
  with pytest.raises(UserError, match='no file for'):
    tasks.only(task, np.array([3]))


@pytest.mark.parametrize('table, message', [
    ('path,split\n1.wav,train\n', 'needs the columns path and split'),
    ('path,split,a\n1.wav,training,x\n', 'line 2: split must be one of train'),
    ('path,split,a\n1.wav,train,x\n1.wav,valid,x\n1.wav,test,x\n', '1 class to train on'),
    ('path,split,a\n1.wav,train,x\n1.wav,train,y\n1.wav,test,x\n', 'no labelled file is for valid'),
    ('path,split,key\n1.wav,train,H\n1.wav,valid,H\n1.wav,test,H\n', "'H' is no key")])
def test_a_bad_table_is_one_line(tmp_path, table, message):
  (tmp_path / 'labels.csv').write_text(table)
  with pytest.raises(UserError, match=message):
    music = tasks.read(str(tmp_path))
    tasks.task(music, next(iter(music.labels)))
  with pytest.raises(UserError, match='no labels.csv there'):
    tasks.read(str(tmp_path / 'none'))


def test_the_command_makes_a_table_with_all_baselines(place, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(codec_lib, 'load', load_once)
  monkeypatch.setattr(probes, 'EPOCHS', 15)
  # Of musicnn itself only the shape, in the width of other features: what it computes, test_frechet.py tells.
  assert probes.musicnn_mean(np.zeros((1, 4410), np.float32), RATE).shape == (200,)
  monkeypatch.setattr(probes, 'musicnn_mean', lambda audio, rate: probes.log_mel_statistics(audio, rate)[:64])
  whole = tasks.read_table  # one task is as good as three, and quicker
  monkeypatch.setattr(tasks, 'read_table', lambda folder: dataclasses.replace(
      whole(folder), labels={'instrument': whole(folder).labels['instrument']}))
  out = tmp_path / 'probe.json'
  assert cli.main(['probe', f'--checkpoint={place}/model', f'--music={place}/notes', f'--output={out}', '--seeds=1',
                   f'--png={tmp_path}/probe.png']) == 0
  report = json.loads(out.read_text())
  assert list(report['tasks']) == ['notes/instrument']
  task = report['tasks']['notes/instrument']
  assert list(task['rows']) == ['model', 'random weights', 'log-mel statistics', 'musicnn', 'majority']
  assert task['files'] == {'train': 8, 'valid': 8, 'test': 8} and task['classes'] == 2
  assert task['rows']['log-mel statistics']['linear']['accuracy']['mean'] > .9
  assert task['rows']['majority']['none']['accuracy']['mean'] == .5
  assert set(task['rows']['model']) == {'linear', 'mlp'}
  said = capsys.readouterr().out
  assert '| random weights | mlp |' in said and '| majority | none | 0.500' in said
  assert (tmp_path / 'probe.png').read_bytes().startswith(b'\x89PNG')
  titles = [axis.get_title() for axis in pictures.bars(probes.bars(report)).axes if axis.get_visible()]
  assert [title.replace('\n', '') for title in titles] == ['notes/instrument, accuracy']


def test_random_weights_say_something_about_the_sound(place):
  codec = load_once(place / 'model')
  random = probes.untrained(codec)
  assert all(np.any(leaf) for leaf, name in zip(jax.tree.leaves(random.params), jax.tree.leaves(
      codec.network.init_names)) if leaf.ndim > 1)
  assert random.fingerprint == 'untrained'


# ---- the real data sets, as stand-ins of their loaders ---------------------------------------------


def track(folder, name, **fields):
  path = folder / name
  path.write_bytes(b'')
  return types.SimpleNamespace(audio_path=str(path), **fields)


def test_data_sets_of_mirdata(tmp_path, monkeypatch):
  notes = {f't{i}': track(tmp_path, f'{i}.wav', split=i, instrument_full=f'Horn {i % 2}', pitch_id=60 + i)
           for i in range(5)}
  songs = {name: track(tmp_path, f'{name}.mp3', key=key)
           for name, key in (('a', ['Bb minor']), ('b', ['C major', 'G major']), ('c', ['x']))}
  songs['gone'] = types.SimpleNamespace(audio_path=str(tmp_path / 'gone.mp3'), key=['C major'])

  def initialize(name, data_home):
    if data_home == 'nowhere':
      raise FileNotFoundError('Did you run .download()?')
    return types.SimpleNamespace(load_tracks=lambda: {'tinysol': notes, 'beatport_key': songs}[name])
  monkeypatch.setitem(sys.modules, 'mirdata', types.SimpleNamespace(initialize=initialize))
  music = tasks.read(f'tinysol:{tmp_path}')
  assert music.splits == ('test', 'valid', 'train', 'train', 'train')
  assert music.labels == {'instrument': ('Horn 0', 'Horn 1', 'Horn 0', 'Horn 1', 'Horn 0'),
                          'pitch_class': ('C', 'C#', 'D', 'D#', 'E')}
  music = tasks.read(f'beatport:{tmp_path}')
  assert music.labels == {'key': ('A# minor', '', '')} and len(music.paths) == 3  # what is not there is left out
  with pytest.raises(UserError, match=r"nowhere: not tinysol as mirdata lays it out.*download"):
    tasks.read('tinysol:nowhere')
  monkeypatch.setitem(sys.modules, 'mirdata', None)
  with pytest.raises(UserError, match=r"pip install 'm2l2\[mir\]'"):
    tasks.read(f'tinysol:{tmp_path}')


def test_magnatagatune(tmp_path, monkeypatch):
  monkeypatch.setattr(tasks, 'TOP_TAGS', 2)
  lines = ['clip_id\tguitar\tslow\trare\tmp3_path', '1\t1\t0\t0\t0/a.mp3', '2\t1\t1\t0\tb/b.mp3', '3\t0\t1\t1\tc/c.mp3',
           '4\t1\t1\t0\tf/d.mp3', '5\t0\t0\t1\t1/e.mp3']
  (tmp_path / 'annotations_final.csv').write_text('\n'.join(lines) + '\n')
  music = tasks.read(f'magnatagatune:{tmp_path}')
  assert music.splits == ('train', 'train', 'valid', 'test')  # 5 has none of the two most frequent tags
  assert music.labels['tags'] == ('guitar', 'guitar;slow', 'slow', 'guitar;slow')
  assert music.paths[0] == str(tmp_path / '0' / 'a.mp3')
  with pytest.raises(UserError, match='annotations_final.csv: not there'):
    tasks.read(f'magnatagatune:{tmp_path}/none')


# ---- the stand-ins' MIDI; a stand-in for fluidsynth plays sines ------------------------------------


def song(path, key):
  head = mido.MidiTrack([mido.MetaMessage('key_signature', key=key), mido.MetaMessage('set_tempo', tempo=250000)])
  notes = mido.MidiTrack([mido.Message('program_change', program=5)])
  for note in (60, 64, 67):
    notes += [mido.Message('note_on', note=note, time=0), mido.Message('note_off', note=note, time=960)]
  notes += [mido.Message('note_on', note=36, channel=9, time=0), mido.Message('note_off', note=36, channel=9, time=96)]
  mido.MidiFile(ticks_per_beat=480, tracks=[head, notes]).save(path)


def test_excerpts_of_midi_are_moved_in_pitch_and_time(tmp_path):
  song(tmp_path / 'a.mid', 'F#m')
  assert probe_data.stated_key(tmp_path / 'a.mid') == 'F# minor'
  moved = probe_data.excerpt(mido.MidiFile(tmp_path / 'a.mid'), start=.4, seconds=2., semitones=-5)
  now, heard = 0., []
  for message in moved:
    now += message.time
    heard.append((message.type, getattr(message, 'note', None), round(now, 3)))
  assert heard[:6] == [('program_change', None, 0), ('note_off', 55, .1), ('note_on', 59, .1), ('note_off', 59, .6),
                       ('note_on', 62, .6), ('note_off', 62, 1.1)]
  assert heard[6][:2] == ('note_on', 36)  # drums stay
  (tmp_path / 'bad.mid').write_bytes(b'MThd')
  assert probe_data.stated_key(tmp_path / 'bad.mid') == ''


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
  """Places of soundfonts, songs and music; rendering is a sound as long as the MIDI."""
  (tmp_path / 'midi').mkdir()
  for number in range(5):
    song(tmp_path / 'midi' / f'{number}.mid', 'C')
  for name in ('a.sf2', 'b.sf2'):
    (tmp_path / name).write_bytes(b'')
  for name in range(40):
    folder = tmp_path / 'music' / ('game' if name % 2 else 'album')
    folder.mkdir(parents=True, exist_ok=True)
    audio_io.write(folder / f'{name}.wav', np.zeros((1, 10), np.float32), RATE)
  monkeypatch.setattr(probe_data, 'render', lambda midi, font: np.zeros((1, int(midi.length * 1000)), np.float32))
  monkeypatch.setattr(probe_data.shutil, 'which', lambda name: name)
  monkeypatch.setattr(probe_data, 'RATE', 1000)
  monkeypatch.setattr(probe_data, 'PITCHES', range(48, 53))
  return [f'--output={tmp_path}/out', f'--soundfonts={tmp_path}/a.sf2,{tmp_path}/b.sf2', f'--midi={tmp_path}/midi',
          f'--music={tmp_path}/music']


def test_stand_ins_are_labelled_and_split(stand_ins, tmp_path, capsys):
  probe_data.main(stand_ins)
  notes, keys, tags = (tasks.read(str(tmp_path / 'out' / name)) for name in ('notes', 'keys', 'tags'))
  assert len(notes.paths) == 2 * 8 * 5 * 2 and notes.splits.count('test') == 80 and notes.splits.count('valid') == 16
  assert {audio_io.info(path).seconds for path in notes.paths} == {probe_data.NOTE_SECONDS}
  assert notes.labels['pitch_class'][:4] == ('C', 'C', 'C#', 'C#')
  assert len(keys.paths) == 5 * 12 * 2 and set(keys.labels['key']) == {f'{c} major' for c in tasks.PITCH_CLASSES}
  by_song = {}
  for path, split in zip(keys.paths, keys.splits):
    by_song.setdefault(path.rpartition('/')[2][0], set()).add(split)
  assert all(len(splits) == 1 for splits in by_song.values()) and set.union(*by_song.values()) == set(tasks.SPLITS)
  assert len(tags.paths) == 40 and set(tags.labels['tags']) == {'game', 'album'}
  assert set(tags.splits) == set(tasks.SPLITS)
  assert all(audio_io.info(path).frames == 10 for path in tags.paths)
  capsys.readouterr()
  probe_data.main(stand_ins)
  assert capsys.readouterr().out.splitlines()[1] == f'{tmp_path}/out/keys: 120 files'


@pytest.mark.parametrize('option, message', [
    ('--only=chords', "no 'chords': pick from notes, keys, tags"), ('--soundfonts=none.sf2,other.sf2', 'apt install'),
    ('--midi=none', '0 MIDI files there state one key')])
def test_what_is_missing_is_told_with_its_cure(stand_ins, tmp_path, option, message):
  with pytest.raises(UserError, match=message):
    probe_data.main([*stand_ins, option, *([] if 'only' in option else ['--only=keys'])])
  assert not (tmp_path / 'out' / 'keys').exists()
