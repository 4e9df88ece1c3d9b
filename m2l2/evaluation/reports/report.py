"""Reports of `evaluate`: a table for the terminal, CSV, and a page of HTML that needs no other file."""

import base64
from collections.abc import Mapping
import csv
import html
import io
import json

from matplotlib.figure import Figure
import numpy as np

from m2l2 import files
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.evaluation.evaluate import load_pair
from m2l2.evaluation.metrics import registry
from m2l2.evaluation.reports import pictures

PAGE_FILES = 6  # with spectrograms and players, by default
EXCERPT_SECONDS = 10.
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
PLOTTED_FILES = 10  # for fewer, the table of files is enough
_STYLE = '''
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } th small { font-weight: normal; color: #555 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem } dd { margin: 0; overflow-wrap: anywhere }
img { max-width: 100% } li { color: #a00 } .scroll { overflow-x: auto } .credits { white-space: pre-wrap }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem } .pair audio { width: 100% }
.pair button { grid-column: 1 / -1; justify-self: start; font: inherit }
'''
# One player of a file plays at a time; starting another continues at the same place.
_SCRIPT = '''
for (const pair of document.querySelectorAll('.pair')) {
  const players = [...pair.querySelectorAll('audio')];
  let current = 0;
  players.forEach((player, i) => player.addEventListener('play', () => {
    if (i === current) return;
    const other = players[current];
    current = i;
    player.currentTime = other.currentTime;
    other.pause();
  }));
  pair.querySelector('button').addEventListener('click', () => players[(current + 1) % players.length].play());
}
'''


def table(report) -> list[tuple[str, ...]]:
  """Rows (name, value, values of report['beside'], pairs or clips) of all means and distances.

  A value over other numbers of pairs or clips than the first has that number behind it.
  """
  reports = [report, *report.get('beside', {}).values()]

  def told(each, first, value, spread, count):
    if not each:
      return '-'
    over = '' if count(each) == count(first) else f' (n={count(each)})'
    return f'{each[value]:.4g}' + ('' if each[spread] is None else f' +- {each[spread]:.3g}') + over

  rows = []
  for name, metric in report['metrics'].items():
    count = lambda metric: len(metric['per_file'])
    rows.append((name, *(told(each['metrics'].get(name), metric, 'mean', 'sem', count) for each in reports),
                 str(count(metric))))
  for name, distance in report['frechet'].items():
    clips = lambda distance: distance['clips']
    rows.append((f'frechet {name}', *(told(each['frechet'].get(name), distance, 'value', 'bootstrap_sd', clips)
                                      for each in reports), str(clips(distance))))
  return rows


def write_json(path, report):
  files.write_text(path, json.dumps(report, indent=2, allow_nan=False) + '\n')


def write_csv(path, report):
  """One row per file, one column per metric; empty if undefined for the pair."""
  metrics = report['metrics']
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['file', *metrics])
  for file in _files(report):
    writer.writerow([file, *(metric['per_file'].get(file, '') for metric in metrics.values())])
  files.write_text(path, text.getvalue())


def write_html(path, report, items, *, beside: Mapping[str, list] | None = None, title: str = 'm2l2 evaluate',
               about: Mapping[str, str] | None = None, credits: str = '', players: int = PAGE_FILES,
               small: bool = False):
  """Writes the page: tables, plots of the metrics over the files if there are PLOTTED_FILES or more, and spectrograms
  and players of some files.

  Args:
    items: the `evaluate.Pair`s of the report.
    beside: the pairs of each of report['beside'], by name.
    about: what made the page, by name: {'command': 'm2l2 evaluate ...', 'date': ...}.
    credits: plain text about the audio, such as its licence, shown at the end.
    players: how many files get spectrograms and players, at most.
    small: with MP3 and JPEG, in a fifth of the bytes of FLAC and PNG.
  """
  beside = beside or {}
  shown = _from_best_to_worst(report, items, players)
  estimates = {name: {item.name: item for item in _readable(others)} for name, others in beside.items()}
  facts = {**(about or {}), 'pairs': str(report['pairs'])}
  body = [f'<h1>{html.escape(title)}</h1>',
          f'<dl>{"".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())}</dl>',
          _html_table(('metric', 'unit', 'which values are good', 'mean +- standard error (Frechet: bootstrap sd)',
                       *beside, 'pairs'),
                      [(name, *_unit_and_good(name), value, *others, count) for name, value, *others, count
                       in table(report)])]
  if report['warnings']:
    lines = ''.join(f'<li>{html.escape(line)}</li>' for line in report['warnings'])
    body.append(f'<h2>Warnings</h2><ul>{lines}</ul>')
  if report['metrics'] and report['pairs'] >= PLOTTED_FILES:
    body.append(f'<h2>Over the files</h2>{_image(_plot_metrics(report), "every metric over the files")}')
  low, high = pictures.DB
  body.append(f'<h2>Listen</h2><p>At most {players} files, from best to worst by {_ranking(report)}; up to '
              f'{EXCERPT_SECONDS:.0f} s of each. Starting one player stops the other and continues at the same place. '
              f'Spectrograms: log-mel, colours from {low} dB (dark) to {high} dB.</p>')
  body += [_listen(item, {name: others[item.name] for name, others in estimates.items() if item.name in others}, small)
           for item in shown]
  names = list(report['metrics'])
  values = {name: report['metrics'][name]['per_file'] for name in names}
  rows = [(file, *(f'{values[name][file]:.4g}' if file in values[name] else '-' for name in names))
          for file in _files(report)]
  head = ('file', *(f'{name} ({", ".join(filter(None, _unit_and_good(name)))})' for name in names))
  body.append(f'<h2>Files</h2><div class="scroll">{_html_table(head, rows)}</div>')
  if credits:
    body.append(f'<h2>Credits</h2><p class="credits">{html.escape(credits.strip())}</p>')
  files.write_text(path, f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
               f'<style>{_STYLE}</style><body>{"".join(body)}<script>{_SCRIPT}</script></body></html>\n')


