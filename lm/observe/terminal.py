"""Where commands write for people to read."""

from __future__ import annotations

from rich.console import Console


class Terminal(Console):
    """A console that says when its reader has gone, where rich's own ends the process with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError
