"""A thread that watches over a job: it hears of the others' ends, sees that all go on, and ends this process.

It wakes twice a second. Collectives cannot be relied upon to notice anything: with NCCL, who waits for a
process that is gone waits for ever. Ends of this machine's processes are told by the kernel, those of others
by their connection with process zero, which also adds up everybody's signs of progress.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from training.vigil.contact import LOST, Contact, Message, lost_words
from training.vigil.ending import EXIT_CODES, Ending, Failure, speak
from training.vigil.guard import Guard
from training.vigil.pace import TICK, Pace
from training.vigil.pid_files import PidFiles
from training.vigil.place import Place
from training.vigil.siblings import Sibling, is_stopped
from training.vigil.stacks import end_one_that_does_not_answer, write_own
from training.vigil.verdict import Sight, stands_still

HEARSAY = 0.4  # seconds in which a process that is gone may have told why
PARTING = 10.0  # the same while all leave, having done what they should
GRACE = 1.5  # seconds for the main thread to say its own last words
LATER = 1.0  # seconds after process zero, who knows more, the others find a hang
LINES = 8  # processes that a message describes
DISK = 2.0  # seconds for a word in the run directory, which may be beyond the link that is gone
AGAIN = "start the same command again to resume"
FOUND = f"{AGAIN}; lockstep launch --max-restarts does so by itself"


class Vigil:
    """One of the watchers over a job, each in a process of its own."""

    def __init__(
        self,
        place: Place,
        siblings: Sequence[Sibling],
        contact: Contact,
        *,
        hang_seconds: float,
        compiles: bool = False,
    ) -> None:
        self._place, self._siblings, self._contact = place, siblings, contact
        self._me, self._hang_seconds = siblings[place.rank], hang_seconds
        self._pace = Pace(place, compiles=compiles)
        self._near = PidFiles(
            one for one in siblings if one.machine == self._me.machine and one.pid != self._me.pid
        )
        self._gone: dict[int, tuple[float, str]] = {}  # since when, and how, by rank
        self._lost: dict[int, float] = {}  # since when, by rank
        self._parting: set[int] = set()
        self._ending: Ending | None = None
        self._known, self._stopped, self._leave_at = threading.Event(), False, float("inf")
        self._concludes = threading.Lock()
        self._guard = Guard(self._me, hang_seconds) if self._leads() else None
        self._thread = threading.Thread(target=self._watch, name="vigil", daemon=True)

    def _leads(self) -> bool:
        """Whether this is the first process of its machine."""
        return self._me.rank == min(one.rank for one in self._siblings if one.machine == self._me.machine)

    def start(self) -> None:
        """Begin; the thread ends with the process."""
        self._thread.start()

    def part(self) -> None:
        """All went well here; from now on a process that ends without a word may have done so too."""
        self._parting = set(range(len(self._siblings)))

    def stop(self) -> None:
        """All went well everywhere: nobody has to be watched any more."""
        self._stopped = True
        self._contact.send({"farewell": True})

    def settle(self, patience: float) -> Ending | None:
        """How the job ends, as soon as that is known; None after `patience` seconds."""
        self._known.wait(patience)
        return self._ending

    def announce(self, ending: Ending) -> None:
        """Tell the other processes how the job ends; what they say after that is no news."""
        with self._concludes:
            if self._ending is not None:
                return
            self._ending = ending
        self._leave_at = time.monotonic() + GRACE
        self._contact.send({"ending": ending.as_json()})
        if ending.code == "HANG":
            self._leave_at += GRACE
            threading.Thread(target=self._write_stacks, name="stacks", daemon=True).start()
        self._known.set()

    def _watch(self) -> None:
        while not self._stopped:
            hurried = bool(self._gone or self._lost) or self._ending is not None
            ready = self._near.wait(self._contact.files(), seconds=TICK / 5 if hurried else TICK)
            now = time.monotonic()
            for sibling, how in self._near.ended(ready):
                self._gone.setdefault(sibling.rank, (now, how))
            for rank, message in self._contact.receive(ready):
                self._hear(rank, message, now)
            if self._ending is None:
                self._mourn(now)
            elif now >= self._leave_at and not self._stopped:
                os._exit(self._ending.exit_code)
            if self._ending is None and self._pace.due(now):
                self._look(now)

    def _hear(self, rank: int, message: Message | None, now: float) -> None:
        if message is None:
            # How a process of this machine ended the kernel tells, a moment after it has closed its files.
            if not self._near.sees(self._siblings[rank]):
                self._gone.setdefault(rank, (now, "is gone"))
        elif message is LOST:
            self._lost.setdefault(rank, now)
        elif "ending" in message:
            self.announce(Ending(**message["ending"]))
        elif "farewell" in message:
            self._parting.add(rank)
        else:
            self._pace.heard(rank, message, now)

    def _mourn(self, now: float) -> None:
        """Say of a process that ended without a word that, and how, it did; of hosts, that they are lost."""
        if self._lost and now - min(self._lost.values()) >= HEARSAY:
            lost = [self._siblings[rank] for rank in sorted(self._lost)]
            what = f"error: {lost_words(lost)}"
            self._end("RENDEZVOUS", lost[0].rank, what, FOUND)
            return
        for rank, (since, how) in self._gone.items():
            quiet = rank in self._parting and "signal" not in how
            if now - since >= (PARTING if quiet else HEARSAY):
                if not how:
                    self.announce(Ending("INTERRUPTED", 128 + signal.SIGTERM, rank))
                    return
                sibling = self._siblings[rank]
                far = sibling.machine != self._me.machine
                what = f"error: process {rank} on {sibling.host} {how}"
                what += ", or its host cannot be reached" if far else ""
                self._end("CRASH", rank, what, AGAIN)
                return

    def _look(self, now: float) -> None:
        self._contact.send(self._pace.look(now), news=True)
        if self._guard is not None:
            near = [self._me, *self._near.alive]
            self._guard.reassure(near, self._place, alone=len(self._siblings) == 1)
        if self._pace.silence >= self._hang_seconds + (LATER if self._place.rank else 0):
            self._hang(now)

    def _hang(self, now: float) -> None:
        """Say which process stands still, as far as that can be told."""
        sights = self._pace.sights(now)
        near = {one.rank: one.pid for one in self._near.alive}
        for rank, sight in sights.items():
            sights[rank] = replace(sight, stopped=rank in near and is_stopped(near[rank]))
        still = stands_still(sights)
        rank = (still or sorted(sights))[0]
        who = f"process {rank} stands still" if still else "nothing tells which process the others wait for"
        lines = [f"error: no progress for {self._hang_seconds:g} seconds: {who}"]
        shown = sorted([*still, *(one for one in sights if one not in still)][:LINES])
        lines += [f"  process {one} on {self._siblings[one].host}: {sights[one].words()}" for one in shown]
        hint = f"see {self._place.run_dir}/stacks; where a step takes that long, raise --train.hang-minutes"
        self._end("HANG", rank, "\n".join(lines), hint, sights[rank])

    def _end(self, code: str, rank: int, what: str, hint: str, sight: Sight | None = None) -> None:
        """Speak for a process that does not, unless another survivor has, and end the job."""
        # What was heard of a process that does not answer is old; they walk in step, so ours is close.
        known = sight is not None and sight.answers
        step = sight.step if sight is not None and known else self._place.step
        failure = Failure(
            code,
            rank,
            self._siblings[rank].host,
            what,
            hint,
            step=None if step is None else step + 1,
            samples=sight.samples if sight is not None and known else (),
        )
        if code == "RENDEZVOUS":
            late = threading.Timer(DISK, os._exit, (EXIT_CODES[code],))
            late.daemon = True
            late.start()
        if failure.write(self._place.run_dir, first=True):
            speak(f"{what}\n{failure.line()}")
        self.announce(Ending(code, EXIT_CODES[code], rank))

    def _write_stacks(self) -> None:
        """Every process writes its own; who does not, and is of this machine, is made to."""
        run_dir = self._place.run_dir
        if run_dir is not None and run_dir.is_dir():
            write_own(run_dir, self._me.rank)
        time.sleep(GRACE / 2)
        for sibling in self._near.alive:
            end_one_that_does_not_answer(run_dir, sibling)
        self._leave_at = time.monotonic()
