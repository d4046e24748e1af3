"""What a person sees while it runs: a live line on a terminal, plain lines every few seconds elsewhere.

`every_seconds` 0 is a line for every step, on a terminal too.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class Console:
    """Prints for one process; `active` is false for all but process zero and for --quiet."""

    def __init__(self, *, active: bool, every_seconds: float) -> None:
        self._active, self._every = active, every_seconds
        self._rich = RichConsole(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        # The window that speed is measured over: when it began, and samples done by then.
        self._since = (time.monotonic(), 0)
        self._speed = 0.0  # images/s of the last whole window
        self._printed = time.monotonic()
        self._lost = False  # whether a line could not be written

    def say(self, text: str) -> None:
        """One line; on a terminal it scrolls above the live one.

        A full disk behind the standard output is no reason to end a training.
        """
        if self._active:
            try:
                (self._bar.console if self._bar else self._rich).print(text, markup=False)
            except BrokenPipeError:  # whoever read it has left, and means us to leave too
                raise
            except OSError as error:
                if not self._lost:
                    print(f"warning: standard output: {error.strerror}; its lines are lost", file=sys.stderr)  # noqa: T201
                self._lost = True

    def begin(self, *, step: int, steps: int) -> None:
        """Start the live line at `step` of `steps`."""
        if self._active and self._rich.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            row, left = TextColumn("{task.fields[row]}"), TextColumn("{task.fields[left]}")
            self._bar = Progress(*columns, row, left, console=self._rich)
            self._task = self._bar.add_task("training", total=steps, completed=step, row="", left="")
            self._bar.start()

    def work_begins(self, *, samples: int) -> None:
        """Training starts, or goes on after a pause that does not belong into its speed."""
        self._since = (time.monotonic(), samples)

    def step(self, *, step: int, steps: int, epoch: int, loss: float | None, lr: float, samples: int) -> None:
        """Show a finished optimizer step (`step` of `steps` done, `samples` in the whole run).

        `loss` None: it is not finite.
        """
        if not self._active:
            return
        now, (since, before) = time.monotonic(), self._since
        if now - since >= 1:
            self._speed = (samples - before) / (now - since)
            self._since = (now, samples)
        row, left = f"loss {'not finite' if loss is None else f'{loss:.4f}'}  rate {lr:.2e}", ""
        if self._speed > 0:
            row += f"  {self._speed:,.0f} images/s"
            left = f"{_clock((steps - step) * (samples / step) / self._speed)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"epoch {epoch + 1}", row=row, left=left)
        if self._bar is not None and self._every > 0:
            return
        if now - self._printed >= self._every or step == steps:
            self.say(f"epoch {epoch + 1}  step {step}/{steps}  {row}  {left}".rstrip())
            self._printed = now

    def end(self) -> None:
        """Leave the live line as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
