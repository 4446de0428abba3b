"""The base of all errors that are the user's to fix."""


class UserError(ValueError):
    """A wrong value, file or setting. The message is one line: what is wrong, what was found, what is allowed.

    Commands print it without a stack trace and end with exit status 2.
    """
