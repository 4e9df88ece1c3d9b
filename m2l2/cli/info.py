"""`m2l2 info`: what a file or a directory contains, without reading more of it than necessary."""

import json
import os

from m2l2 import files
from m2l2.codec import loading
from m2l2.codec.latents import Latents, is_safetensors
from m2l2.codec.snapshot import load_snapshot
from m2l2.data import audio_io
from m2l2.errors import UserError, in_one_line


def facts(path) -> dict:
  """The facts about a path or a model in the box, as a dict of JSON types; 'kind' says what it is.

  Audio, latents, a snapshot, a training workdir, data that m2l2 prepare wrote, a corpus of latents, an exported model,
  a report of m2l2 evaluate. Raises UserError: nothing there, damaged, or none of these.
  """
  if not os.path.exists(path):
    try:
      return _checkpoint_facts(loading.locate(path))
    except UserError as error:
      raise UserError(f'{audio_io.shown(path)}: there is no such file, snapshot, workdir or model '
                      'in the box') from error
  if os.path.isdir(path):
    known = {'manifest.json': _dataset_facts, 'about.json': _exported_facts}
    for name, tell in known.items():
      if os.path.isfile(os.path.join(path, name)) and not os.path.isfile(os.path.join(path, 'metrics.jsonl')):
        return tell(path, _json(os.path.join(path, name)))
    return _checkpoint_facts(path)
  folder = os.path.dirname(os.path.abspath(path))
  if is_safetensors(path):
    if os.path.isfile(os.path.join(folder, 'config.json')):
      raise UserError(f'{audio_io.shown(path)}: is part of a snapshot: ask about {audio_io.shown(folder)}')
    return _latents_facts(path)
  if os.fspath(path).endswith('.json'):
    return _report_facts(path, _json(path))
  info = audio_io.info(path)
  return {'path': info.path, 'kind': 'audio', 'format': info.format, 'encoding': info.subtype,
          'sample_rate': info.sample_rate, 'channels': info.channels, 'samples': info.frames,
          'seconds': info.seconds, **({'tags': dict(info.tags)} if info.tags else {})}


def _latents_facts(path) -> dict:
  latents = Latents.load(path)
  facts = {'path': path, 'kind': 'latents',
           'form': 'tokens' if latents.z.ndim == 3 else 'continuous', 'version': latents.version,
           'model': latents.model, 'streams': latents.z.shape[0], 'chunks': latents.z.shape[1],
           'embeddings_per_chunk': latents.z.shape[2]}
  if latents.z.ndim == 4:
    facts['numbers_per_embedding'] = latents.z.shape[3]
  return {**facts, 'sample_rate': latents.sample_rate, 'channels': latents.channels,
          'samples': latents.num_samples, 'seconds': latents.seconds, 'numbers': latents.z.size,
          'numbers_per_second': latents.numbers_per_second, 'kbit_per_second': latents.kbit_per_second,
          'samples_per_number': latents.samples_per_number,
          'bytes': os.path.getsize(path), **({'tags': dict(latents.tags)} if latents.tags else {})}


def _checkpoint_facts(path) -> dict:
  """The facts of a snapshot, or of a workdir with its last step."""
  facts = {'path': os.fspath(path), 'kind': 'snapshot'}
  if os.path.isfile(os.path.join(path, 'metrics.jsonl')):
    facts |= {'kind': 'workdir', **_run_facts(path)}
    if not os.path.isdir(os.path.join(path, 'snapshot')):
      return {**facts, 'snapshot': 'none yet (training writes one when it saves)'}
  snapshot = load_snapshot(path)
  model, variants = (snapshot.config.get(group, {}) for group in ('model', 'variants'))
  facts |= {'fingerprint': snapshot.fingerprint, 'snapshot_step': snapshot.step}
  facts |= {name: snapshot.extra[name] for name in ('source', 'licence') if name in snapshot.extra}
  if 'latents' in snapshot.extra:
    facts |= {f'latent_{name}': value for name, value in snapshot.extra['latents'].items()}
  facts |= {'parameters': _count(snapshot.params),
            **{f'parameters_{name}': _count(part) for name, part in snapshot.params.items()}}
  try:
    rate, chunk = model['native_rates'][0], model['hop'] * model['frames']
    numbers = model['num_latents'] * model['latent_dim']
    facts |= {'channels': model['channels'], 'native_rates': model['native_rates'],
              'chunk_seconds': chunk / rate, 'embeddings_per_chunk': model['num_latents'],
              'numbers_per_embedding': model['latent_dim'],
              'bottleneck': 'fsq' if variants.get('fsq', {}).get('on') else 'tanh',
              'numbers_per_second': numbers * rate / chunk,
              'numbers_per_second_of_stereo': numbers * rate / chunk * (2 if model['channels'] == 1 else 1),
              'samples_per_number': chunk * model['channels'] / numbers}
  except (KeyError, IndexError, TypeError) as error:
    raise UserError(f'{path}: its config is not of an m2l2 model ({error!r})') from error
  return facts


