"""The program behind a reward function of one's own: JSON lines in, {"value": number} or {"fault": text} out.

It runs as a process of its own, by path, so it imports neither this package nor JAX.
"""

import importlib
import json
import os
import sys
from typing import Any


def describe(error: BaseException) -> str:
    """Type and message of what a function raised, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main(module: str, name: str) -> None:
    """Serves stdin → stdout until stdin ends."""
    asked, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what the function prints is no reply
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and what it reads is no question

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")

    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except BaseException as error:  # whatever a module does when it is imported
        return reply({"fault": f"cannot be imported ({describe(error)})"})
    if not callable(function):
        return reply({"fault": f"is a {type(function).__name__}, not a function"})
    reply({"ready": True})
    for line in asked:
        arguments = json.loads(line)
        try:
            reply(judged(function(**arguments)))
        except BaseException as error:
            reply({"fault": f"it raised {describe(error)}"})
    return None


def judged(value: Any) -> dict[str, Any]:
    """The reply to what a function returned: any number, as a scalar of NumPy or a tensor without axes."""
    if isinstance(value, bool | int | float) or getattr(value, "shape", None) == ():
        return {"value": float(value)}
    return {"fault": f"it returned {type(value).__name__} {str(value)[:80]!r}, expected one number"}


if __name__ == "__main__":
    main(*sys.argv[1:])
