"""The one error for what a user can put right."""


class UserError(Exception):
  """Bad config, data, plan or checkpoint: one message, exit code not 0.

  The message names the field, the file and line or the table, says what was
  found, and what to do. main.py prints it without a traceback.
  """
