"""Plain text for a person: headings, paragraphs and tables, at most 100 columns wide."""

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

WIDTH = 100
_INDENT = "   "
_BOLD, _GREEN, _RED = "1", "32", "31"


class Report:
    """Writes to ``out``; coloured only on a terminal, and not when NO_COLOR is set."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        # https://no-color.org: set and not empty.
        self._coloured = self._out.isatty() and not os.environ.get("NO_COLOR")
        self._steps = 0

    def title(self, text: str) -> None:
        self._line(self._colour(_BOLD, text))

    def step(self, text: str) -> None:
        """The numbered heading of the next step."""
        self._steps += 1
        self._line()
        self._wrapped(text, f"{self._steps}. ", _BOLD)

    def text(self, text: str) -> None:
        self._wrapped(text, _INDENT)

    def note(self, text: str) -> None:
        """A remark below a table."""
        self._line()
        self.text(text)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns as wide as their widest cell; a line too long for the page ends in "..."."""
        lines = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        self._line()
        for line in lines:
            cells = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            self._line(_clip(_INDENT + cells.rstrip()))

    def good(self, text: str) -> None:
        """The verdict when everything is as it should be."""
        self._line()
        self._wrapped(text, "", _GREEN)

    def bad(self, text: str) -> None:
        """The verdict when something is not."""
        self._line()
        self._wrapped(text, "", _RED)

    def pair(self, name: str, value: str) -> None:
        """``name: value`` with the value's further lines under its first."""
        self._wrapped(value, f"{_INDENT}{name + ':':<10}")

    def verbatim(self, text: str) -> None:
        """Lines as they are, a log's say."""
        self._line()
        for line in text.splitlines():
            self._line(line)

    def _wrapped(self, text: str, first: str, colour: str = "") -> None:
        for line in textwrap.wrap(
            text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first)
        ):
            self._line(self._colour(colour, line) if colour else line)

    def _colour(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._coloured else text

    def _line(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)


def _clip(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
