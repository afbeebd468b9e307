"""The program behind ``AnswerPool``: reads JSON pairs [answer, gold], writes whether ``math-verify`` finds them equal.

It runs as a process of its own, by path, so it imports neither this package nor JAX nor the user's ``__main__``.
The program itself never grades: it keeps a forked child that does. A child that runs out of time or memory, or that
crashes, costs a False and one fork (milliseconds), not another import of sympy (seconds).
"""

import contextlib
import json
import logging
import os
import resource
import signal
import socket
import sys
from typing import Any

MEMORY_LIMIT = 4 << 30  # bytes of address space; 10^{10^{10}} asks for 4 GB in one number


def equivalent(answer: str, gold: str) -> bool:
    """Whether ``math-verify`` finds two LaTeX expressions equal; False for what it cannot read."""
    from math_verify import parse, verify

    try:
        # Its own timeouts are off: alarms cannot interrupt one long product. The process limits below can.
        gold_parsed = parse(rf"\boxed{{{gold}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        parsed = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        return bool(verify(gold_parsed, parsed, timeout_seconds=None))
    except Exception:  # RecursionError, MemoryError and whatever sympy raises on nonsense
        return False


def _serve_child(stream: Any, limit: float) -> None:
    for line in stream:
        # CPU seconds, so that a busy machine does not change a verdict; the wall clock only for what sleeps.
        # Nobody handles these signals: the kernel ends the process, whatever it is computing.
        signal.setitimer(signal.ITIMER_PROF, limit)
        signal.setitimer(signal.ITIMER_REAL, 10 * limit)
        verdict = equivalent(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        stream.write(b"1\n" if verdict else b"0\n")
        stream.flush()


def _fork_child(limit: float) -> tuple[int, Any]:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        with contextlib.suppress(BaseException):
            _serve_child(theirs.makefile("rwb"), limit)
        os._exit(0)
    theirs.close()
    return pid, ours.makefile("rwb")


def main(limit: float) -> None:
    """Serves stdin → stdout until stdin ends."""
    logging.disable(logging.CRITICAL)
    equivalent(r"\frac{1}{2}", "0.5")  # imports and first-use tables, once, before any fork
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # parsers print
    os.dup2(silence, 2)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    replies.write(b"ready\n")
    pid, child = _fork_child(limit)
    for line in sys.stdin.buffer:
        try:
            child.write(line)
            child.flush()
            reply = child.readline()
        except OSError:
            reply = b""
        if not reply:
            os.waitpid(pid, 0)
            pid, child = _fork_child(limit)
            reply = b"0\n"
        replies.write(reply)


if __name__ == "__main__":
    main(float(sys.argv[1]))
