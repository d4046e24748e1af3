"""The one error for whatever a user can mend, and the two lines in which every command reports it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

USER_CODES = ("USAGE", "CONFIG", "DATA", "RESUME", "UNSAFE")
USER_EXIT = 2


class UserError(ValueError):
    """The user's input is wrong: `what` and where, how to `mend` it, and the `code` it is reported under.

    `place` names what was being read, as far as it is known: shard, member, offset.
    """

    def __init__(
        self, what: str, *, mend: str, code: str = "DATA", place: dict[str, object] | None = None
    ) -> None:
        assert code in USER_CODES, code
        super().__init__(what)
        self.what = what
        self.mend = mend
        self.code = code
        self.place = place or {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Exceptions cross from worker processes; the usual way would forget the keywords."""
        return partial(UserError, mend=self.mend, code=self.code, place=self.place), (self.what,)


def fatal_line(code: str, *, rank: int, hint: str, place: dict[str, object] | None = None) -> str:
    """The last line on stderr of every command that fails; scripts read it."""
    fields = {"code": code, "rank": rank, **(place or {})}
    words = " ".join(f"{name}={_word(value)}" for name, value in fields.items())
    return f"FATAL {words} hint={json.dumps(hint, ensure_ascii=False)}"


def user_error_text(error: UserError, *, rank: int = 0) -> str:
    """What is wrong (one line a mistake), then the FATAL line that says how to mend it."""
    what = "\n".join(f"error: {line}" for line in error.what.splitlines())
    return f"{what}\n{fatal_line(error.code, rank=rank, hint=error.mend, place=error.place)}"


def first_line(error: Exception) -> str:
    """What an exception of somebody else's says, in one line; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _word(value: object) -> str:
    text = str(value)
    plain = text and not any(letter.isspace() or letter in "\"'=" for letter in text)
    return text if plain else json.dumps(text)
