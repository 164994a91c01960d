"""The end of an error about a name that is not known."""

import difflib
from collections.abc import Iterable


def expected(name: str, known: Iterable[str]) -> str:
    """ "expected one of a, b, c", and the one that was probably meant."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"expected one of {', '.join(names)}" + (f"; did you mean {near[0]}?" if near else "")
