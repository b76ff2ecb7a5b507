"""A table of text, as Markdown or for a terminal."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

TEXTS = ("Tool", "Format", "Method", "Operation", "Elements", "Scales")  # columns that are aligned to the left


@dataclass(frozen=True)
class Table:
    title: str
    notes: tuple[str, ...]  # one line each: data, device, settings and sources of the numbers
    frame: pd.DataFrame  # text, ready to print

    def markdown(self) -> str:
        notes = "".join(f"- {note}\n" for note in self.notes)
        return "\n".join(part for part in (f"**{self.title}**\n", notes, f"{self._body('pipe')}\n") if part)

    def terminal(self) -> str:
        notes = "".join(f"  {note}\n" for note in self.notes)
        return f"{self.title}\n{notes}\n{self._body('simple')}\n"

    def _body(self, style: str) -> str:
        align = ["left" if name in TEXTS else "right" for name in self.frame.columns]
        text = self.frame.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)
        return "\n".join(line.rstrip() for line in text.splitlines())
