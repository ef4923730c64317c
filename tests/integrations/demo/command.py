"""The demo's command in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SAMPLES, TOKENS = 1, 8  # the machine that runs all integrations has little time
# Whoever has set these for himself would see other colours.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM", "COLUMNS")}


class Run(NamedTuple):
    cache: Path
    folder: Path
    out: str
    err: str


def demo(*arguments: object, code: int = 0, **environment: str) -> tuple[str, str]:
    """What the command printed."""
    command = "import sys; from optsample_triton.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", command, "demo", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr
