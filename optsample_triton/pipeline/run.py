"""The run: samples planned in the dataset's order, batches fixed before anything is drawn, each committed whole."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from optsample_triton.pipeline import identity, prompts, rows
from optsample_triton.pipeline.encode import Encoder, commit_of, template_text
from optsample_triton.pipeline.engines import engine
from optsample_triton.pipeline.job import Job, PipelineError
from optsample_triton.pipeline.journal import Journal
from optsample_triton.pipeline.progress import Progress
from optsample_triton.pipeline.prompts import Prompt
from optsample_triton.pipeline.records import (
    Completion,
    Request,
    Sample,
    chat_line,
    diagnostics_line,
    rejected_line,
)
from optsample_triton.pipeline.rows import Reject

FORMAT = 2  # of the files; another one cannot be gone on with
HEAD = 100  # rows whose columns, taken together, say what the prompts are: a single one may lack some
log = logging.getLogger("optsample_triton.pipeline")


class Batch(NamedTuple):
    """Samples that are drawn together, the bad rows found on the way to them, and where the next batch begins."""

    samples: list[Sample]
    requests: list[Request]
    rejected: list[bytes]
    position: dict[str, Any]


class Summary(NamedTuple):
    samples: int
    rejected: int
    drawn: int  # samples of this run, without those that were there


def generate(job: Job) -> Summary:
    """Draw what the job asks for, or what is missing of it; see ``optsample generate --help``."""
    encoder = Encoder(job)
    files = {kind: job.path(kind) for kind in ("chat", "rejected")}
    if job.save_diagnostics:
        files["diagnostics"] = job.path("diagnostics")
    law = law_of(job)
    header = {"format": FORMAT, **law, **job.fields("layout")}
    stale = () if job.save_diagnostics else (job.path("diagnostics"),)
    with Journal(
        job.path("journal"), files, header, resume=job.resume, overwrite=job.overwrite, stale=stale
    ) as journal:
        state = journal.state or {"samples": 0, "rejected": 0, "done": False, **_START}
        before = state["samples"]
        if state["done"]:
            log.info("%s is complete: %d samples", job.output, before)
            return Summary(before, state["rejected"], 0)
        planned = plan(job, encoder, identity.digest("law", law), state)
        progress = Progress(job.num_samples, state["attempted"], job.log_every)
        with closing(planned), closing(progress), closing(_drawn(job, encoder, planned)) as drawn:
            for batch, completions in drawn:
                parts, state = _lines(job, batch, completions, state)
                journal.commit(parts, state)
                progress.add(completions, state["rejected"])
    _warn_of_few(job, state)
    return Summary(state["samples"], state["rejected"], state["samples"] - before)


def _warn_of_few(job: Job, state: dict[str, Any]) -> None:
    """A dataset may have fewer rows than were hoped for, or none."""
    if state["samples"] < (job.num_samples or 1):
        wanted = "" if job.num_samples is None else f" of the {job.num_samples} that were asked for"
        ended = "" if state["attempted"] == job.num_samples else f", and {job.dataset} has no more rows"
        log.warning("only %d samples%s: %d were rejected%s", state["samples"], wanted, state["rejected"], ended)


_OTHER = "--resume needs the dataset that the run was begun with"
_START = {"row": 0, "repeat": 0, "attempted": 0, "prompts": ""}


def law_of(job: Job) -> dict[str, Any]:
    """What a sample's law, and so its identity, depends on; models and files by their content, not by their place."""
    law = job.fields("law")
    for name in ("chat_template", "target_chat_template"):
        law[name] = template_text(law[name], name)
    law["model_theta"] = identity.model_identity(job.model_theta, commit_of(job.model_theta, job.revision_theta))
    if job.model_t is not None:
        law["model_t"] = identity.model_identity(job.model_t, commit_of(job.model_t, job.revision_t))
    return law


class _Read(NamedTuple):
    """A row as it was read; ``seen`` is a digest of all prompts up to here, this one included."""

    number: int
    name: str
    prompt: Prompt | Reject
    seen: str


