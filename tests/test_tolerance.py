"""``tol`` on random rows, and the command that tries it on many (tests/tolerance.py)."""

import csv
import math
import re

import pytest
import torch

from bench.paths import ROOT
from bench.speed.real_rows import PATH
from tests import real_rows, rounding, tolerance
from tests.random_rows import FAMILIES, VOCABS, batches


@pytest.mark.parametrize("tol", tolerance.TOLERANCES)
def test_random_rows(tol, backend):
    """A few of each family and vocabulary; `python -m tests.tolerance` tries as many as one likes."""
    each = 30 if backend == "eager" else 2
    name = "interpreted" if backend == "triton" else backend
    some = list(batches(math.ceil(len(FAMILIES) * sum(VOCABS.values()) * each), seed=1))
    if backend != "eager":  # a row of several chunks takes seconds there; the command has them
        some = [batch for batch in some if batch.theta.shape[1] < max(VOCABS)]
    results = [found for batch in some for found in tolerance.try_batch(name, [tol], batch)]
    assert sum(found.rows for found in results) > 0.9 * sum(len(batch.theta) for batch in some)
    assert not any(found.beyond or found.not_converged for found in results)


def test_rows_are_made_again_by_their_seed_alone():
    first, again = list(batches(2400, 3)), list(batches(2400, 3))
    assert all(torch.equal(a.theta, b.theta) and torch.equal(a.t, b.t) for a, b in zip(first, again, strict=True))
    other = next(batches(2400, 4))
    assert not torch.equal(first[0].theta, other.theta)


def test_alpha_that_is_off_is_counted(monkeypatch, capsys):
    """Judged by a tolerance that none can keep."""
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    monkeypatch.setattr(tolerance, "ROUNDOFF", -1e-3 + 1e-12)
    results = [each for batch in batches(24, 0) for each in tolerance.try_batch("eager", [1e-3], batch)]
    assert sum(each.beyond for each in results) > 0
    assert "beyond: eager, " in capsys.readouterr().out


def test_the_command_writes_its_table(tmp_path, capsys):
    path = tmp_path / "tolerance.csv"
    tolerance.main(["--rows", "24", "--tol", "1e-3", "1e-6", "--jobs", "1", "--output", str(path)])
    assert "tol 1e-06: 32 rows, 0 beyond, " in capsys.readouterr().out
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert {(line["backend"], line["tol"]) for line in lines} == {("eager", "0.001"), ("eager", "1e-06")}
    assert len(lines) == 2 * len(FAMILIES) * len(VOCABS)


def test_lines_of_other_tolerances_stay(tmp_path):
    path = tmp_path / "tolerance.csv"
    tolerance.main(["--rows", "24", "--tol", "1e-3", "1e-6", "--jobs", "1", "--output", str(path)])
    whole = path.read_text()
    tolerance.main(["--rows", "24", "--tol", "1e-6", "--jobs", "1", "--output", str(path)])
    assert path.read_text() == whole


def test_every_nth_real_row():
    some = [batch for batch in real_rows.batches(PATH, 3) if batch.family.startswith("1 and 1")]
    assert sum(len(batch.theta) for batch in some) == 3  # of 8
    rows = [row for batch in some for row in re.findall(r"\d+", batch.place.partition("rows ")[2].partition("]")[0])]
    assert sorted(map(int, rows)) == [0, 3, 6]


def test_batches_at_one_tolerance_each(tmp_path):
    path = tmp_path / "tolerance.csv"
    tolerance.main(["--rows", "24", "--tol", "1e-3", "1e-6", "--in-turn", "--jobs", "1", "--output", str(path)])
    with path.open(newline="", encoding="utf-8") as file:
        tried = [line["tol"] for line in csv.DictReader(file)]
    assert len(tried) == len(FAMILIES) * len(VOCABS)
    assert {tol: tried.count(tol) for tol in set(tried)} == {"0.001": 16, "1e-06": 16}


def test_the_theory_shows_what_real_rows_gave():
    with (tolerance.RESULTS / "real_rows.csv").open(newline="", encoding="utf-8") as file:
        table = real_rows.table(list(csv.DictReader(file)))
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert table in page
    assert rounding.table() in page


def test_bounds_on_rounding_are_told_apart(monkeypatch, tmp_path, capsys):
    """Of the pairs of the repository: the fewer tokens are summed in float32, the more rows one sweep decides."""
    monkeypatch.setattr(rounding, "PATH", tmp_path / "rounding.csv")
    rounding.main([str(PATH)])
    with rounding.PATH.open(newline="", encoding="utf-8") as file:
        means = {row["bound"]: float(row["sweeps"]) for row in csv.DictReader(file)}
    apart = [means[f"with {count} tokens apart"] for count in rounding.APART]
    ordered = [means["with 1 token apart"], *apart, means["without rounding"]]
    assert ordered == sorted(ordered, reverse=True)
    assert means["without rounding"] <= means["with one chunk summed again"] < means["with 1 token apart"]
    assert "32 rows" in capsys.readouterr().out


def test_real_rows_are_tried_at_every_temperature():
    """The few pairs of the repository, by their kind."""
    tried = list(real_rows.batches(PATH))
    assert sum(len(batch.theta) for batch in tried) == len(real_rows.TEMPERATURES) * 8
    first = next(batch for batch in tried if batch.family == "1 and 1, tops differ")
    assert (first.theta.argmax(-1) != first.t.argmax(-1)).all()
    (result,) = tolerance.try_batch("eager", [1e-6], first)
    assert (result.rows, result.beyond) == (2, 0)
    assert result.rows <= result.sweeps <= result.rows * result.most
    assert result.moved <= result.refused
