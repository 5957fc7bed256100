"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake the user can correct.

    Its message is one line that names the offending value or path and the remedy. Commands print it to stderr and exit
    with status 2. Any other exception is a bug and keeps its traceback.
    """
