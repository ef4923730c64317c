"""Files of a run after a kill at any moment: whatever is on the disk, resuming gives the bytes of an unbroken run."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optsample_triton.pipeline.job import PipelineError
from optsample_triton.pipeline.journal import Journal

HEADER = {"seed": 1, "model": "m"}
FILES = ("chat", "diagnostics")
BATCHES = 4


def paths(folder: Path) -> dict[str, Path]:
    return {name: folder / f"{name}.jsonl" for name in FILES}


def lines(batch: int) -> dict[str, bytes]:
    """What batch k adds. The first adds nothing to one file, like a batch without rejected rows."""
    parts = {name: f'{{"{name}":{batch},"text":"ü{"x" * batch}"}}\n'.encode() for name in FILES}
    return parts if batch else {"chat": parts["chat"]}


def write(folder: Path, *, stop: int = BATCHES, header: dict | None = None, resume: bool = True) -> int:
    """Resume; return how many batches were committed before."""
    with Journal(folder / "journal", paths(folder), header or HEADER, resume=resume) as journal:
        first = journal.state["batches"] if journal.state else 0
        for batch in range(first, stop):
            journal.commit(lines(batch), {"batches": batch + 1})
    return first


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("unbroken")
    write(folder)
    return contents(folder)


def writes(unbroken: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """All writes of an unbroken run in their order."""
    header, *commits = unbroken["journal"].splitlines(keepends=True)
    yield "journal", header
    for batch, commit in enumerate(commits):
        yield from ((f"{name}.jsonl", data) for name, data in lines(batch).items())
        yield "journal", commit


def test_every_kill_is_mended(unbroken: dict[str, bytes], tmp_path: Path) -> None:
    """A killed process leaves a prefix of its writes, cut inside any of them."""
    ordered = list(writes(unbroken))
    assert {name: b"".join(data for n, data in ordered if n == name) for name in unbroken} == unbroken
    case = 0
    for k, (name, data) in enumerate(ordered):
        for cut in sorted({0, 1, len(data) // 2, len(data) - 1}):
            folder = tmp_path / str(case)
            folder.mkdir()
            case += 1
            for path in unbroken if k else ():
                (folder / path).touch()
            for before, whole in ordered[:k]:
                with (folder / before).open("ab") as file:
                    file.write(whole)
            with (folder / name).open("ab") as file:
                file.write(data[:cut])
            there = write(folder)
            assert there == sum(n == "journal" for n, _ in ordered[1:k])
            assert contents(folder) == unbroken
    assert case > 40


@settings(max_examples=15)
@given(junk=st.lists(st.binary(max_size=40), min_size=3, max_size=3), stop=st.integers(1, BATCHES))
def test_whatever_follows_the_last_commit_is_dropped(junk, stop, unbroken, tmp_path_factory) -> None:
    """A crashed machine may leave anything after the synced bytes."""
    folder = tmp_path_factory.mktemp("junk")
    write(folder, stop=stop)
    for path, tail in zip(sorted(folder.iterdir()), junk, strict=True):
        tail = tail.replace(b"\n", b"") if path.name == "journal" else tail
        with path.open("ab") as file:
            file.write(tail)
    assert write(folder) == stop
    assert contents(folder) == unbroken


def test_going_on_needs_the_same_configuration(tmp_path: Path) -> None:
    write(tmp_path, stop=2)
    before = contents(tmp_path)
    with pytest.raises(PipelineError, match="seed was 1 and is 2"):
        write(tmp_path, header={"seed": 2, "model": "m"})
    assert contents(tmp_path) == before


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    write(tmp_path, stop=2)
    before = contents(tmp_path)
    with pytest.raises(PipelineError, match="--resume to continue"):
        write(tmp_path, resume=False)
    assert contents(tmp_path) == before
    with Journal(tmp_path / "journal", paths(tmp_path), {"seed": 3}, overwrite=True) as journal:
        assert journal.state is None
    assert (tmp_path / "chat.jsonl").read_bytes() == b""


def test_somebody_elses_file_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text("precious\n")
    for resume in (True, False):
        with pytest.raises(PipelineError, match=r"chat\.jsonl is there"):
            write(tmp_path, resume=resume)
    assert (tmp_path / "chat.jsonl").read_text() == "precious\n"


def test_a_run_without_a_commit_may_begin_again_with_other_options(tmp_path: Path) -> None:
    write(tmp_path, stop=0)
    write(tmp_path, resume=False, header={"seed": 2}, stop=1)
    assert (tmp_path / "journal").read_bytes().startswith(b'{"seed":2}')


@pytest.mark.parametrize("resume", [False, True])
def test_another_runs_file_does_not_stay_beside_this_ones(resume: bool, tmp_path: Path) -> None:
    """A run without diagnostics must delete those of the run that it overwrites."""
    stale = tmp_path / "stale.jsonl"
    stale.write_text("old\n")
    with pytest.raises(PipelineError, match=r"stale\.jsonl is there, but not in .*journal"):
        Journal(tmp_path / "journal", paths(tmp_path), HEADER, resume=resume, stale=[stale])
    assert stale.read_text() == "old\n"
    Journal(tmp_path / "journal", paths(tmp_path), HEADER, overwrite=True, stale=[stale]).close()
    assert not stale.exists()


def test_data_is_on_the_disk_before_the_commit_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash may keep or lose anything that was not synced, so the order of the calls must be right."""
    with Journal(tmp_path / "journal", paths(tmp_path), HEADER) as journal:
        names = {file.fileno(): name for name, file in (*journal._files.items(), ("journal", journal._journal))}
        synced: list[tuple[str, dict[str, int]]] = []
        fsync = os.fsync

        def sizes() -> dict[str, int]:
            return {name: os.fstat(number).st_size for number, name in names.items()}

        def recorded(number: int) -> None:
            synced.append((names[number], sizes()))
            fsync(number)

        before = sizes()
        monkeypatch.setattr(os, "fsync", recorded)
        journal.commit(lines(1), {"batches": 1})
        after = sizes()
    assert all(after[name] > before[name] for name in after)
    # Each sync comes after its file's write, and the journal's line after both files' syncs.
    assert synced == [
        ("chat", before | {"chat": after["chat"]}),
        ("diagnostics", after | {"journal": before["journal"]}),
        ("journal", after),
    ]


