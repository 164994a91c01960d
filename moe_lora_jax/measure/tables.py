"""Tables as HTML, with any text in their cells."""

from collections.abc import Sequence
from html import escape


def html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, well-formed as XML too. `title`: its caption, if any."""
    head = "".join(f'<th scope="col">{escape(visible(name))}</th>' for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(visible(cell))}</td>' for cell in row)}</tr>" for row in rows)
    caption = f"<caption>{escape(visible(title))}</caption>" if title else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def visible(text: str) -> str:
    """The text with line breaks and tabs; other characters that cannot be seen are escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
