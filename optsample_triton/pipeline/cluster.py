"""The batches of a run over a Ray cluster: actors that hold both models draw them, this process commits them in order.

A batch is drawn whole by one actor, so its samples are those of a run on one machine. An actor that dies is started
again by Ray, with its batch; a run that dies is gone on with like any other, since the files are written here.
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

WINDOW = 2048  # batches that Ray is given at once: actors load their models once for so many
log = logging.getLogger("optsample_triton.pipeline")


class Worker:
    """What runs in an actor: the engine of the job, on rows of one pickled batch each."""

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
        except PipelineError as error:  # as data: Ray would wrap it in pages of its own, and drop it of a constructor
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
        each = share(job, ray.cluster_resources())
        log.info("Ray: %d workers, each with %g CPU and %g GPU", *each)
        source = iter(planned)
        while window := list(itertools.islice(source, WINDOW)):
            yield from _window(job, data, window, each)
    finally:
        if started:
            ray.shutdown()


def _window(job: Job, data: Any, window: list[Any], each: Share) -> Iterator[tuple[Any, list[Completion]]]:
    done: dict[int, list[Completion]] = {k: [] for k, batch in enumerate(window) if not batch.requests}
    rows = [{"number": k, "requests": pickle.dumps(batch.requests)} for k, batch in enumerate(window) if batch.requests]
    with closing(_completed(job, data, rows, each)) as results:  # before Ray is shut down, which they need
        for k, batch in enumerate(window):
            while k not in done:
                try:
                    row = next(results)
                except StopIteration:
                    raise PipelineError(f"Ray has ended without batch {k} of {len(window)}") from None
                except Exception as error:  # a worker's exception comes wrapped in several of Ray's
                    raise PipelineError(f"a Ray worker failed: {first_line(error)}") from error
                if row["error"]:
                    raise PipelineError(row["error"])
                done[int(row["number"])] = pickle.loads(row["completions"])
            yield batch, done.pop(k)


def _completed(job: Job, data: Any, rows: list[dict[str, Any]], each: Share) -> Generator[Any, None, None]:
    """What the workers have made of the rows, in whatever order."""
    if not rows:
        return
    pool = data.ActorPoolStrategy(size=min(each.workers, len(rows)))
    # A block per batch, so that all workers have some, and a worker's death costs one.
    made = data.from_items(rows, override_num_blocks=len(rows)).map(
        Worker, fn_constructor_args=(job,), compute=pool, num_cpus=each.cpus, num_gpus=each.gpus or None
    )
    yield from made.iter_rows()


class Share(NamedTuple):
    """How many workers, and what each takes of the cluster."""

    workers: int
    cpus: float
    gpus: float


def share(job: Job, have: dict[str, float]) -> Share:
    """A worker per GPU where there are any, else one for every two CPU slots: the readers need some, too."""
    slots, cards, cpus = have.get("CPU", 1), have.get("GPU", 0), job.cpus_per_worker
    gpus = job.gpus_per_worker if job.gpus_per_worker is not None else float(cards > 0)
    fitting = cards / gpus + 1e-6 if gpus else slots / (2 * cpus)
    size = job.workers or max(1, int(fitting))
    if gpus and size > fitting:
        raise PipelineError(
            f"{size} workers of {gpus:g} GPUs are more than the {cards:g} there are, and Ray would wait for ever: take "
            "fewer --workers or less --gpus-per-worker"
        )
    if size * cpus >= slots:
        raise PipelineError(
            f"{size} workers of {cpus:g} CPU slots leave none of the {slots:g} there are to Ray's readers, which would "
            "wait for ever: take fewer --workers or less --cpus-per-worker"
        )
    return Share(size, cpus, gpus)
