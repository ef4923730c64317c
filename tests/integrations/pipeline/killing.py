"""A server that forks runs of the command and kills them: libraries are loaded once, so that many kills are cheap.

Prints a JSON list: for each run of the command how many times it was killed before it completed; it ends when there
were enough kills.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from optsample_triton import cli

ENOUGH = 12  # kills; a slow machine needs more of the outputs for them

torch.set_num_threads(1)  # before anything starts a thread, since children are forked


def run(argv: list[str]) -> None:
    """In a child; its output goes nowhere."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os._exit(cli.main(argv))


def written(output: str) -> int:
    """The bytes in the files of a run."""
    return sum(path.stat().st_size for path in Path(output).parent.glob("*.jsonl"))


def main(outputs: list[str], argv: list[str]) -> None:
    import optsample_triton.integrations.huggingface  # noqa: F401 (loaded here, not in every child)

    rng = random.Random(0)
    kills: list[int] = []
    for output in outputs:
        if sum(kills) >= ENOUGH:
            break
        count = 0
        while True:
            before = written(output)
            child = os.fork()
            if not child:
                run([*argv, "--output", output, "--resume"])
            ended = 0
            if output != outputs[0]:  # the first is not killed, and says how much a run writes
                # Now and then at the start; up to 1.3 of what a run writes, so that one comes to its end.
                share = rng.random() if rng.random() < 0.75 else 0.0
                limit = before + share * (1.3 * written(outputs[0]) - before)
                while written(output) < limit and not ended:
                    time.sleep(0.001)
                    ended, status = os.waitpid(child, os.WNOHANG)
                for _ in range(rng.randrange(100_000)):  # anywhere between two writes
                    pass
                if not ended:
                    os.kill(child, signal.SIGKILL)
            if not ended:
                _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                break
            count += 1
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"run {output} failed with {status}")
        kills.append(count)
    print(json.dumps(kills))


if __name__ == "__main__":
    separator = sys.argv.index("--")
    main(sys.argv[1:separator], sys.argv[separator + 1 :])
