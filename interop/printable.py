"""Text from files on a terminal: a name must not move the cursor, begin a line, or hide what follows."""

LONGEST = 2000


def printable(text: str) -> str:
    r"""The text, cut if long, with every character that is not printable as an escape: \n, \x1b."""
    if len(text) > LONGEST:
        return f"{printable(text[:LONGEST])} ... ({len(text)} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
