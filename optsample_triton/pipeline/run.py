"""The run: samples in the dataset's order, in batches that are fixed before drawing and committed one by one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from optsample_triton.pipeline import dataset, identity, prompts
from optsample_triton.pipeline.dataset import Reject
from optsample_triton.pipeline.encode import Encoder, commit_of, template_text
from optsample_triton.pipeline.engines import engine
from optsample_triton.pipeline.job import Job, PipelineError
from optsample_triton.pipeline.journal import NAMES, Journal
from optsample_triton.pipeline.progress import Progress
from optsample_triton.pipeline.prompts import Prompt
from optsample_triton.pipeline.records import (
    Completion,
    PlannedSample,
    Request,
    chat_line,
    diagnostics_line,
    rejected_line,
)

FORMAT = 4  # of the files; a run in another format cannot be resumed
HEAD = 100  # the columns of so many rows together say what the prompts are, since a single row may lack some
log = logging.getLogger("optsample_triton.pipeline")


class Position(NamedTuple):
    """Where a batch begins; the journal keeps it."""

    row: int = 0
    repeat: int = 0
    attempted: int = 0  # samples planned so far
    prompts: str = ""  # digest of all prompts read so far


class Batch(NamedTuple):
    """Samples that are drawn together, the rows rejected before them, and where the next batch begins."""

    samples: list[PlannedSample]
    requests: list[Request]
    rejected: list[bytes]
    position: Position
    done: bool = False  # the last one


class Summary(NamedTuple):
    samples: int
    rejected: int
    drawn: int  # samples of this run, without those that existed before


def generate(job: Job) -> Summary:
    """Draw the samples that the job asks for, or those still missing; see ``optsample generate --help``."""
    encoder = Encoder(job)
    files = {kind: job.path(kind) for kind in ("chat", "rejected")}
    if job.save_diagnostics:
        files["diagnostics"] = job.path("diagnostics")
    law = law_of(job)
    names = {"model_theta": job.model_theta, "model_t": job.model_t}  # for the report; models may be moved
    header = {"format": FORMAT, **law, **job.fields("layout"), NAMES: names}
    stale = () if job.save_diagnostics else (job.path("diagnostics"),)
    with Journal(
        job.path("journal"), files, header, resume=job.resume, overwrite=job.overwrite, stale=stale
    ) as journal:
        state = journal.state or {"samples": 0, "rejected": 0, "done": False, **Position()._asdict()}
        before = state["samples"]
        if state["done"]:
            log.info("%s is complete: %d samples", job.output, before)
            return Summary(before, state["rejected"], 0)
        start = Position(*(state[name] for name in Position._fields))
        planned = plan(job, encoder, identity.digest("law", law), start)
        progress = Progress(job.num_samples, state["attempted"], job.log_every)
        with closing(planned), closing(progress), closing(_drawn(job, encoder, planned)) as drawn:
            for batch, completions in drawn:
                parts, state = _lines(job, batch, completions, state)
                journal.commit(parts, state)
                progress.add(completions, state["rejected"])
    _warn_of_few(job, state)
    return Summary(state["samples"], state["rejected"], state["samples"] - before)


def _warn_of_few(job: Job, state: dict[str, Any]) -> None:
    """Warn if there are fewer samples than the job asks for, or none."""
    if state["samples"] < (job.num_samples or 1):
        wanted = "" if job.num_samples is None else f" of the {job.num_samples} that were asked for"
        ended = "" if state["attempted"] == job.num_samples else f", and {job.dataset} has no more rows"
        log.warning("only %d samples%s: %d were rejected%s", state["samples"], wanted, state["rejected"], ended)


_OTHER = "--resume needs the dataset with which the run was begun"


def law_of(job: Job) -> dict[str, Any]:
    """What a sample's distribution, and so its id, depends on: models and files by their content, not their path."""
    law = job.fields("law")
    for name in ("chat_template", "target_chat_template"):
        law[name] = template_text(law[name], name)
    law["model_theta"] = identity.model_identity(job.model_theta, commit_of(job.model_theta, job.revision_theta))
    if job.model_t is not None:
        law["model_t"] = identity.model_identity(job.model_t, commit_of(job.model_t, job.revision_t))
    return law


class _Read(NamedTuple):
    """A row as it was read; ``seen`` is a digest of all prompts so far, this one included."""

    number: int
    name: str
    prompt: Prompt | Reject
    seen: str


