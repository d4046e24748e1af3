"""The `lockstep` command: runs what was asked for, and says what goes wrong in two lines and an exit code."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from typing import NamedTuple

from training.config import UserError, fatal_line, user_error_text


class Command(NamedTuple):
    """Where a command lives, as "package.module:function" of its arguments, and its line in the list."""

    target: str
    help: str


COMMANDS = {
    "pack": Command("data_pipeline.pack_command:pack", "make a data set of your pictures"),
    "index": Command("data_pipeline.index_command:index", "make a data set of tars, as they are"),
    "show": Command(
        "data_pipeline.show_command:show", "look at a data set: a picture grid and its table of classes"
    ),
    "doctor": Command("launch.doctor:doctor", "find what would waste a run: in a data set, on this machine"),
    "launch": Command(
        "launch.launch_command:launch", "start training/run.py on this machine, on several, or in SLURM"
    ),
}


def main() -> None:
    """Run the command on the command line and end the process."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run one command; the exit code. Nothing that a user can mend ends in a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names and terminals have encodings of their own.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(user_error_text(error) + "\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush fails once more
        return 141
    except OSError as error:
        sys.stderr.write(_storage_text(error) + "\n")
        return 74
    return code


def _dispatch(argv: list[str]) -> int:
    """A command that has more than done or not done to say returns its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(overview() + "\n")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"unknown command {name!r}", mend=f"{meant}lockstep --help lists the commands", code="USAGE"
        )
    module, function = COMMANDS[name].target.split(":")
    return getattr(importlib.import_module(module), function)(argv[1:]) or 0


def overview() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  lockstep {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: lockstep COMMAND ...   (lockstep COMMAND --help says more)", "", *lines])


def _storage_text(error: OSError) -> str:
    what = error.strerror or str(error)
    where = f": '{error.filename}'" if error.filename is not None else ""
    hint = "make room or give another place, then start again"
    return f"error: {what}{where}\n{fatal_line('STORAGE', rank=0, hint=hint)}"


if __name__ == "__main__":
    main()
