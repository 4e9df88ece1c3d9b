"""Pictures of sounds, latents and runs, as matplotlib figures: a notebook shows them, `save` writes them.

Figures are made without pyplot, so that nothing is global and no backend is chosen here.
"""

from pathlib import Path

from matplotlib.figure import Figure
import numpy as np

from m2l2 import files
from m2l2.codec.latents import Latents
from m2l2.errors import UserError
from m2l2.evaluation.embedders.embeddings import EMBEDDINGS
from m2l2.evaluation.metrics.pairs import log_mel_db, mel_edges

# The figures that show whether a run learns: m2l2/training/README.md.
CURVES = ('loss', 'probe_ema/swap', 'latent/saturated', 'latent/spread')
WIDTH = 11  # inches
HZ = (200, 500, 1000, 2000, 5000, 10_000)  # frequencies that spectrograms label
DB = (-70, 20)  # range of the colours of spectrograms


def spectrograms(sounds) -> Figure:
  """Log-mel spectrograms under each other, up to half of the highest rate, all on one scale from -70 to 20 dB.

  Args:
    sounds: {title: (float [channels, samples], sample rate in Hz)}.
  """
  figure, axes = _panels(rows=len(sounds), height=2.3)
  top = max(rate for _, rate in sounds.values()) / 2
  for axis, (title, (audio, rate)) in zip(axes, sounds.items(), strict=True):
    draw_spectrogram(axis, audio, rate, top=top)
    axis.set_title(title, fontsize=10)
  axes[-1].set_xlabel('seconds')
  return figure


def draw_spectrogram(axis, audio, sample_rate: int, *, top: float):
  """Draws a log-mel spectrogram, coloured from DB[0] to DB[1] dB, its rows labelled in Hz up to `top`.

  Args:
    axis: of matplotlib. audio: float [channels, samples].
  """
  edges = mel_edges()
  band = lambda hz: np.interp(hz, edges, np.arange(len(edges)) - .5)  # a band's peak is in the middle of its row
  low, high = DB
  axis.imshow(log_mel_db(audio, sample_rate=sample_rate), origin='lower', aspect='auto', vmin=low, vmax=high,
              cmap='magma', extent=(0, audio.shape[1] / sample_rate, 0, 128))
  axis.set_ylim(0, min(band(top), 128))
  axis.set_yticks(band([hz for hz in HZ if hz <= top]), [f'{hz:,}' for hz in HZ if hz <= top])
  axis.set_ylabel('Hz')


def latent_map(latents: Latents, *, stream: int = 0) -> Figure:
  """One stream of latents: a column is a chunk, a block of rows is an embedding; tokens by their number."""
  z = latents.z[stream]
  chunks, embeddings = z.shape[:2]
  figure, (axis,) = _panels(rows=1, height=4)
  rows = z.reshape(chunks, -1).T
  scale = dict(vmin=-1, vmax=1, cmap='RdBu') if z.ndim == 3 else dict(cmap='viridis')
  image = axis.imshow(rows, aspect='auto', interpolation='nearest', extent=(0, chunks, embeddings, 0), **scale)
  for border in range(1, embeddings):
    axis.axhline(border, color='black', linewidth=1.5)
  axis.set_yticks(np.arange(embeddings) + .5, range(embeddings))
  axis.set_ylabel('embedding')
  axis.set_xlabel('chunk')
  figure.colorbar(image, ax=axis)
  return figure


def curves(workdir, names=CURVES) -> Figure:
  """Curves of a run over its steps, read from its metrics.jsonl; empty before the first line.

  Raises UserError: the workdir has no metrics.jsonl.
  """
  lines = read_metrics(workdir)
  figure, axes = _panels(columns=len(names), height=2.6)
  for axis, name in zip(axes, names, strict=True):
    points = [(line['step'], line[name]) for line in lines if line.get(name) is not None]
    axis.plot(*zip(*points) if points else ((), ()), marker='.', markersize=3)
    axis.set_title(name, fontsize=10)
    axis.set_xlabel('step')
  return figure


def read_metrics(workdir) -> list[dict]:
  """The lines of a workdir's metrics.jsonl; a line that is still being written is left out.

  Raises UserError: there is no such file.
  """
  path = Path(workdir) / 'metrics.jsonl'
  if not path.is_file():
    raise UserError(f'{workdir}: no metrics.jsonl there: it is not the workdir of a run, or its run has not begun')
  return list(files.read_json_lines(path))


def change_map(change, *, seconds: float) -> Figure:
  """What each embedding contributes, over frequency (left) and over time (right): mean |change| in dB.

  Args:
    change: float [K, mel bands, frames], of `edits.carried`.
    seconds: length of the sound.
  """
  size = np.abs(change)
  embeddings, bands, _ = size.shape
  over_bands, over_frames = size.mean(axis=2), size.mean(axis=1)
  figure, axes = _panels(columns=2, height=3)
  for axis, rows, end, label in ((axes[0], over_bands, bands, 'mel band'), (axes[1], over_frames, seconds, 'seconds')):
    image = axis.imshow(rows, aspect='auto', interpolation='nearest', cmap='magma', vmin=0,
                        extent=(0, end, embeddings, 0))
    axis.set_yticks(np.arange(embeddings) + .5, range(embeddings))
    axis.set_xlabel(label)
    figure.colorbar(image, ax=axis, label='dB')
  axes[0].set_ylabel('embedding')
  return figure


def sweep_curves(report) -> Figure:
  """The results of `sweep.sweep` against sigma_cond: a panel per metric, a curve per way of decoding, with errors.

  A ring marks the best setting.
  """
  settings, best = report['settings'], report['best']
  names = list(dict.fromkeys(name for setting in settings for name in setting['values']))
  figure, axes = grid(len(names), columns=3, height=3)
  for axis, name in zip(axes, names):
    for steps in dict.fromkeys(setting['steps'] for setting in settings):
      points = [(setting['sigma_cond'], setting['values'][name]) for setting in settings
                if setting['steps'] == steps and name in setting['values']]
      axis.errorbar([x for x, _ in points], [y['mean'] for _, y in points], [y['error'] or 0 for _, y in points],
                    marker='.', capsize=2, label=steps.replace('_', ' '))
    if name == best['by']:
      axis.plot(best['sigma_cond'], best['value'], 'o', markersize=12, markerfacecolor='none', color='black')
    axis.set_xscale('log')
    axis.set_title(name if name not in EMBEDDINGS else f'Frechet distance, {name}', fontsize=10)
    axis.set_xlabel('sigma_cond')
  axes[0].legend(fontsize=8)
  return figure


def learning_curves(runs) -> Figure:
  """The results of runs against their cost: above over hours of audio seen, below over PFLOP.

  Args:
    runs: {name: [{'hours': x, 'pflop': y, metric: value, ...}, ...]}, in order; all have the same metrics.
  """
  names = [name for name in next(iter(runs.values()))[0] if name not in ('hours', 'pflop')]
  figure, axes = _panels(rows=2, columns=len(names), height=2.6)
  for row, (cost, unit) in enumerate((('hours', 'hours of audio'), ('pflop', 'PFLOP'))):
    for axis, name in zip(axes[row * len(names):], names):
      for label, points in runs.items():
        axis.plot([point[cost] for point in points], [point[name] for point in points], marker='.', label=label)
      axis.set_title(name, fontsize=10)
      axis.set_xlabel(unit)
  axes[0].legend(fontsize=8)
  return figure


def snapshots(points, bounds) -> Figure:
  """Quality of the snapshots of a run against its cost in PFLOP, of one step and of two.

  Args:
    points: a mapping per snapshot: 'pflop', 'coherence', 'fd', 'mel_l1_db', of two steps with a 2 behind, and 'swap'.
    bounds: the same of exact magnitudes with phases of noise, dashed, and 'coherence_reference' of the originals,
      dotted.
  """
  cost = [point['pflop'] for point in points]
  figure, axes = grid(4, columns=4, height=3)
  for axis, name in zip(axes, ('coherence', 'fd', 'mel_l1_db', 'swap'), strict=True):
    for key, label in ((name, 'one step'), (f'{name}2', 'two steps')):
      if key in points[0]:
        axis.plot(cost, [point[key] for point in points], marker='.', label=label)
    if name in bounds:
      axis.axhline(bounds[name], color='0.5', linestyle='dashed', label='phases of noise')
    if name == 'coherence':
      axis.axhline(bounds['coherence_reference'], color='0.5', linestyle='dotted', label='originals')
      axis.set_ylim(0, 1)
    axis.set_title(name, fontsize=10)
    axis.set_xlabel('PFLOP')
  axes[0].legend(fontsize=8)
  return figure


def rate_distortion(points, embedding: str) -> Figure:
  """Distortion against numbers per second: ratio, log-mel L1 and, if known, the Frechet distance.

  Args:
    points: a mapping per rate, with 'numbers_per_second', 'ratio', 'mel_l1_db' and 'frechet', of `judging.judge`.
  """
  points = list(points)
  curves = {name: [(p['numbers_per_second'], p[name]) for p in points] for name in ('ratio', 'mel_l1_db')}
  curves[f'Frechet distance, {embedding}'] = [(p['numbers_per_second'], p['frechet'][embedding]['value'])
                                               for p in points if embedding in p['frechet']]
  figure, axes = _panels(columns=len(curves), height=3)
  for axis, (name, curve) in zip(axes, curves.items(), strict=True):
    axis.plot(*zip(*curve) if curve else ((), ()), marker='.')
    axis.set_title(name, fontsize=10)
    axis.set_xlabel('numbers a second')
  return figure


def bars(table) -> Figure:
  """A panel per metric, with a bar and its error per row.

  Args:
    table: {row: {metric: {'mean': x, 'error': x or None}}}; a row may lack metrics.
  """
  names = list(dict.fromkeys(name for row in table.values() for name in row))
  figure, axes = grid(len(names), columns=4, height=.8 + .3 * len(table))
  for axis, name in zip(axes, names):
    rows = {label: row[name] for label, row in table.items() if name in row}
    axis.barh(list(rows), [value['mean'] for value in rows.values()],
              xerr=[value['error'] or 0 for value in rows.values()], color='tab:blue', ecolor='0.3', capsize=2)
    axis.invert_yaxis()
    axis.set_title(name.replace('/', '/\n', 1), fontsize=9)
    axis.tick_params(labelsize=8)
  return figure


def save(figure: Figure, path):
  """Writes a PNG atomically. Raises UserError: it cannot be written."""
  with files.whole(path) as aside:
    figure.savefig(aside, dpi=90, format='png')


def grid(count, *, columns, height):
  """A figure and `count` axes in rows of at most `columns`; `height` of a row in inches."""
  columns = min(columns, count)
  figure, axes = _panels(rows=-(-count // columns), columns=columns, height=height)
  for axis in axes[count:]:
    axis.set_visible(False)
  return figure, axes[:count]


def _panels(*, rows=1, columns=1, height):
  """A figure and its axes, row by row; `height` of a row in inches."""
  figure = Figure(figsize=(WIDTH, height * rows), layout='constrained')
  return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