def _run_facts(workdir) -> dict:
  """The last line of metrics.jsonl with a loss, and the steps of the checkpoints."""
  last: dict = {}
  for row in files.read_json_lines(os.path.join(workdir, 'metrics.jsonl')):
    last = row if 'loss' in row else last
  folder = os.path.join(workdir, 'checkpoints')
  steps = sorted(int(name) for name in os.listdir(folder) if name.isdecimal()) if os.path.isdir(
      folder) else []
  return {'step': last.get('step'), 'loss': last.get('loss'), 'checkpoints': steps}


def _count(tree) -> int:
  return sum(map(_count, tree.values())) if isinstance(tree, dict) else int(tree.size)


def _json(path):
  try:
    with open(path, encoding='utf-8') as file:
      return json.load(file)
  except (OSError, ValueError) as error:
    raise UserError(f'{audio_io.shown(path)}: is not JSON that can be read ({in_one_line(error)})') from error


def _told(path, kind, record, names) -> dict:
  """The fields of a JSON record that have a value."""
  if not isinstance(record, dict) or not any(name in record for name in names):
    raise UserError(f'{audio_io.shown(path)}: is JSON, but no {kind} by m2l2 (of a snapshot, workdir, dataset or '
                    'corpus name the directory)')
  return {'path': os.fspath(path), 'kind': kind, **{name: record[name] for name in names if name in record}}


def _dataset_facts(path, manifest) -> dict:
  """The facts of the output of m2l2 prepare or encode-dataset; the latter writes its report after its last shard."""
  if not isinstance(manifest, dict) or 'model' not in manifest:
    return _prepared_facts(path, manifest)
  report = os.path.join(path, 'report.json')
  if os.path.isfile(report):
    return _corpus_facts(path, _json(report))
  return _told(path, 'corpus of latents, not all written yet', manifest, ('source', 'dtype', 'shards'))


def _prepared_facts(path, manifest) -> dict:
  told = _told(path, 'prepared dataset', manifest, ('files', 'skipped', 'silent_segments'))
  for split, counts in manifest.get('splits', {}).items():
    told |= {f'{split}_{name}': counts[name] for name in ('sources', 'records', 'bytes')}
    told |= {f'{split}_hours': counts['seconds'] / 3600, f'{split}_shards': len(counts['shards'])}
  return told | {name: manifest['options'][name] for name in ('segment_seconds', 'overlap_seconds', 'rates')}


def _exported_facts(path, about) -> dict:
  return _told(path, 'exported model', about, tuple(about))


def _corpus_facts(path, report) -> dict:
  told = _told(path, 'corpus of latents', report, ('signals', 'encoded', 'chunks', 'bytes'))
  return told | {'hours': report['seconds'] / 3600, 'skipped': len(report['skipped'])}


def _report_facts(path, report) -> dict:
  told = _told(path, 'evaluation report', report, ('pairs', 'metrics'))
  means = {name: metric['mean'] for name, metric in told.pop('metrics', {}).items()}
  distances = {name: value['value'] if isinstance(value, dict) else value for name, value in
               report.get('frechet', {}).items()}
  return told | means | distances | {'warnings': len(report.get('warnings', []))}
