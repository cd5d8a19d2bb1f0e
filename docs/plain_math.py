"""Render the formulas of the docstrings as HTML, without MathJax from another host."""

from __future__ import annotations

import html
import re

from docutils.nodes import SkipNode

SYMBOLS = {
    r"\lceil": "⌈",
    r"\rceil": "⌉",
    r"\left": "",
    r"\right": "",
    r"\ge": "≥",
    r"\le": "≤",
    r"\times": "\N{MULTIPLICATION SIGN}",
    r"\cdot": "·",
    r"\Delta": "Δ",
    r"\sum": "∑",
    r"\log": "\N{SQUARE LOG} ",  # one character until the variables are in italics
}

UNDERSCORE = "\N{FULLWIDTH LOW LINE}"


def to_html(formula: str) -> str:
    """Convert letters, numbers, the symbols above, square roots, indices and exponents to HTML.

    An exponent may contain indices; other nesting is not supported.

    Raises:
        ValueError: if the formula contains anything else.
    """
    formula = re.sub(r"\\sqrt\{([^{}]*)\}", r"√(\1)", formula)
    for name, symbol in SYMBOLS.items():
        formula = re.sub(re.escape(name) + r"(?![A-Za-z])", symbol, formula)
    formula = formula.replace("⌈ ", "⌈").replace(" ⌉", "⌉").replace("Δ ", "Δ")
    text = html.escape(formula)
    text = re.sub(r"(?<=[A-Za-z]{2})_(?=[A-Za-z]{2})", UNDERSCORE, text)  # in names such as num_classes
    text = re.sub(r"(?<![A-Za-z&])([A-Za-z]+)(?![A-Za-z;])", r"<i>\1</i>", text)
    text = re.sub(r"_(?:\{([^{}]*)\}|(<i>.*?</i>|\w))", lambda match: f"<sub>{match[1] or match[2]}</sub>", text)
    text = re.sub(r"\^(?:\{([^{}]*)\}|(<i>.*?</i>|\w))", lambda match: f"<sup>{match[1] or match[2]}</sup>", text)
    text = text.replace("\N{SQUARE LOG}", "log").replace(UNDERSCORE, "_")
    if set(text) & set("\\{}^"):
        raise ValueError(f"docs/plain_math.py does not support the formula {formula!r}.")
    return text


def visit(translator, node) -> None:
    text = to_html(node.astext())
    translator.body.append(f'<span class="math">{text}</span>')
    raise SkipNode


def visit_block(translator, node) -> None:
    translator.body.append(f'<p class="math">{to_html(" ".join(node.astext().split()))}</p>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("plain", (visit, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
