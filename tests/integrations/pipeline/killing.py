"""A server that forks runs of the command and kills them: libraries are loaded once, so that many kills are cheap.

Prints a JSON list: for each run of the command how many times it was killed before it went through; runs until there
were enough kills.
"""

import json
import os
import random
import signal
import sys
import time

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


def main(outputs: list[str], argv: list[str]) -> None:
    import optsample_triton.integrations.huggingface  # noqa: F401 (loaded here, not in every child)

    rng = random.Random(0)
    kills, longest = [], 0.0
    for output in outputs:
        if sum(kills) >= ENOUGH:
            break
        count = 0
        while True:
            begun = time.monotonic()
            child = os.fork()
            if not child:
                run([*argv, "--output", output, "--resume"])
            whole = output == outputs[0]  # the first is not killed, and says how long a run takes
            if not whole:
                time.sleep(rng.random() * longest * (0.7 if count < 8 else 1.5))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                break
            count += 1
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"run {output} failed with {status}")
        longest = max(longest, time.monotonic() - begun)
        kills.append(count)
    print(json.dumps(kills))


if __name__ == "__main__":
    separator = sys.argv.index("--")
    main(sys.argv[1:separator], sys.argv[separator + 1 :])
