"""Markdown in a terminal, styled while it streams. Its marks stay, so that text that is copied is whole."""

from __future__ import annotations

from typing import Final

BOLD: Final = "\x1b[1m"
CODE: Final = "\x1b[36m"
PLAIN: Final = "\x1b[0m"


class Styler:
    """Styles a text that comes in pieces of any size; it never holds back more than a run of marks."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._marks = ""  # a run of ` or * that may go on
        self._line_start = True
        self._bold = False
        self._heading = False
        self._code = ""  # the run of ` that began it
        self._fence = False

    def push(self, piece: str) -> str:
        """`piece` with the codes of its style."""
        out: list[str] = []
        for char in piece:
            if self._marks and char != self._marks[0]:
                self._end_marks(out)
            if char in "`*":
                self._marks += char
                continue
            if char == "\n":
                self._end_line(out)
            elif self._line_start and char == "#" and not self._fence and not self._code:
                self._heading = True
                out.append(BOLD)
            out.append(char)
            self._line_start = char == "\n" or (self._line_start and char == " ")
        return "".join(out)

    def end(self) -> str:
        """What was held back, and the codes that end every style."""
        out: list[str] = []
        if self._marks:
            self._end_marks(out)
        if self._bold or self._heading or self._code or self._fence:
            out.append(PLAIN)
        self._reset()
        return "".join(out)

    def _end_marks(self, out: list[str]) -> None:
        marks, self._marks = self._marks, ""
        at_start, self._line_start = self._line_start, False
        if marks[0] == "`":
            self._backticks(marks, out, at_start=at_start)
        elif self._fence or self._code:
            out.append(marks)
        elif len(marks) == 2:
            self._bold = not self._bold
            out.append(BOLD + marks if self._bold else marks + self._style())
        else:
            out.append(marks)

    def _backticks(self, marks: str, out: list[str], *, at_start: bool) -> None:
        if self._fence:
            self._fence = not (at_start and len(marks) >= 3)
            out.append(marks if self._fence else marks + self._style())
        elif at_start and len(marks) >= 3:
            self._fence = True
            out.append(CODE + marks)
        elif not self._code:
            self._code = marks
            out.append(CODE + marks)
        elif marks == self._code:
            self._code = ""
            out.append(marks + self._style())
        else:
            out.append(marks)

    def _end_line(self, out: list[str]) -> None:
        # Bold and code within a line end with it: a mark that nobody closed styles no more than that.
        styled = self._heading or self._bold or bool(self._code)
        self._heading = self._bold = False
        self._code = ""
        if styled and not self._fence:
            out.append(PLAIN)

    def _style(self) -> str:
        return PLAIN + (BOLD if self._bold or self._heading else "")