@pytest.mark.parametrize("change", ["cut", "edited"])
def test_changed_output_is_refused(change: str, tmp_path: Path) -> None:
    write(tmp_path, stop=3)
    path = tmp_path / "chat.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change == "cut" else data.replace(b"x", b"y", 1))
    before = contents(tmp_path)
    with pytest.raises(PipelineError, match="changed or lost"):
        write(tmp_path)
    assert contents(tmp_path) == before


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    write(tmp_path, stop=3)
    path = tmp_path / "journal"
    path.write_bytes(path.read_bytes().replace(b'{"sizes"', b'{"sizes', 1))
    with pytest.raises(PipelineError, match="damaged in line 2"):
        write(tmp_path)


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "journal", paths(tmp_path), HEADER),
        pytest.raises(PipelineError, match="another process"),
    ):
        write(tmp_path)


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(unbroken: dict[str, bytes], tmp_path: Path) -> None:
    """A limit on file sizes makes a write fail in the middle of a batch."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(unbroken["journal"]) - 10, before[1]))
        with pytest.raises(PipelineError, match=r"cannot write .*; what is committed is safe, continue with --resume"):
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert write(tmp_path) == BATCHES - 1
    assert contents(tmp_path) == unbroken


def test_no_space_left(tmp_path: Path) -> None:
    """/dev/full gives the error of a full disk."""
    os.symlink("/dev/full", tmp_path / "chat.jsonl")
    with pytest.raises(PipelineError, match=r"cannot write .*chat\.jsonl: No space left on device"):
        write(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match=r"cannot write .*Not a directory"):
        write(tmp_path / "file" / "inside")


def test_kill_9_of_a_writer_in_full_swing(tmp_path: Path) -> None:
    """The same by the system itself: one process that forks writers and kills them."""
    script = textwrap.dedent("""
        import os, random, signal, sys
        sys.path.insert(0, "tests")
        from pathlib import Path
        from test_pipeline_journal import Journal, HEADER, lines, paths, contents

        def write(folder, said=None, total=40):
            with Journal(folder / "journal", paths(folder), HEADER, resume=True) as journal:
                for batch in range(journal.state["batches"] if journal.state else 0, total):
                    if said is not None:
                        os.write(said, b".")
                    journal.commit(lines(batch % 7), {"batches": batch + 1})

        folder = Path(sys.argv[1])
        (folder / "whole").mkdir()
        write(folder / "whole")
        killed, rng = 0, random.Random(0)
        for run in range(200):  # on a busy machine some writers end before they are killed
            if killed > 8:
                break
            broken = folder / f"broken{run}"
            broken.mkdir()
            while True:
                heard, said = os.pipe()
                child = os.fork()
                if not child:
                    write(broken, said)
                    os._exit(0)
                os.close(said)
                for _ in range(rng.randint(2, 20)):  # one batch at least, so that a writer ends
                    os.read(heard, 1)
                for _ in range(rng.randrange(20_000)):  # somewhere in the next one
                    pass
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                os.close(heard)
                if not os.WIFSIGNALED(status):
                    break
                killed += 1
            assert contents(broken) == contents(folder / "whole"), run
        print(killed)
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 8
