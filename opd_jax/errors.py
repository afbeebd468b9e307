"""The exceptions that the command line turns into one message and exit code: 2 bad input, 1 failed, 3 stopped."""


class InputError(ValueError):
    """Bad input: the message says what was found, where, what was expected and what to do."""


class Failed(Exception):
    """The run cannot go on by itself; the message says why, what is kept, and what to do. Exit code 1."""


class Interrupted(Exception):
    """The command was asked to stop, has saved what it did, and can be resumed."""
