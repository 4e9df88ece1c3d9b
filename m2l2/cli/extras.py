"""Checks, before any work, that the packages a command needs beyond inference are installed (extras of setup.cfg)."""

import importlib.util

from m2l2.errors import UserError


def require(what: str, extra: str, *modules: str):
  """Raises UserError, which names the extra, if one of the modules is not installed. Imports none of them.

  Args:
    what: the task, for the message: 'training'. extra: of setup.cfg: 'train'. modules: names as in imports.
  """
  for module in modules:
    if not _is_there(module):
      raise UserError(f"{what} needs {module}, which is not installed: pip install 'm2l2[{extra}]'")


def _is_there(module) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except (ModuleNotFoundError, ValueError):  # of what a package lies in; of a stand-in without a spec
    return False