def plan(job: Job, encoder: Encoder, law: str, start: Position) -> Generator[Batch, None, None]:
    """The batches from ``start`` on. The last one is marked ``done`` and may have no samples."""
    position, batch = start, Batch([], [], [], start)
    for row in _read(job, start):
        if position.attempted == job.num_samples:
            break
        encoded = row.prompt if isinstance(row.prompt, Reject) else encoder.encode(row.prompt)
        if isinstance(row.prompt, Reject) or isinstance(encoded, Reject):
            batch.rejected.append(rejected_line(row.number, encoded))  # type: ignore[arg-type]
            position = Position(row.number + 1, 0, position.attempted, row.seen)
            continue
        first = start.repeat if row.number == start.row else 0
        for repeat in range(first, job.samples_per_prompt):
            if position.attempted == job.num_samples:
                break
            sample_id = identity.sample_id(row.name, law, row.number, repeat, row.prompt.hint)
            batch.samples.append(PlannedSample(sample_id, row.name, row.number, repeat, row.prompt))
            batch.requests.append(Request(sample_id, identity.stream(sample_id), *encoded))
            following = (row.number, repeat + 1) if repeat + 1 < job.samples_per_prompt else (row.number + 1, 0)
            position = Position(*following, position.attempted + 1, row.seen)
            if len(batch.samples) == job.batch_size:
                yield batch._replace(position=position)
                batch = Batch([], [], [], position)
    yield batch._replace(position=position, done=True)


def _read(job: Job, start: Position) -> Iterator[_Read]:
    """The rows from ``start`` on. Earlier rows are read too, to check that the dataset is still the same."""
    stream = dataset.read(job.dataset, job.dataset_config, job.split)
    head = list(itertools.islice(stream, HEAD))
    columns = dict.fromkeys(name for row in head if not isinstance(row, Reject) for name in row)
    adapter, seen, number = None, "", -1
    last = start.row - (start.repeat == 0)  # the last row read before; with repeats left it is drawn further
    for number, row in enumerate(itertools.chain(head, stream)):
        prompt: Prompt | Reject
        if isinstance(row, Reject):
            prompt = row
        else:
            if adapter is None:
                have = columns or row
                kind, adapter = prompts.choose(have, job.prompt_field, job.prompt_template)
                adapter = prompts.with_columns(adapter, have, job.answer_column, job.hint_column)
                log.info("prompts are read as %s", kind)
            prompt = prompts.adapt(adapter, row)
        name = prompt.reason if isinstance(prompt, Reject) else identity.prompt_id(prompt.messages)
        hint = [] if isinstance(prompt, Reject) or prompt.hint is None else [prompt.hint]
        seen = identity.digest(seen, name, *hint)
        if number == last and seen != start.prompts:
            raise PipelineError(f"{_OTHER}, but the first {number + 1} rows of {job.dataset} have changed")
        if number >= start.row:
            yield _Read(number, name, prompt, seen)
    if number < last:
        raise PipelineError(f"{_OTHER}, but {job.dataset} has {number + 1} rows now and had at least {last + 1}")


def _drawn(
    job: Job, encoder: Encoder, planned: Iterable[Batch]
) -> Generator[tuple[Batch, list[Completion]], None, None]:
    if job.ray:
        from optsample_triton.pipeline.cluster import drawn

        yield from drawn(job, planned)
        return
    first = next(iterator := iter(planned))
    if not first.requests:  # nothing to draw: do not load the models
        yield from ((batch, []) for batch in itertools.chain([first], iterator))
        return
    with closing(engine(job, encoder)) as running:
        for batch in itertools.chain([first], iterator):
            yield batch, running.run(batch.requests) if batch.requests else []


def _lines(
    job: Job, batch: Batch, completions: list[Completion], state: dict[str, Any]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What a batch adds to each file, and the state after it."""
    number = state["samples"]
    parts: dict[str, list[bytes]] = {"chat": [], "rejected": list(batch.rejected), "diagnostics": []}
    for sample, completion in zip(batch.samples, completions, strict=True):
        if completion.finish_reason == "invalid":
            why = f"the models gave no q* for token {len(completion.tokens)} (NaN, +inf or nothing finite)"
            parts["rejected"].append(rejected_line(sample.row, Reject("invalid_logits", why), sample))
            continue
        parts["chat"].append(chat_line(sample, completion))
        if job.save_diagnostics:
            parts["diagnostics"].append(diagnostics_line(number, sample, completion))
        number += 1
    counts = {"samples": number, "rejected": state["rejected"] + len(parts["rejected"])}
    following = {**counts, **batch.position._asdict(), "done": batch.done}
    return {name: b"".join(lines) for name, lines in parts.items() if lines}, following
