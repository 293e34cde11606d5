"""The one exception that tells a user what to change, and what its messages are made of."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 5
"""How many names, values or colours a message lists before it only counts."""


class GSKDError(ValueError):
    """Something the user can put right: a recipe, a file, a shape, a name.

    The message names the thing, what was found and what was expected. The command line prints it in one line
    and exits 2.
    """


def near_names(name: str, known: Iterable[str], most: int = 5) -> str:
    """A closing clause that lists the names nearest to ``name``, for the end of an error message.

    Returns:
        ``"; did you mean 'a', 'b'?"``, or where nothing is near ``"; known: 'a', 'b', ..."`` with at most ``most``
        names.
    """
    known = list(dict.fromkeys(known))
    near = get_close_matches(name, known, n=most, cutoff=0.5)
    # A dotted name whose last part was misspelt is far from its neighbours as a whole: look at the tail as well.
    near += [k for k in known if k not in near and name and k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if near:
        return "; did you mean " + ", ".join(repr(k) for k in near[:most]) + "?"
    shown = ", ".join(repr(k) for k in known[:most])
    return f"; known: {shown}{', ...' if len(known) > most else ''}" if known else ""


def few(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def count(n: int, noun: str) -> str:
    """ "1 pixel", "2 pixels"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def described(error: Exception) -> str:
    """What foreign code raised, on one line and not endless."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
