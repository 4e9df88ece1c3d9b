"""Probes of the latents: small classifiers on frozen, time-averaged features (the paper's section 5.5).

Each probe is an MLP without hidden layers or with two (256, 128), trained with Adam (1e-3, L2 penalty 1e-5) for at most
100 epochs, stopped after 10 without a lower validation loss. Features are standardised by the training files' mean and
deviation. Batches have 1083 files, as in earlier work, or an eighth of the training files if that is fewer, since small
sets would have too few updates.
"""

from collections.abc import Callable, Mapping, Sequence
import functools

import jax
import jax.numpy as jnp
import mir_eval.key
import numpy as np
import optax
import sklearn.metrics

from m2l2.codec.codec import Codec
from m2l2.errors import UserError
from m2l2.evaluation.embedders import musicnn
from m2l2.evaluation.excerpts import take_excerpt
from m2l2.evaluation.metrics import pairs
from m2l2.evaluation.studies import tasks

HIDDEN = {'linear': (), 'mlp': (256, 128)}
LEARNING_RATE, PENALTY = 1e-3, 1e-5
BATCH, EPOCHS, PATIENCE = 1083, 100, 10
DRAWS = 40  # of the bootstrap
METRICS = {'class': ('accuracy',), 'key': ('key_score', 'accuracy'), 'tags': ('roc_auc', 'average_precision')}
MAJORITY = 'majority'


# ---- features ------------------------------------------------------------------------------------


def features_of(codec: Codec) -> Callable[..., np.ndarray]:
  """audio [channels, samples], sample_rate -> float32 [K d]: the latents' mean over the chunks."""
  return lambda audio, sample_rate: codec.features(codec.encode(audio, sample_rate), per='file')


def untrained(codec: Codec, *, seed: int = 0) -> Codec:
  """The same network with its initial random weights, where kernels that begin at zero are drawn too (by their fan-in),
  as otherwise the output would be zero."""
  rng = np.random.default_rng(seed)

  def draw(value, name):
    if name != 'zeros' or value.ndim < 2:
      return value
    return rng.standard_normal(value.shape, np.float32) * np.float32(np.prod(value.shape[:-1]) ** -.5)

  params = jax.tree.map(draw, jax.jit(codec.network.init)(jax.random.key(seed)), codec.network.init_names)
  return Codec(config=codec.config, params=params, fingerprint='untrained')


def log_mel_statistics(audio, sample_rate) -> np.ndarray:
  """float32 [256]: mean and deviation over time of each of 128 log-mel bands."""
  levels = pairs.log_mel_db(audio, sample_rate=sample_rate)
  return np.concatenate([levels.mean(axis=1), levels.std(axis=1)]).astype(np.float32)


