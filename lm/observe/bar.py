"""A progress bar for work of known size: on a terminal, and gone when the work is done."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, TaskID


class Bar:
    """Call it with what is being done, how much of it is done and how much there is; each piece of work has a line."""

    def __init__(self, console: Console):
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._progress.start()
            self._tasks[what] = self._progress.add_task(what.replace("[", r"\["), total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)
        if done >= total:
            self._progress.update(self._tasks[what], visible=False)
