"""Converts this project's docstrings to reStructuredText.

Docstrings are plain prose. Indented lines are formulas, which Sphinx would render as quotations. A line that begins
with a parameter's name and a colon describes the parameter; Sphinx would join such lines to one paragraph. |x| and E*
are mathematics, which Sphinx would read as markup.
"""

from __future__ import annotations

import re
from typing import Any

LITERAL = re.compile(r"(``.*?``|:\w+:`[^`]*`)", re.DOTALL)
# "codes: …", "activations ``[tokens, K]``, gram or hessian ``[…]``: …", "first and last: …"
NAMES = r"[A-Za-z_]\w*(?: ``[^`]*``)?"
DESCRIPTION = re.compile(rf"({NAMES}(?:(?:, | and | or |, and ){NAMES})*): (?=\S)")


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's hook `autodoc-process-docstring`: changes `lines` in place."""
    lines[:] = convert(lines)


def convert(lines: list[str]) -> list[str]:
    """The lines of one docstring as reStructuredText. Its first paragraph is its summary and describes no parameter."""
    out: list[str] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            out += [*_paragraph(paragraph, is_summary=not out), ""]
            paragraph = []
    return out


def _paragraph(lines: list[str], is_summary: bool) -> list[str]:
    if lines[0].startswith(" "):
        return ["::", "", *lines]
    entries: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        described = None if is_summary else DESCRIPTION.match(line)
        if described and len(described[1]) <= 120:
            entries.append((described[1], [line[described.end() :]]))
        else:
            entries[-1][1].append(line.strip())
    out = _escape(entries[0][1])
    for names, text in entries[1:]:
        first, *rest = _escape(text)
        out += ["", f"- {_bold(names)}: {first}", *(f"  {line}" for line in rest)]
    return out


def _bold(names: str) -> str:
    """Every name in bold, but neither its shape nor the words between."""
    return "".join(
        part if part.startswith("``") else re.sub(r"\b(?!and\b|or\b)(\w+)", r"**\1**", part)
        for part in LITERAL.split(names)
    )


def _escape(lines: list[str]) -> list[str]:
    parts = LITERAL.split("\n".join(lines))
    parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts).split("\n")
