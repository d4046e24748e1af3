"""Which process of a machine says a mistake that all of them make, before they know one another."""

from __future__ import annotations

import os
import select
import signal

from training.vigil.place import Place

SPOKEN_WITHIN = 15.0  # seconds for the first process of a machine to find the mistake that all make
ENDS = (signal.SIGTERM, signal.SIGINT)  # with which launchers end their processes
# Variables of those who end all processes with the first that fails; srun by itself lets the others run.
LAUNCHERS = {"LOCKSTEP_START", "TORCHELASTIC_RUN_ID"}


def is_said_by_another(place: Place) -> bool:
    """Whether another process says the mistake that this one has found and ends with; for the main thread.

    A launcher ends all at the first process that leaves, so this one stays until that happens: the one that
    speaks may be slower. If nobody ends it in time, the mistake may be its own.
    """
    if place.speaks:
        return False
    if not LAUNCHERS & os.environ.keys():
        return True
    heard, told = os.pipe()
    os.set_blocking(told, False)
    for number in ENDS:
        signal.signal(number, lambda _number, _frame: None)
    signal.set_wakeup_fd(told)  # from here on the thread of early_signals hears nothing
    return bool(select.select([heard], [], [], SPOKEN_WITHIN)[0])
