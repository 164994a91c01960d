"""The HTML page: sections with one inline figure each, no script, nothing fetched from elsewhere."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from moe_lora_jax.adapters.parameter_summary import Summary
from moe_lora_jax.measure.verdict import Verdict
from moe_lora_jax.report.style import INK
from moe_lora_jax.report.tokens import token_css


@dataclass(frozen=True)
class Section:
    """One picture or piece of HTML and what it shows, or the reason why there is none.

    name: of the figure, for links and file names. alt: the figure in words, for those who do not see it. content: HTML
    that is well-formed XML, its texts escaped.
    """

    name: str
    title: str
    text: str
    figure: Figure | None = None
    alt: str = ""
    missing: str = ""
    content: str = ""

    @property
    def svg(self) -> Markup | None:
        """The figure as inline SVG: its ink is the colour of the page's text, so it is right in light and dark."""
        if self.figure is None:
            return None
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):  # repeatable, ids of its own
            self.figure.savefig(buffer, format="svg", facecolor="none", metadata=nothing)
        text = buffer.getvalue()
        text = text[text.index("<svg ") :].replace(INK, "currentColor")
        text = re.sub(r'(<(?:g|image)\b[^>]*?) id="[^"]*"', r"\1", text)  # every figure has a "patch_1"
        return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(self.alt)}" ', 1))

    @property
    def html(self) -> Markup:
        """`content`, as the template takes it."""
        return Markup(self.content)

    @property
    def png(self) -> bytes:
        """The figure on white, 150 dots per inch."""
        assert self.figure is not None
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()


def render(title: str, subtitle: str, verdict: Verdict, summary: Summary, sections: Sequence[Section]) -> str:
    """The page: valid HTML that is also well-formed XML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("moe_lora_jax.report").joinpath("page.html").read_text("utf-8"))
    return template.render(
        title=title,
        subtitle=subtitle,
        verdict=verdict,
        table=Markup(summary._repr_html_()),
        sections=sections,
        token_css=Markup(token_css()),
    )