def _files(report) -> list[str]:
  """Every file that has a metric, in their order."""
  return list(dict.fromkeys(file for metric in report['metrics'].values() for file in metric['per_file']))


def _from_best_to_worst(report, items, most):
  """Up to `most` pairs, evenly over the ranking by the mel distance (or the first metric, without it)."""
  if not report['metrics']:
    return _readable(items)[:most]
  name = _ranking(report)
  values = report['metrics'][name]['per_file']
  measured = sorted((item for item in items if item.name in values),
                    key=lambda item: registry.badness(name, values[item.name]))
  picks = np.unique(np.linspace(0, len(measured) - 1, most).round().astype(int))
  return [measured[i] for i in picks]


def _readable(items) -> list:
  """Without the pairs that cannot be compared, of which the report warns."""
  def is_readable(item):
    try:
      load_pair(item, check=False)
    except UserError:
      return False
    return True
  return list(filter(is_readable, items))


def _ranking(report) -> str:
  return 'mel_l1_db' if 'mel_l1_db' in report['metrics'] else next(iter(report['metrics']), 'name')


def _unit_and_good(name) -> tuple[str, str]:
  """The unit of a metric or a distance ('' without one), and which of its values are good, in words."""
  if name in registry.METRICS:
    return registry.METRICS[name].unit, registry.good_values(registry.METRICS[name].better)
  return '', registry.good_values(registry.LOWER)  # a Frechet distance


def _html_table(head, rows) -> str:
  def row(cells, tag):
    return f'<tr>{"".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)}</tr>'
  return f'<table>{row(head, "th")}{"".join(row(cells, "td") for cells in rows)}</table>'


def _listen(item, others, small) -> str:
  """The reference, the estimate, and those of `others` (name -> pair with the same reference)."""
  loaded = load_pair(item, check=False)
  rate, length = loaded.sample_rate, int(EXCERPT_SECONDS * loaded.sample_rate)
  sides = {'reference': loaded.reference, 'estimate': loaded.estimate}
  sides |= {name: load_pair(other, check=False).estimate for name, other in others.items()}
  cells = ''.join(
      f'<div>{html.escape(name)}<br><audio controls src="{_sound(audio[:, :length], rate, small)}"></audio>'
      f'{_image(_plot_spectrogram(audio[:, :length], rate), f"spectrogram: {name}", small)}</div>'
      for name, audio in sides.items())
  return (f'<h3>{html.escape(item.name)}</h3><div class="pair">{cells}'
          '<button type="button">Switch to the next player</button></div>')


def _sound(audio, sample_rate, small) -> str:
  if small and (sample_rate not in MP3_RATES or len(audio) > 2):
    audio = audio_io.resample(audio[:2], from_rate=sample_rate, to_rate=48000)
    sample_rate = 48000
  data = audio_io.file_bytes(np.clip(audio, -1, 1), sample_rate, kind='MP3' if small else 'FLAC')
  return f'data:audio/{"mpeg" if small else "flac"};base64,{base64.b64encode(data).decode()}'


def _image(figure, description, small=False) -> str:
  kind, file = 'jpeg' if small else 'png', io.BytesIO()
  figure.savefig(file, format=kind, dpi=100)
  data = base64.b64encode(file.getvalue()).decode()
  return f'<img alt="{html.escape(description)}" src="data:image/{kind};base64,{data}">'


def _plot_spectrogram(audio, sample_rate):
  figure = Figure(figsize=(5.2, 2.6), layout='constrained')
  axes = figure.subplots()
  pictures.draw_spectrogram(axes, audio, sample_rate, top=sample_rate / 2)
  axes.set_xlabel('seconds')
  return figure


def _plot_metrics(report):
  """A panel per metric: the files' values, sorted, and their mean."""
  metrics = report['metrics']
  figure, panels = pictures.grid(len(metrics), columns=3, height=2.2)
  for panel, (name, metric) in zip(panels, metrics.items(), strict=True):
    values = sorted(metric['per_file'].values(), key=lambda value: registry.badness(name, value))
    panel.plot(np.arange(1, len(values) + 1), values, 'o-', markersize=3, linewidth=1)
    panel.axhline(metric['mean'], color='0.6', linewidth=1)
    panel.set_title(f'{name}, mean {metric["mean"]:.3g}', fontsize=9)
    panel.set_ylabel(registry.METRICS[name].unit if name in registry.METRICS else '', fontsize=7)
    panel.tick_params(labelsize=7)
  figure.supxlabel('files, best to worst', fontsize=8)
  return figure
