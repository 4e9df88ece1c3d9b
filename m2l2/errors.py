"""The one error a user is meant to read."""


class UserError(ValueError):
  """A mistake that the user can mend: one line that says what, where and how to mend it.

  Commands print the line and exit with status 1; libraries see an ordinary `ValueError`.
  """
