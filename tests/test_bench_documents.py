"""What the benchmark shows: bounds, tables in documents, figures, and the committed rows that they show."""

import dataclasses
import xml.etree.ElementTree
from pathlib import Path

import pytest

from bench.compiled import bounds, check
from bench.speed import cases, expected, goals, page_tables, plot, results, sweeps, table, works
from optsample_triton import launch
from tests.bench_runs import CPU, compiled_or_eager, solve_rows  # noqa: F401

pytestmark = pytest.mark.usefixtures("compiled_or_eager")

# Bounds


def test_bounds_follow_the_counts() -> None:
    rows = [
        {
            "kernel": "solve bf16",
            "target": "sm_90",
            "pass": "main",
            "registers": "128",
            "configuration": "warps=4",
            "slots_per_pair": "32",
            "mufu_per_pair": "2",
            "float32_per_pair": "16",
        }
    ]
    device = dataclasses.replace(bounds.DEVICES[2], processors=100, ghz=1.0, copy_gb_s=4000, cache_mb=50)

    def bound(N: int = 2000, passes: int = 1, **changes: str) -> bounds.Bound:
        traffic = bounds.Traffic("solve", {"main": passes})
        found = bounds.bound(traffic, N, 50_000, "bf16", device, [{**rows[0], **changes}])
        assert found is not None
        return found

    # 4e8 bytes at 4000 GB/s; 1e8 pairs, 32 of 128 slots each, on 100 processors at 1 GHz.
    assert bound().parts == pytest.approx(
        {"memory": 1e-4, "issue": 2.5e-4, "special": 1.25e-4, "float32": 1.25e-4, "cache": 4e8 / (100 * 64e9)}
    )
    assert (bound().seconds, bound().limit) == (pytest.approx(2.5e-4), "issue")
    assert bound(slots_per_pair="8").limit == "special"
    assert bound(slots_per_pair="8", mufu_per_pair="1", float32_per_pair="4").limit == "memory"
    # One row keeps as many processors busy as it has chunks; a second pass keeps one.
    splits = launch.splits(1, 50_000, launch.SHAPES["cuda"][16].chunk, 100)
    assert bound(N=1).parts["issue"] == pytest.approx(50_000 * 0.25 / (splits * 1e9))
    assert bound(N=1, passes=2).parts["issue"] == pytest.approx(bound(N=1).parts["issue"] * (1 + splits))
    assert bounds.bound(bounds.Traffic("log_q"), 2000, 50_000, "bf16", device, rows) is None


def test_a_second_read_comes_from_the_cache_where_the_rows_fit() -> None:
    small, large = (cases.Case("log_q", 132, V, "bfloat16") for V in (32_000, 262_144))
    device = bounds.device_named("NVIDIA H200")
    for case, matrices in ((small, 3), (large, 5)):
        memory = expected.bound_of_case(case, device, check.read_rows()).parts["memory"]
        assert memory == pytest.approx(matrices * case.matrix_bytes / (device.copy_gb_s * 1e9))


def test_every_work_has_a_bound_on_every_device() -> None:
    found = {
        (case.work, device.name): bound
        for case, of_case in expected.expectations().items()
        for device, bound in of_case.items()
    }
    assert found.keys() == {(work, device.name) for work in works.WORKS for device in bounds.DEVICES}
    for name, work in works.WORKS.items():
        case = cases.Case(name, 4096, 50_257)
        bound = expected.bound_of_case(case, bounds.DEVICES[2], check.read_rows())
        assert bound is not None
        # No bound beats one read of what must move.
        assert bound.seconds >= 0.99 * work.moved_bytes(case) / (bounds.DEVICES[2].copy_gb_s * 1e9)


def test_a_bound_stands_beside_the_times_of_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.Case("solve", 4096, 50_257, "bfloat16")
    limit = expected.bound_of_case(case, bounds.device_named("NVIDIA H200"), check.read_rows())
    words = table.milliseconds(limit.seconds * 1e3)
    known, unknown = (
        [dataclasses.replace(row, kind="cuda", device=name) for row in solve_rows(2e-4, case=case)]
        for name in ("NVIDIA H200", "NVIDIA GH200 480GB")
    )
    heading, _, line = table.render(known).splitlines()
    assert "bound" in heading
    assert f"0.2  {words} {limit.limit}" in " ".join(line.split("   "))
    assert "bound" not in table.render(unknown)
    assert "bound" not in table.render(solve_rows(0.002))
    for rows, cell in ((known, f"0.2 ms | {words} ms |"), (unknown, "0.2 ms | - |")):
        monkeypatch.setattr(results, "read_all", lambda rows=rows: {"GPU": rows})
        assert cell in page_tables.filled("<!-- bench: gpu -->\n<!-- /bench -->")