def plan(job: Job, encoder: Encoder, law: str, start: dict[str, Any]) -> Generator[Batch, None, None]:
    """Batches from ``start`` on; the last one says that it is, and may have no samples."""
    attempted, position = start["attempted"], {key: start[key] for key in _START}
    batch = Batch([], [], [], position)
    for row in _read(job, start):
        if attempted == job.num_samples:
            break
        encoded = row.prompt if isinstance(row.prompt, Reject) else encoder.encode(row.prompt)
        if isinstance(row.prompt, Reject) or isinstance(encoded, Reject):
            batch.rejected.append(rejected_line(row.number, encoded))  # type: ignore[arg-type]
            position = {"row": row.number + 1, "repeat": 0, "attempted": attempted, "prompts": row.seen}
            continue
        first = start["repeat"] if row.number == start["row"] else 0
        for repeat in range(first, job.samples_per_prompt):
            if attempted == job.num_samples:
                break
            sample = Sample(
                identity.sample_id(row.name, law, row.number, repeat), row.name, row.number, repeat, row.prompt
            )
            batch.samples.append(sample)
            batch.requests.append(Request(sample.id, identity.stream(sample.id), *encoded))
            attempted += 1
            ended = repeat + 1 == job.samples_per_prompt
            position = {
                "row": row.number + ended,
                "repeat": 0 if ended else repeat + 1,
                "attempted": attempted,
                "prompts": row.seen,
            }
            if len(batch.samples) == job.batch_size:
                yield batch._replace(position=position | {"done": False})
                batch = Batch([], [], [], position)
    yield batch._replace(position=position | {"done": True})


def _read(job: Job, start: dict[str, Any]) -> Iterator[_Read]:
    """The rows from ``start`` on. Those before it are read too: so it shows whether the dataset is still the same."""
    stream = rows.read(job.dataset, job.dataset_config, job.split)
    head = list(itertools.islice(stream, HEAD))
    columns = dict.fromkeys(name for row in head if not isinstance(row, Reject) for name in row)
    adapter, seen, number = None, "", -1
    last = start["row"] - (start["repeat"] == 0)  # a row that is drawn in part was read, too
    for number, row in enumerate(itertools.chain(head, stream)):
        prompt: Prompt | Reject
        if isinstance(row, Reject):
            prompt = row
        else:
            if adapter is None:
                kind, adapter = prompts.choose(columns or row, job.prompt_field, job.prompt_template)
                log.info("prompts are read as %s", kind)
            prompt = prompts.adapt(adapter, row)
        name = prompt.reason if isinstance(prompt, Reject) else identity.prompt_id(prompt.messages)
        seen = identity.digest(seen, name)
        if number == last and seen != start["prompts"]:
            raise PipelineError(f"{_OTHER}, but the first {number + 1} rows of {job.dataset} are others now")
        if number >= start["row"]:
            yield _Read(number, name, prompt, seen)
    if number < last:
        raise PipelineError(f"{_OTHER}, but {job.dataset} has {number + 1} rows now and had {last + 1} at least")


def _drawn(
    job: Job, encoder: Encoder, planned: Iterable[Batch]
) -> Generator[tuple[Batch, list[Completion]], None, None]:
    if job.ray:
        from optsample_triton.pipeline.cluster import drawn

        yield from drawn(job, planned)
        return
    first = next(iterator := iter(planned))
    if not first.requests:  # nothing to draw, so no models are loaded
        yield from ((batch, []) for batch in itertools.chain([first], iterator))
        return
    with closing(engine(job, encoder)) as running:
        for batch in itertools.chain([first], iterator):
            yield batch, running.run(batch.requests) if batch.requests else []


def _lines(
    job: Job, batch: Batch, completions: list[Completion], state: dict[str, Any]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What a batch adds to each file, and the state behind it."""
    number = state["samples"]
    chat, figures, rejected = [], [], list(batch.rejected)
    for sample, completion in zip(batch.samples, completions, strict=True):
        if completion.finish_reason == "invalid":
            why = f"the models gave no law for token {len(completion.tokens)} (NaN, +inf or nothing finite)"
            rejected.append(rejected_line(sample.row, Reject("invalid_logits", why), sample))
            continue
        chat.append(chat_line(sample, completion))
        if job.save_diagnostics:
            figures.append(diagnostics_line(number, sample, completion))
        number += 1
    parts = {"chat": chat, "rejected": rejected} | ({"diagnostics": figures} if job.save_diagnostics else {})
    counts = {"samples": number, "rejected": state["rejected"] + len(rejected)}
    return {name: b"".join(lines) for name, lines in parts.items() if lines}, counts | batch.position
