"""Installs this checkout, editable, into the environment whose Python runs this.

    .venv/bin/python launch/install.py '.[train]'

By uv, which takes seconds where pip takes a minute or two; uv comes from where pip gets its packages, and is told pip's
settings (index, proxy, ...), which it does not read by itself. By pip where there is no uv for this machine, where pip
has a setting that uv does not know, and where uv fails.
"""

import ast
import os
import signal
import subprocess
import sys

from pip._internal.models.index import PyPI  # pip's default index, which uv shall look at first

# pip's settings in uv's words: options (a setting of several words gives one option for each) and variables.
OPTIONS = {'extra-index-url': '--index', 'find-links': '--find-links', 'constraint': '--constraint',
           'trusted-host': '--allow-insecure-host'}
SWITCHES = {'no-index': '--no-index', 'no-cache-dir': '--no-cache'}
VARIABLES = {'cert': ('SSL_CERT_FILE',), 'client-cert': ('SSL_CLIENT_CERT',), 'proxy': ('HTTPS_PROXY', 'HTTP_PROXY'),
             'timeout': ('UV_HTTP_TIMEOUT',), 'default-timeout': ('UV_HTTP_TIMEOUT',)}
# These change nothing of what is installed into an environment.
IGNORED = {'break-system-packages', 'cache-dir', 'config-file', 'disable-pip-version-check', 'log', 'no-color',
           'no-compile', 'no-input', 'no-python-version-warning', 'no-warn-script-location', 'progress-bar', 'quiet',
           'require-venv', 'require-virtualenv', 'retries', 'root-user-action', 'user', 'verbose'}


def pip_settings(listing: str) -> dict[str, str]:
  """Setting -> its text, from what `pip config list` prints; of several that hold for `pip install`, the stronger."""
  settings = {}
  for section in ('global.', 'install.', ':env:.'):
    for line in listing.splitlines():
      if line.startswith(section):
        name, _, text = line.removeprefix(section).partition('=')
        settings[name] = ast.literal_eval(text)
  return settings


def for_uv(settings: dict[str, str]) -> tuple[list[str], dict[str, str]]:
  """pip's settings -> uv's (options, variables of the environment). Raises ValueError: uv has no word for one."""
  # Of a release that several indexes have, uv sees the files of the first alone, where pip sees all: so the main index
  # comes first, as an extra one may have but some of the files.
  settings = {'index-url': PyPI.simple_url, **settings}
  main = settings.pop('index-url')
  options, variables = [f'--index={main}', f'--default-index={main}'], {}
  for name, text in settings.items():
    if name in OPTIONS:
      options += [f'{OPTIONS[name]}={word}' for word in text.split()]
    elif name in SWITCHES:
      if text.lower() in ('1', 'true', 'yes', 'on', 't', 'y'):
        options.append(SWITCHES[name])
    elif name in VARIABLES:
      variables |= dict.fromkeys(VARIABLES[name], text)
    elif name not in IGNORED:
      raise ValueError(name)
  return options, variables


def by_uv(what: str) -> bool:
  """Whether uv could; if not, it has said why."""
  pip = [sys.executable, '-m', 'pip']
  listed = subprocess.run([*pip, 'config', 'list'], stdout=subprocess.PIPE, text=True, check=False)
  try:
    options, variables = for_uv(pip_settings(listed.stdout))
  except ValueError as error:
    print(f'pip has the setting {error}, which uv does not know: installing by pip', file=sys.stderr)
    return False
  got = subprocess.run([*pip, 'install', '-qq', '--no-compile', 'uv>=0.5'], stderr=subprocess.DEVNULL, check=False)
  if got.returncode:
    print('pip finds no uv for this machine: installing by pip', file=sys.stderr)
    return False
  # As pip does: the newest release of all indexes, not the first index that has the package.
  command = [sys.executable, '-m', 'uv', 'pip', 'install', '--python', sys.executable,
             '--index-strategy=unsafe-best-match', *options, '--editable', what]
  with subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                        text=True) as running:
    for line in running.stdout:
      if not line.startswith((' + ', ' - ', ' ~ ')):  # the list of all that was installed
        print(line, end='', file=sys.stderr, flush=True)
  if running.returncode:
    print('uv could not: installing by pip', file=sys.stderr)
  return not running.returncode


def main(what: str) -> int:
  """-> 0, or pip's exit status after its message."""
  if by_uv(what):
    return 0
  # What is imported is compiled then; all of it would be three times as much.
  pip = [sys.executable, '-m', 'pip', 'install', '--no-compile', '--editable', what]
  return subprocess.run(pip, stdout=sys.stderr, check=False).returncode


if __name__ == '__main__':
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this and the script that called it without a traceback
  sys.exit(main(sys.argv[1]))
