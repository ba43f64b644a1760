"""The error that users can fix, and suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. The command line prints it as one line and exits with 2."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its repr if it has no message."""
    return (str(error) or repr(error)).splitlines()[0]


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` if a known word is close to `word`, else the choices."""
    import difflib

    known = sorted(known)
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
