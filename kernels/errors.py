"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake the user can mend.

    Its message is one line that names the offending value or path and the remedy; command lines print
    it to stderr and exit with status 2. Anything else that is raised is a bug and keeps its traceback.
    """
