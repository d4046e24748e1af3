"""What a person sees while it runs: a live line on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Console:
    """Prints for one process; `active` is false for all but process zero and for --quiet."""

    def __init__(self, *, active: bool, every_seconds: float) -> None:
        self._active, self._every = active, every_seconds
        self._rich = RichConsole(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last = (time.monotonic(), 0)  # when the last line was printed, and the samples done by then

    def say(self, text: str) -> None:
        """One line; on a terminal it scrolls above the live one."""
        if self._active:
            (self._bar.console if self._bar else self._rich).print(text, markup=False)

    def begin(self, *, step: int, steps: int, samples: int) -> None:
        """Start the live line at `step` of `steps`."""
        self._last = (time.monotonic(), samples)
        if self._active and self._rich.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self._bar = Progress(
                *columns, TextColumn("{task.fields[row]}"), TimeRemainingColumn(), console=self._rich
            )
            self._task = self._bar.add_task("training", total=steps, completed=step, row="")
            self._bar.start()

    def step(self, *, step: int, steps: int, epoch: int, loss: float, lr: float, samples: int) -> None:
        """Show a finished optimizer step (`step` of `steps` done, `samples` in the whole run)."""
        if not self._active:
            return
        since, before = self._last
        elapsed = time.monotonic() - since
        row = f"loss {loss:.4f}  rate {lr:.2e}"
        if self._bar is not None:
            speed = (samples - before) / max(elapsed, 1e-9)
            row = f"{row}  {speed:,.0f} images/s"
            self._bar.update(self._task, completed=step, description=f"epoch {epoch + 1}", row=row)
            if elapsed > self._every:
                self._last = (time.monotonic(), samples)
        elif elapsed >= self._every or step == steps:
            speed = (samples - before) / max(elapsed, 1e-9)
            left = (steps - step) * (elapsed / max(1, samples - before)) * (samples / step)
            self.say(
                f"epoch {epoch + 1}  step {step}/{steps}  {row}  {speed:,.0f} images/s  {_clock(left)} left"
            )
            self._last = (time.monotonic(), samples)

    def end(self) -> None:
        """Leave the live line as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
