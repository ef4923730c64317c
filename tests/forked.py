"""What the sharded tests run in several processes, and what these hand back."""

import multiprocessing
import queue
import sys
from collections.abc import Callable
from datetime import timedelta

LIMIT = timedelta(minutes=10)  # for a collective: much more than a busy machine needs


def results_by_rank(run: Callable[..., None], count: int, *arguments: object) -> list:
    """What run(rank, *arguments, results) puts into results as (rank, value), for each of `count` processes."""
    # Forked before torch starts a thread: one import serves all.
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    running = [context.Process(target=run, args=(rank, *arguments, results)) for rank in range(count)]
    for process in running:
        process.start()
    found: dict = {}
    while len(found) < count:
        try:
            found |= [results.get(timeout=1)]
        except queue.Empty:
            if any(process.exitcode for process in running):
                for process in running:
                    process.kill()  # they wait for the one that failed
                sys.exit("a process failed")
    for process in running:
        process.join()
    return [found[rank] for rank in range(count)]
