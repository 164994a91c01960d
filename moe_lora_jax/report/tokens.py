"""A text, its tokens coloured by the expert with the largest gate: for the page, a notebook and a file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moe_lora_interop.disk.atomic import replace_file
from moe_lora_jax.measure.tables import visible
from moe_lora_jax.measure.text_gates import TextGates, text_gates
from moe_lora_jax.report.style import COLOURS

EXPERT_COLOURS = (*COLOURS, "#F0E442")  # yellow is the last that is needed: it is the weakest on white
LINES = ("solid", "dashed", "dotted", "double")  # of the experts that share a colour
STRENGTH = 0.4  # opacity of a colour whose expert has all of the gate weight; ink is readable on it, light or dark
HOVERED = 8  # gates that are listed


def token_css() -> str:
    """The style of what `tokens_html` makes. The text keeps the colour of its surroundings, in light and dark."""
    experts = "".join(
        f".mlj .c{n} {{ --rgb: {int(c[1:3], 16)} {int(c[3:5], 16)} {int(c[5:], 16)}; }}\n"
        for n, c in enumerate(EXPERT_COLOURS)
    )
    lines = "".join(f".mlj .l{n} {{ border-bottom-style: {line}; }}\n" for n, line in enumerate(LINES))
    return f"""
.mlj {{ margin: 0 0 1.25rem; }}
.mlj h3 {{ font-size: 1em; margin: 0 0 .25rem; overflow-wrap: anywhere; }}
.mlj .text {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2.4; margin: 0 0 .5rem; }}
.mlj .legend {{ font-size: .85em; line-height: 2; margin: 0 0 .4rem; }}
.mlj .legend span {{ margin-right: .8em; padding: 0 .3em; white-space: nowrap; }}
.mlj [data-e] {{ background: rgb(var(--rgb) / calc({STRENGTH} * var(--g))); border-bottom: 3px solid rgb(var(--rgb));
  border-radius: 2px; padding: .1em 0; }}
.mlj .text [data-e] {{ position: relative; }}
.mlj .text [data-e]::before {{ content: attr(data-e); position: absolute; left: .1em; top: -1.15em; font-size: .6em;
  line-height: 1; opacity: .75; }}
.mlj .text .again::before {{ content: none; }}
{experts}{lines}"""


def tokens_html(texts: Sequence[TextGates], *, before: str = "") -> str:
    """Every router: its legend with the share of each expert, and the texts; hover a token for its gates.

    Args:
        texts: of the same routers, at least one.
        before: put before the name of every router.
    """
    return "".join(_block(module, texts, before) for module in texts[0].shares)


@dataclass(frozen=True)
class TokenPicture:
    """Shows itself in a notebook; `save` writes a page of its own."""

    gates: TextGates

    def _repr_html_(self) -> str:
        return f"<style>{token_css()}</style>{tokens_html([self.gates])}"

    def __repr__(self) -> str:
        return f"TokenPicture of {len(self.gates.tokens)} tokens: {', '.join(self.gates.shares)}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an HTML page that needs nothing else; an existing file is replaced."""
        body = f'<body style="font: 1rem/1.5 system-ui, sans-serif; margin: 2rem">{self._repr_html_()}</body>'
        head = '<meta charset="utf-8"/><meta name="color-scheme" content="light dark"/><title>Tokens by expert</title>'
        replace_file(Path(path), f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>{body}</html>\n'.encode())


def plot_tokens(
    model: nnx.Module, tokenizer: Any, text: str, *, modules: str | Sequence[str] | None = None
) -> TokenPicture:
    """The text with every token in the colour of the expert that has its largest gate.

    The colour is as strong as the gate, and the small number is the expert's. The gates are shown where the pointer is.

    Example:
        >>> mlj.plot_tokens(model, tokenizer, "what is two plus two").save("tokens.html")

    Args:
        model: with an adapter.
        tokenizer: of its base model, from `load_tokenizer`.
        modules: routers to show, as `return_router` names them; None: the three that tell these tokens apart best.

    Raises:
        ConfigError: the text has no tokens, no router reads it, or there is no router of such a name.
    """
    return TokenPicture(text_gates(model, tokenizer, text).of(modules))


def shown(piece: str) -> str:
    """A token as it is printed: line breaks also as a mark, other characters that cannot be seen as escapes."""
    return visible(piece).replace("\n", "⏎\n").replace("\t", "⇥\t")


def _block(module: str, texts: Sequence[TextGates], before: str) -> str:
    rows = np.concatenate([text.shares[module] for text in texts])
    paragraphs = "".join(f'<p class="text">{_text(text.tokens, text.shares[module])}</p>' for text in texts)
    return f'<div class="mlj"><h3>{escape(before + module)}</h3>{_legend(rows)}{paragraphs}</div>'


def _text(tokens: Sequence[str], shares: np.ndarray) -> str:
    """The number of an expert stands at the first of its tokens in a row."""
    largest = shares.argmax(axis=1)
    repeated = np.append(False, largest[1:] == largest[:-1])
    return "".join(_token(shown(t), gates, bool(r)) for t, gates, r in zip(tokens, shares, repeated, strict=True))


def _token(piece: str, gates: np.ndarray, is_repeated: bool) -> str:
    largest = int(gates.argmax())
    if not gates[largest] > 0:
        return f'<span title="no expert">{escape(piece)}</span>'
    order = [e for e in np.argsort(-gates, kind="stable")[:HOVERED] if gates[e] >= 0.005]
    title = ", ".join(f"expert {e}: {gates[e]:.0%}" for e in order)
    look = _look(largest, gates[largest], " again" * is_repeated)
    return f'<span {look} title="{title}">{escape(piece)}</span>'


def _legend(shares: np.ndarray) -> str:
    mean = shares.mean(axis=0)
    entries = (f"<span {_look(e, 1.0)}>expert {e}: {share:.0%}</span>" for e, share in enumerate(mean))
    return f'<p class="legend">{" ".join(entries)}</p>'


def _look(expert: int, gate: float, more: str = "") -> str:
    repeat, colour = divmod(expert, len(EXPERT_COLOURS))
    return f'class="c{colour} l{repeat % len(LINES)}{more}" data-e="{expert}" style="--g: {gate:.2f}"'