def musicnn_mean(audio, sample_rate) -> np.ndarray:
  """float32 [200]: musicnn's embedding, mean over its windows; shorter sounds are padded to 3 s with silence."""
  needed = -(-musicnn.WINDOW_FRAMES * musicnn.HOP * sample_rate // musicnn.SAMPLE_RATE)
  audio = np.pad(audio, ((0, 0), (0, max(0, needed - audio.shape[1]))))
  return musicnn.embed(audio, sample_rate=sample_rate, name='mtt').mean(axis=0)


def extractors(codec: Codec, *, baselines: bool = True, seed: int = 0) -> dict[str, Callable]:
  """Name -> features of a sound: the model's and, with `baselines`, those of the baselines."""
  if not baselines:
    return {'model': features_of(codec)}
  return {'model': features_of(codec), 'random weights': features_of(untrained(codec, seed=seed)),
          'log-mel statistics': log_mel_statistics, 'musicnn': musicnn_mean}


def extract(music: tasks.Music, functions: Mapping[str, Callable], *, seconds: float,
            progress: Callable[[int], None] = lambda files: None) -> tuple[dict, np.ndarray, list[str]]:
  """Features of the middle `seconds` of all files.

  Returns ({name: float32 [files read, width]}, which files they are, a warning for each that cannot be read).
  Raises UserError: no file can be read.
  """
  features: dict[str, list] = {name: [] for name in functions}
  read, warnings = [], []
  for number, path in enumerate(music.paths):
    try:
      clip = take_excerpt(path, seconds=seconds)
      rows = {name: function(clip.audio, clip.sample_rate) for name, function in functions.items()}
    except UserError as error:
      warnings.append(f'{music.name}: unreadable: {error}; left out')
    else:
      read.append(number)
      for name, row in rows.items():
        features[name].append(row)
    progress(1)
  if not read:
    raise UserError(f'{music.name}: no file can be read; the first: {warnings[0]}')
  return {name: np.stack(rows) for name, rows in features.items()}, np.array(read), warnings


# ---- the probes ----------------------------------------------------------------------------------


def fit(x, y, x_valid, y_valid, *, hidden: Sequence[int], outputs: int, seed: int = 0) -> Callable:
  """Trains one probe.

  Args:
    x: float32 [n, d], standardised. y: int32 [n] classes, or float32 [n, outputs] tags.
    x_valid, y_valid: the same, for early stopping.
  Returns:
    A function of x: float32 [n, outputs], the scores before softmax or sigmoid.
  """
  key = jax.random.key(seed)
  sizes = (x.shape[1], *hidden, outputs)
  params = [{'w': jax.random.normal(jax.random.fold_in(key, i), (a, b)) * (2 / a) ** .5, 'b': jnp.zeros(b)}
            for i, (a, b) in enumerate(zip(sizes, sizes[1:]))]
  batch = max(1, min(BATCH, len(x) // 8))
  optimizer_state, best, lowest, since = _OPTIMIZER.init(params), params, np.inf, 0
  rng = np.random.default_rng(seed)
  for _ in range(EPOCHS):
    order = np.resize(rng.permutation(len(x)), (-(-len(x) // batch), batch))
    params, optimizer_state = _epoch(params, optimizer_state, x, y, order)
    loss, since = float(_loss(params, x_valid, y_valid)), since + 1
    if loss < lowest:
      best, lowest, since = params, loss, 0
    if since >= PATIENCE:
      break
  return lambda x: np.asarray(_scores(best, x))


# Adam after the penalty's gradient, as torch has it.
_OPTIMIZER = optax.chain(optax.add_decayed_weights(PENALTY), optax.adam(LEARNING_RATE))


def _scores(params, x):
  for i, layer in enumerate(params):
    x = jax.nn.relu(x) if i else x
    x = x @ layer['w'] + layer['b'][None]
  return x


@jax.jit
def _loss(params, x, y):
  scores = _scores(params, x)
  if y.ndim == 1:
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()
  return optax.sigmoid_binary_cross_entropy(scores, y).mean()


@jax.jit
def _epoch(params, optimizer_state, x, y, order):
  def step(carry, rows):
    params, state = carry
    updates, state = _OPTIMIZER.update(jax.grad(_loss)(params, x[rows], y[rows]), state, params)
    return (optax.apply_updates(params, updates), state), None
  return jax.lax.scan(step, (params, optimizer_state), order)[0]


def run(task: tasks.Task, x: np.ndarray, *, hidden: Sequence[int], seeds: int = 3) -> dict:
  """Trains probes from `seeds` initialisations and scores the test files.

  Args:
    x: float32 [n, d], features of the task's files.
  Returns:
    {metric: {'mean': over the seeds, 'error': bootstrap deviation over the test files}}.
  """
  chosen = {split: task.splits == split for split in tasks.SPLITS}
  mean, deviation = x[chosen['train']].mean(axis=0), x[chosen['train']].std(axis=0)
  x = ((x - mean) / np.maximum(deviation, 1e-6)).astype(np.float32)
  sides = [part[chosen[split]] for split in ('train', 'valid') for part in (x, task.targets)]
  probes = [fit(*sides, hidden=hidden, outputs=len(task.classes), seed=seed) for seed in range(seeds)]
  return scored(task.kind, [classifier(x[chosen['test']]) for classifier in probes], task.targets[chosen['test']])


def majority(task: tasks.Task) -> dict:
  """The scores of a constant prediction: the most frequent class of the training files, or each tag's share of them."""
  train, test = task.targets[task.splits == 'train'], task.targets[task.splits == 'test']
  counts = train.mean(axis=0) if task.kind == 'tags' else np.bincount(train, minlength=len(task.classes))
  return scored(task.kind, [np.broadcast_to(np.float32(counts), (len(test), len(task.classes)))], test)


# ---- scores --------------------------------------------------------------------------------------


def scored(kind, scores: Sequence[np.ndarray], targets: np.ndarray, *, seed: int = 0) -> dict:
  """{metric: {'mean', 'error'}} of the scores [n, classes] of each seed."""
  rng = np.random.default_rng(seed)
  picks = rng.integers(len(targets), size=(DRAWS, len(targets)))
  results = {}
  for name in METRICS[kind]:
    measure = _MEASURES[name]
    over_seeds = lambda rows: np.mean([measure(predicted[rows], targets[rows]) for predicted in scores])
    error = np.nanstd([over_seeds(pick) for pick in picks], ddof=1) if len(targets) > 1 else None
    results[name] = {'mean': float(over_seeds(slice(None))), 'error': None if error is None else float(error)}
  return results


def accuracy(scores, targets) -> float:
  return float(np.mean(scores.argmax(axis=1) == targets))


def key_score(scores, targets) -> float:
  """MIREX's weighted key score, mean over the files."""
  return float(np.mean(_key_weights()[targets, scores.argmax(axis=1)]))


@functools.cache
def _key_weights() -> np.ndarray:
  """[truth, estimate] over tasks.KEYS."""
  return np.array([[mir_eval.key.weighted_score(truth, said) for said in tasks.KEYS] for truth in tasks.KEYS])


def roc_auc(scores, targets) -> float:
  """Mean over the tags of the chance that a file with the tag outranks one without; ties count half."""
  return _over_tags(scores, targets, sklearn.metrics.roc_auc_score)


def average_precision(scores, targets) -> float:
  """Mean over the tags of the precision at each file that has the tag; files of one score are taken together."""
  return _over_tags(scores, targets, sklearn.metrics.average_precision_score)


def _over_tags(scores, targets, measure) -> float:
  """Mean over the tags that some files have and some lack; nan if there is none."""
  has = np.asarray(targets) > 0
  told = has.any(axis=0) & ~has.all(axis=0)
  if not told.any():
    return float('nan')
  # All tags in one call, as scikit-learn checks its arguments each time; it takes a single tag without its axis.
  shape = (len(has), -1) if told.sum() > 1 else (-1,)
  return float(measure(has[:, told].reshape(shape), scores[:, told].reshape(shape), average='macro'))


_MEASURES = {'accuracy': accuracy, 'key_score': key_score, 'roc_auc': roc_auc, 'average_precision': average_precision}


# ---- all together --------------------------------------------------------------------------------


def probe(music: Sequence[tasks.Music], functions: Mapping[str, Callable], *, seconds: float = 30., seeds: int = 3,
          progress: Callable[[int], None] = lambda files: None) -> dict:
  """Runs every task of every data set, with every kind of features and every probe.

  Args:
    functions: see `extractors`. seconds: from the middle of each file. seeds: initialisations of each probe.
    progress: called with the number of files done since the last call.
  Returns:
    JSON types: {'seconds', 'seeds', 'tasks': {'MUSIC/TASK': {'kind', 'classes': n, 'files': {split: n}, 'rows':
    {features: {probe: {metric: {'mean', 'error'}}}}}}, 'warnings'}. The row 'majority' has one probe, 'none'.
  Raises:
    UserError: a set without files that can be read, or a task that cannot be trained.
  """
  report, warnings = {}, []
  for dataset in music:
    # mistakes are reported before the long work
    prepared = {name: tasks.task(dataset, name) for name in dataset.labels}
    features, read, unreadable = extract(dataset, functions, seconds=seconds, progress=progress)
    warnings += unreadable
    for name, (task, unseen) in prepared.items():
      task, rows = tasks.only(task, read)
      warnings += unseen
      scores = {kind: {label: run(task, x[rows], hidden=hidden, seeds=seeds) for label, hidden in HIDDEN.items()}
                for kind, x in features.items()}
      report[f'{dataset.name}/{name}'] = {
          'kind': task.kind, 'classes': len(task.classes),
          'files': {split: int((task.splits == split).sum()) for split in tasks.SPLITS},
          'rows': {**scores, MAJORITY: {'none': majority(task)}}}
  return {'seconds': seconds, 'seeds': seeds, 'tasks': report, 'warnings': warnings}


def table(report) -> str:
  """A table in Markdown: a row per kind of features and probe, a column for each task's first metric."""
  columns = {name: METRICS[task['kind']][0] for name, task in report['tasks'].items()}
  rows = dict.fromkeys((kind, label) for task in report['tasks'].values() for kind, labels in task['rows'].items()
                       for label in labels)
  head = [f'{name}, {metric.replace("_", " ")} ({report["tasks"][name]["files"]["test"]} files)'
          for name, metric in columns.items()]
  lines = [f'| features | probe | {" | ".join(head)} |', '|---' * (2 + len(head)) + '|']
  for kind, label in sorted(rows, key=lambda row: row[0] == MAJORITY):
    cells = []
    for name, metric in columns.items():
      value = report['tasks'][name]['rows'].get(kind, {}).get(label, {}).get(metric)
      error = '' if value is None or value['error'] is None else f' +- {value["error"]:.3f}'
      cells.append('-' if value is None else f'{value["mean"]:.3f}{error}')
    lines.append(f'| {kind} | {label} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def bars(report) -> dict:
  """The same numbers in the format of `pictures.bars`."""
  rows: dict[str, dict] = {}
  for name, task in report['tasks'].items():
    metric = METRICS[task['kind']][0]
    for kind, labels in task['rows'].items():
      for label, values in labels.items():
        row = kind if kind == MAJORITY else f'{kind}, {label}'
        rows.setdefault(row, {})[f'{name}, {metric.replace("_", " ")}'] = values[metric]
  return rows
