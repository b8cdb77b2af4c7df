"""A program that compares formulas with math-verify, told by lines of JSON: ``[number, reference, given]``.

To each it replies ``<number> equal`` or ``<number> different``, or ``0 stopped`` where the comparison used up its time.
It runs by its path, so that it imports nothing of this package. A child process compares, and the parent, in which
everything is imported, forks the next one when a child has been stopped; so that costs milliseconds.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import TextIO

from math_verify import LatexExtractionConfig, parse, verify

TIME_LIMIT_S = 0.5
"""Of processor time, so that a busy machine gives the same verdicts as an idle one; a grade asks once a reference."""
MEMORY_LIMIT = 2 << 30
"""Bytes of address space; more raises a MemoryError in the child."""

# Never math-verify's ExprExtractionConfig: it hands text to sympy's parse_expr, which is Python's eval (0.9.0).
_LATEX = (LatexExtractionConfig(),)


def main() -> None:
    """Compares until the input ends."""
    # antlr4 (4.13.2) prints to the standard output where its runtime is not the one a grammar was made with.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    are_equal(r"\frac{x^2-1}{x-1}", r"\sin x")  # fills sympy's and the parser's tables, which every child inherits
    while True:
        child = os.fork()
        if child == 0:
            serve(replies)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return
        replies.write("0 stopped\n")


def serve(replies: TextIO) -> None:
    """Answers requests; the system ends the process when one takes too long, even in the midst of C code."""
    for line in sys.stdin:
        number, reference, given = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT_S)
        equal = are_equal(reference, given)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(f"{number} {'equal' if equal else 'different'}\n")


def are_equal(reference: str, given: str) -> bool:
    """Whether two LaTeX formulas are equal; not where one of them is not understood."""
    try:
        gold, answer = (
            parse(f"${text}$", _LATEX, fallback_mode="no_fallback", parsing_timeout=None) for text in (reference, given)
        )
        return bool(gold and answer) and verify(gold, answer, timeout_seconds=None)
    except Exception:  # sympy raises all kinds on what is not mathematics, a MemoryError and a RecursionError included
        return False


if __name__ == "__main__":
    main()
