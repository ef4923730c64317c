"""One case, from its check to its times."""

from __future__ import annotations

import datetime
import functools
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from optsample_triton import backend
from optsample_triton._version import __version__

from . import listed, peers, results
from .cases import DTYPES, Case
from .inputs import Inputs
from .results import Measurement
from .timing import Budget, Call, Clock, Quantiles, captured, copy_of, measure, peak_extra_bytes
from .works import WORKS

# With more rows a launch takes much longer than its overhead, and a graph shows nothing.
GRAPH_ROWS = 132


@dataclass(frozen=True)
class Result:
    """What one candidate of one case gave; times are missing where it did not run."""

    case: Case
    who: str
    moved_bytes: int | None = None
    version: str = ""
    note: str = ""
    times: Quantiles | None = None
    extra_bytes: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What one case gave; a case that failed its check has no times, one out of memory has no error either."""

    case: Case
    backend: str
    error_ratio: float | None
    results: tuple[Result, ...]

    @property
    def failed(self) -> bool:
        return self.error_ratio is not None and not self.error_ratio <= 1.0


def run_case(case: Case, device: torch.device, clock: Clock, budget: Budget) -> Outcome:
    """Judge the package on the case; time it, and those it is timed against, only if it is right."""
    try:
        return _run_case(case, device, clock, budget)
    except torch.OutOfMemoryError as error:
        return Outcome(case, "", None, (Result(case, "package", note=reason(error)),))


def _run_case(case: Case, device: torch.device, clock: Clock, budget: Budget) -> Outcome:
    work = WORKS[case.work]
    inputs = Inputs.of(case, device)
    moved = work.moved_bytes(case)
    served_by, _ = backend.choose(device, DTYPES[case.dtype])
    if backend.interpreter_on() and served_by == "triton":
        served_by = "triton, interpreted"
    package = work.package(inputs)
    error_ratio = work.error_ratio(inputs, package())
    if not error_ratio <= 1.0:
        return Outcome(case, served_by, error_ratio, (Result(case, "package", moved),))

    binders = _binders(inputs, package, device)
    asked = [Result(case, who, moved) for who in binders]
    for peer in peers.PEERS:
        if case.work in peer.works and "peers" in case.rivals:
            asked.append(Result(case, peer.name, peer.moved_bytes(case), peer.version))
            binders[peer.name] = functools.partial(_bind_peer, peer, inputs)

    ready: dict[str, Call] = {}
    extra: dict[str, int | None] = {}
    for index, result in enumerate(asked):
        try:
            call = binders[result.who]()
            call()
            clock.synchronize()
            counted = device.type == "cuda" and result.who != "copy"
            extra[result.who] = peak_extra_bytes(call, device) if counted else None
            ready[result.who] = call
        except Exception as error:  # a rival that cannot run is a finding, not the end of the run
            if result.who in ("package", "copy"):
                raise
            asked[index] = replace(result, note=reason(error))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    times = measure(clock, ready, budget)
    done = (replace(r, times=times.get(r.who), extra_bytes=extra.get(r.who)) for r in asked)
    return Outcome(case, served_by, error_ratio, tuple(done))


def _binders(inputs: Inputs, package: Call, device: torch.device) -> dict[str, Callable[[], Call]]:
    """What makes the calls of the package, the copy and the reference, in the order of the result file."""
    case, work = inputs.case, WORKS[inputs.case.work]
    on_gpu, finish = device.type == "cuda", work.finish
    found: dict[str, Callable[[], Call]] = {
        "package": lambda: package,
        "copy": lambda: copy_of(work.moved_bytes(case), device),
    }
    if on_gpu and case.N <= GRAPH_ROWS:
        found["graph"] = lambda: captured(package)
    if "reference" in case.rivals:
        found["reference"] = lambda: work.reference(inputs)
    if on_gpu and finish is not None and "compiled" in case.rivals:
        found["compiled"] = functools.cache(lambda: listed.compiled(inputs, finish))
        found["graphed"] = lambda: captured(found["compiled"]())
    return found


def _bind_peer(peer: peers.Peer, inputs: Inputs) -> Call:
    if not peer.version:
        raise ModuleNotFoundError("not installed")
    return peer.bind(inputs)


def reason(error: Exception) -> str:
    """An exception in one short line.

    >>> reason(OSError("/opt/lib/libx.so: cannot open\\nmore"))
    'OSError: libx.so: cannot open'
    """
    first = (str(error).strip().splitlines() or [""])[0]
    first = re.sub(r"/[\w.+/-]+/", "", first)  # results are published, folders of a machine are not
    kind = "" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: "
    return f"{kind}{first}"[:160]


def rows_of(outcomes: Sequence[Outcome], device: torch.device) -> list[Measurement]:
    """Outcomes as rows of a result file."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    commit, name = results.current_commit(), results.device_name(device)
    rows = []
    for outcome in outcomes:
        by_name = {result.who: result for result in outcome.results}
        package, copy = by_name["package"], by_name.get("copy")
        for result in outcome.results:
            status = "FAILED" if outcome.failed else "ok" if result.times else "not run"
            times = result.times
            rows.append(
                Measurement(
                    case=outcome.case.name,
                    work=outcome.case.work,
                    N=outcome.case.N,
                    V=outcome.case.V,
                    dtype=outcome.case.dtype,
                    who=result.who,
                    version=result.version,
                    status=status,
                    note=result.note,
                    error_over_tolerance=outcome.error_ratio if result.who == "package" else None,
                    calls=times.calls if times else None,
                    p20_ms=times.p20 * 1e3 if times else None,
                    p50_ms=times.p50 * 1e3 if times else None,
                    p80_ms=times.p80 * 1e3 if times else None,
                    host_ms=times.host * 1e3 if times and device.type == "cuda" else None,
                    moved_bytes=result.moved_bytes,
                    gb_per_s=_rate(result) / 1e9 if times else None,
                    of_copy=_rate(result) / _rate(copy) if times and copy and copy.times else None,
                    over=times.p50 / package.times.p50 if times and package.times else None,
                    extra_bytes=result.extra_bytes,
                    backend=outcome.backend,
                    device=name,
                    kind=device.type,
                    threads=torch.get_num_threads(),
                    date=date,
                    commit=commit,
                    optsample_triton=__version__,
                    torch=torch.__version__,
                    triton=peers.installed_version("triton"),
                    numpy=peers.installed_version("numpy"),
                    python=platform.python_version(),
                )
            )
    return rows


def _rate(result: Result) -> float:
    """Bytes per second."""
    return (result.moved_bytes or 0) / result.times.p50 if result.times else 0.0
