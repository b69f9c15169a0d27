"""The one error root for what a user gave; the command line prints its message and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message is one line that names the culprit and the remedy."""


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line; its type's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Error for a name that is not registered, listing the closest ones that are."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names)}"
    return UserError(f"unknown {kind} '{name}'; {hint}")
