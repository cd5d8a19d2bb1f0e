"""Show the small formulas of the docstrings as HTML, so that the pages need no script from another site."""

from __future__ import annotations

import html
import re

from docutils.nodes import SkipNode

SYMBOLS = {r"\lceil": "⌈", r"\rceil": "⌉", r"\ge": "≥", r"\le": "≤", r"\Delta": "Δ"}


def to_html(formula: str) -> str:
    """Turn letters, numbers, the symbols above and one-level indices into HTML.

    Raises:
        ValueError: if the formula needs more than that.
    """
    for name, symbol in SYMBOLS.items():
        formula = re.sub(re.escape(name) + r"(?![A-Za-z])", symbol, formula)
    formula = formula.replace("⌈ ", "⌈").replace(" ⌉", "⌉").replace("Δ ", "Δ")
    text = html.escape(formula)
    text = re.sub(r"(?<![A-Za-z&])([A-Za-z]+)(?![A-Za-z;])", r"<i>\1</i>", text)
    text = re.sub(r"_(?:\{([^{}]*)\}|(<i>.*?</i>|\w))", lambda match: f"<sub>{match[1] or match[2]}</sub>", text)
    if set(text) & set("\\{}^"):
        raise ValueError(f"docs/plain_math.py cannot show the formula {formula!r}.")
    return text


def visit(translator, node) -> None:
    text = to_html(node.astext())
    translator.body.append(f'<span class="math">{text}</span>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("plain", (visit, None), (visit, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
