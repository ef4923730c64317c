"""docs/compiled.md: its tables are those of the sums in bench/results/compiled, and these are of what was recorded."""

import pytest
import torch

from tests.ptx import page, record


def test_the_tables_are_those_of_the_data():
    text = page.PAGE.read_text(encoding="utf-8")
    assert {match[2] for match in page.BLOCK.finditer(text)} == set(page.TABLES)
    assert page.filled(text) == text, "run python -m tests.ptx.page"


def test_committed_errors_are_within_their_tolerances_and_planted_faults_were_reported():
    assert all(0 <= float(row["share"]) <= 1 for row in page.read_data("errors"))
    assert all(row["found"] != "nothing" for row in page.read_data("faults"))


RACE = (
    "solve_kernel: race in shared memory: this reads what was written: "
    "PTX line 7: ld.shared.b32 %r1, [%r2]  [standard.py:9:1 @[ rows.py:3:1 ]]; thread 0 of program 0"
)


def recorded(folder, worker, text, *shares, arch=90, layout=""):
    """A process with one test: a launch, its comparisons, a planted fault."""
    recorder = record.Record()
    recorder.open(folder, arch, worker, "abc", "3.7")
    recorder.begin("test_file::test_name", layout)
    recorder.compared("log_z", 0.7)  # nothing was launched before that
    recorder.launched("solve_kernel", torch.bfloat16, text)
    for share in shares:
        recorder.compared("alpha", share)
    recorder.planted("no barrier", [RACE, f"{RACE}\nNaN"])
    recorder.close()


def sums(folder):
    return page.summed_up(page.read_lines(folder))


def test_what_workers_recorded_is_summed_up(tmp_path):
    recorded(tmp_path, "gw0", "one", 0.25, 0.5)
    recorded(tmp_path, "gw1", "two", 0.125)
    recorded(tmp_path, "gw1", "two", layout="rows_apart")
    recorded(tmp_path, "", "three", 0.75, arch=100)
    found = sums(tmp_path)
    per_arch = [{"arch": "sm_90", "forms": "2", "launches": "3"}, {"arch": "sm_100", "forms": "1", "launches": "1"}]
    versions = {"triton": "3.7", "commit": "abc"}
    assert found["runs"] == [row | {"tests": "1"} | versions for row in per_arch]
    assert found["launches"] == [row | {"kernel": "solve_kernel", "rows": "bfloat16"} for row in per_arch]
    assert found["layouts"] == [
        {"layout": "rows_apart", "rows": "bfloat16", "arch": "sm_90", "forms": "1", "launches": "1"}
    ]
    shares = [(row["quantity"], row["arch"], row["comparisons"], row["share"]) for row in found["errors"]]
    assert shares == [("alpha", "sm_90", "3", "0.5"), ("alpha", "sm_100", "1", "0.75")]
    race = ("race in shared memory: this reads what was written", "rows.py")
    faults = {(row["arch"], row["found"], row["file"]): row["times"] for row in found["faults"]}
    assert faults == {(arch, *what): n for arch, n in (("sm_90", "3"), ("sm_100", "1")) for what in (race, ("NaN", ""))}


def test_a_run_replaces_the_one_before_of_its_architecture(tmp_path):
    for arch in (80, 90):
        recorded(tmp_path, "gw0", "one", arch=arch)
    recorded(tmp_path, "", "two", arch=90)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sm_80-gw0.jsonl", "sm_90.jsonl"]
    assert {row["arch"]: row["launches"] for row in sums(tmp_path)["runs"]} == {"sm_80": "1", "sm_90": "1"}


def test_the_page_follows_the_data(tmp_path):
    recorded(tmp_path, "gw0", "one", 0.25, 0.5)
    recorded(tmp_path, "", "one", 0.75, arch=100)
    page.write_data(sums(tmp_path), tmp_path / "data")
    assert page.read_data("errors", tmp_path / "data") == sums(tmp_path)["errors"]

    def table(name):
        return page.filled(f"<!-- compiled: {name} -->\nold\n<!-- /compiled -->", tmp_path / "data")

    assert "| kernel, rows | sm_90 | sm_100 |" in table("launches")
    assert "| `solve_kernel` bf16 | 1 (1) | 1 (1) |" in table("launches")
    assert "| `solve_kernel` bf16 | 2, 0.5 | 1, 0.75 |" in table("errors")
    race = "race in shared memory: this reads what was written, in `rows.py`"
    assert f"| no barrier | NaN; {race} | 2 |" in table("faults")
    assert not any("old" in table(name) for name in page.TABLES)
    with pytest.raises(KeyError):
        table("moon")


def test_a_folder_without_lines_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no lines"):
        page.main([str(tmp_path)])
