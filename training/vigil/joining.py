"""How the processes of a job get to know one another, and the watch over them begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.config import Config
from training.vigil import Vigil
from training.vigil.contact import Contact
from training.vigil.ending import speak
from training.vigil.place import Place
from training.vigil.siblings import Sibling, introduce
from training.vigil.stacks import prepare

if TYPE_CHECKING:
    from accelerate import Accelerator


def watch_over(place: Place, accelerator: Accelerator, config: Config, *, compiles: bool = False) -> None:
    """Watch over this job from now on, in a thread; every process comes here, as soon as they have joined.

    `compiles`: its first step may take any time.
    """
    from accelerate.utils import gather_object

    rank, several = accelerator.process_index, accelerator.num_processes > 1
    place.joined(rank)
    contact = Contact()
    port = contact.listen() if several and rank == 0 else 0
    me = introduce(rank, stacks=prepare(), port=port, token=contact.token)
    siblings = [Sibling(*one) for one in gather_object([tuple(me)])] if several else [me]
    if rank:
        try:
            contact.connect(siblings[0], rank=rank)
        except OSError as error:
            where = f"{siblings[0].host}, port {siblings[0].port}: {error}"
            speak(f"process {rank} cannot reach process 0 on {where}; each learns of the other by time-outs")
    hang_seconds = 60 * config.train.hang_minutes
    vigil = Vigil(place, siblings, contact, hang_seconds=hang_seconds, compiles=compiles)
    place.watcher = vigil
    vigil.start()
