"""The one exception for a user's mistake: the command line prints its message and exits with code 2."""


class InputError(ValueError):
    """Bad input: the message says what was found, where, what was expected and what to do."""
