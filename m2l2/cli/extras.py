"""What commands need beyond inference, asked before any work is done; setup.cfg says what each extra brings."""

import importlib.util

from m2l2.errors import UserError


def require(what: str, extra: str, *modules: str):
  """Raises UserError, which names the extra: one of the modules is not installed. None of them is imported.

  Args:
    what: is being done, as 'training'. extra: of setup.cfg, as 'train'. modules: as they are imported.
  """
  for module in modules:
    if not _is_there(module):
      raise UserError(f"{what} needs {module}, which is not installed: pip install 'm2l2[{extra}]'")


def _is_there(module) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except (ModuleNotFoundError, ValueError):  # of what a package lies in; of a stand-in without a spec
    return False
