"""The exceptions that the command line turns into one message: exit code 2 for a user's mistake, 3 for a stop."""


class InputError(ValueError):
    """Bad input: the message says what was found, where, what was expected and what to do."""


class Interrupted(Exception):
    """The command was asked to stop, has saved what it did, and can be resumed."""
