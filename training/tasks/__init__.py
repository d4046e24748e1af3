"""What a network is trained to do, by name: its loss, its sums over a split, its scores."""

from collections.abc import Callable

from training.tasks.multiclass import multiclass
from training.tasks.task import Task

TASKS: dict[str, Callable[[int], Task]] = {"multiclass": multiclass}