# Committed rows


def test_committed_rows_hold_the_cpu_cases() -> None:
    tables = [rows for rows in results.read_all().values() if rows[0].kind == "cpu"]
    assert tables
    for rows in tables:
        measured = {row.case for row in rows} - {case.name for case in cases.REAL_CASES}  # younger than some tables
        assert measured == {case.name for case in cases.CPU_CASES}, "make bench BENCH_ARGS=--save"
        for case in cases.CPU_CASES:
            of_case = results.of(rows, case.name)
            assert of_case["package"].status == of_case["reference"].status == of_case["copy"].status == "ok"
        assert all(row.commit and not row.commit.endswith("+") and row.date for row in rows)
        assert all(each.reached for each in goals.measured(rows, "cpu"))


# Documents


def test_tables_in_documents_are_those_of_the_results() -> None:
    text = page_tables.PAGE.read_text(encoding="utf-8")
    assert {match[2] for match in page_tables.BLOCK.finditer(text)} == set(page_tables.BLOCKS)
    assert page_tables.filled(text) == text, "run python -m bench.plot"


def test_tables_are_written_where_they_are_marked(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench: kernels -->\nold\n<!-- /bench -->\nafter\n", encoding="utf-8")
    page_tables.write(page)
    table = page_tables.kernels()
    assert page.read_text(encoding="utf-8") == f"before\n<!-- bench: kernels -->\n{table}<!-- /bench -->\nafter\n"


def test_tables_in_documents_change_with_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    marked = "<!-- bench: cpu -->\nold\n<!-- /bench -->"
    monkeypatch.setattr(results, "read_all", lambda: {"CPU": solve_rows(0.002)})
    assert "| `solve` fp32 1 × 50,257 | 50 ms | 2 ms | 25× |" in page_tables.filled(marked)
    assert "old" not in page_tables.filled(marked)
    with pytest.raises(ValueError, match="the marker names the table 'moon'"):
        page_tables.filled(marked.replace("cpu", "moon"))


def test_figures_are_drawn_from_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    grid = [row for N in (1, 132, 4096) for row in solve_rows(N / 1e6, case=cases.Case("solve", N, 50_257, "bfloat16"))]
    gpu = [dataclasses.replace(row, kind="cuda", device="GPU") for row in grid]
    monkeypatch.setattr(results, "read_all", lambda: {"CPU": solve_rows(0.002), "GPU": gpu})
    drawn = plot.draw(tmp_path)
    names = ["idea", "bounds", "sweeps", "ratio-cpu", "speed-up-gpu", "copy-share-gpu"]
    # The rows of the CPU table carry this machine's name: only its kind is known here.
    assert [path.stem.split("-")[0] for path in drawn] == [name.split("-")[0] for name in names]
    for path in drawn:
        assert path.stat().st_size < 100_000
        xml.etree.ElementTree.parse(path)
    first = drawn[0].read_bytes()
    assert plot.draw(tmp_path)[0].read_bytes() == first
    monkeypatch.setattr(results, "read_all", lambda: {})
    monkeypatch.setattr(sweeps, "PATH", tmp_path / "none.csv")
    assert [path.stem for path in plot.draw(tmp_path)] == ["idea", "bounds"]


def test_sweeps_table_is_what_the_solver_says() -> None:
    """The committed count of some families, again; the whole is written by python -m bench.speed.sweeps."""
    families = ("zipf", "tops differ", "small")
    committed = {(row.family, row.realistic): row for row in sweeps.read() if row.family in families}
    counted = {(row.family, row.realistic): row for row in sweeps.count(CPU, families)}
    assert counted.keys() == committed.keys()
    for key, row in counted.items():
        assert row.rows == committed[key].rows
        assert row.mean == pytest.approx(committed[key].mean, abs=0.1)
