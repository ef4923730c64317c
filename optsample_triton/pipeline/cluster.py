"""A run on a Ray cluster: actors that hold both models draw the batches, this process commits them in order.

One actor draws a whole batch, so its samples are the same as on one machine. If an actor dies, Ray restarts it with its
batch. If the run dies, it resumes like any other, since this process writes the files.
"""

from __future__ import annotations

import itertools
import logging
import pickle
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from optsample_triton.pipeline.encode import Encoder
from optsample_triton.pipeline.engines import Engine, engine
from optsample_triton.pipeline.job import Job, PipelineError, first_line, need
from optsample_triton.pipeline.records import Completion, Request

WINDOW = 2048  # batches given to Ray at once; the actors load their models once for all of them
log = logging.getLogger("optsample_triton.pipeline")


class Worker:
    """What runs in an actor: the job's engine, on rows that each hold one pickled batch."""

    def __init__(self, job: Job):
        import torch

        torch.set_num_threads(max(1, int(job.cpus_per_worker)))
        self._job = job
        self._engine: Engine | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        requests: list[Request] = pickle.loads(row["requests"])
        try:
            if self._engine is None:
                self._engine = engine(self._job, Encoder(self._job))
            return {"number": row["number"], "completions": pickle.dumps(self._engine.run(requests)), "error": ""}
        except PipelineError as error:  # returned as data, since Ray would bury it in long tracebacks or drop it
            return {"number": row["number"], "completions": b"", "error": str(error)}


def drawn(job: Job, planned: Iterable[Any]) -> Generator[tuple[Any, list[Completion]], None, None]:
    """Each planned batch with its completions, in the plan's order."""
    ray, data = need("ray", "ray"), need("ray.data", "ray")
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=job.address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PipelineError(f"no Ray cluster at {job.address or 'this machine'}: {first_line(error)}") from error
    try:
        data.DataContext.get_current().enable_progress_bars = False
        workers = workers_for(job, ray.cluster_resources())
        log.info("Ray: %d workers, each with %g CPU and %g GPU", *workers)
        source = iter(planned)
        while window := list(itertools.islice(source, WINDOW)):
            yield from _window(job, data, window, workers)
    finally:
        if started:
            ray.shutdown()


def _window(job: Job, data: Any, window: list[Any], workers: Workers) -> Iterator[tuple[Any, list[Completion]]]:
    done: dict[int, list[Completion]] = {k: [] for k, batch in enumerate(window) if not batch.requests}
    rows = [{"number": k, "requests": pickle.dumps(batch.requests)} for k, batch in enumerate(window) if batch.requests]
    with closing(_completed(job, data, rows, workers)) as results:  # closed before Ray is shut down, which it needs
        for k, batch in enumerate(window):
            while k not in done:
                try:
                    row = next(results)
                except StopIteration:
                    raise PipelineError(f"Ray ended without batch {k} of {len(window)}") from None
                except Exception as error:  # Ray wraps a worker's exception in several of its own
                    raise PipelineError(f"a Ray worker failed: {first_line(error)}") from error
                if row["error"]:
                    raise PipelineError(row["error"])
                done[int(row["number"])] = pickle.loads(row["completions"])
            yield batch, done.pop(k)


def _completed(job: Job, data: Any, rows: list[dict[str, Any]], workers: Workers) -> Generator[Any, None, None]:
    """The workers' results for the rows, in any order."""
    if not rows:
        return
    pool = data.ActorPoolStrategy(size=min(workers.number, len(rows)))
    # One block per batch, so that the batches spread over all workers and a worker's death costs one batch.
    made = data.from_items(rows, override_num_blocks=len(rows)).map(
        Worker, fn_constructor_args=(job,), compute=pool, num_cpus=workers.cpus, num_gpus=workers.gpus or None
    )
    yield from made.iter_rows()


class Workers(NamedTuple):
    """How many workers there are, and what each takes from the cluster."""

    number: int
    cpus: float
    gpus: float


def workers_for(job: Job, resources: dict[str, float]) -> Workers:
    """One worker per GPU if there are any, else one per two CPU slots, since Ray's readers need slots too."""
    slots, cards, cpus = resources.get("CPU", 1), resources.get("GPU", 0), job.cpus_per_worker
    gpus = job.gpus_per_worker if job.gpus_per_worker is not None else float(cards > 0)
    fitting = cards / gpus + 1e-6 if gpus else slots / (2 * cpus)
    number = job.workers or max(1, int(fitting))
    if gpus and number > fitting:
        raise PipelineError(
            f"{number} workers of {gpus:g} GPUs are more than the {cards:g} there are, so Ray would wait for ever: "
            "lower --workers or --gpus-per-worker"
        )
    if number * cpus >= slots:
        raise PipelineError(
            f"{number} workers of {cpus:g} CPU slots leave none of the {slots:g} there are for Ray's readers, which "
            "would wait for ever: lower --workers or --cpus-per-worker"
        )
    return Workers(number, cpus, gpus)
