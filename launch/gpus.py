"""How many GPUs this machine has for us, found out without loading torch into this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.config import UserError

DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of CUDA, of ROCm, of CUDA inside of Windows
WITHIN = 120.0  # seconds: drivers of large machines take their time
PROGRAM = "import torch; print(torch.cuda.device_count())"


def wants_cpu() -> bool:
    """Whether the environment says that GPUs are left alone, as it does for training."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def uses_cpu(env: Mapping[str, str]) -> bool:
    """Whether training with this environment uses no GPU, as far as that can be told at once."""
    return wants_cpu() or not has_driver(env)


def has_driver(env: Mapping[str, str]) -> bool:
    """Whether there is a driver of GPUs, and the environment does not hide them all."""
    hidden = env.get("CUDA_VISIBLE_DEVICES")
    none = hidden is not None and hidden.strip() in ("", "-1")
    return not none and any(Path(one).exists() for one in DEVICES)


def count_gpus() -> int:
    """GPUs that CUDA_VISIBLE_DEVICES leaves visible; USAGE where there are some and torch cannot say."""
    if not has_driver(os.environ):
        return 0
    try:
        return int(ask_torch(PROGRAM))
    except NoAnswer as why:
        raise UserError(
            f"the GPUs of this machine cannot be counted: {why}",
            mend="see whether nvidia-smi answers, or use none: --cpu",
            code="USAGE",
        ) from None


class NoAnswer(Exception):
    """Why torch does not say, in a line."""


def ask_torch(program: str, env: Mapping[str, str] | None = None) -> Any:
    """What a program says of torch in a process of its own: JSON, in its last line; NoAnswer."""
    argv = [sys.executable, "-c", program]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=WITHIN, env=env)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"no answer within {WITHIN:g} seconds") from None
    except (IndexError, ValueError):
        complaint = done.stderr.strip().splitlines() or [f"torch did not say: exit code {done.returncode}"]
        raise NoAnswer(complaint[-1]) from None
