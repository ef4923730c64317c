"""solve, sample and token_logprobs over a vocabulary in parts: every process gets the result of the whole."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_vocabulary as shards
import torch

import optsample_triton as ost
from optsample_triton import Status
from reference import truth

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The results of each process, by rank; all run at once."""
    folder = tmp_path_factory.mktemp("shards")
    script = [sys.executable, str(HERE / "sharded_vocabulary.py"), str(folder / "store"), str(folder / "results")]
    # The path starts with the script's own folder, not with the working directory.
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return pickle.loads((folder / "results").read_bytes())


@pytest.fixture(scope="module")
def whole() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTSAMPLE_BACKEND", "eager")
        return shards.outcomes(*shards.rows())


def flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [] if value is None else [x for part in value for x in flat(part)]


def parts(found: list[dict], size: int) -> list[dict]:
    return [found[rank][size] for rank in range(size)]


@pytest.mark.parametrize("size", shards.CUTS)
def test_all_processes_hold_the_same_bits(found: list[dict], size: int) -> None:
    first, *others = parts(found, size)
    for other in others:
        for name in first:
            if name != "gradients":
                for ours, theirs in zip(flat(first[name]), flat(other[name]), strict=True):
                    assert torch.equal(ours.nan_to_num(7e7), theirs.nan_to_num(7e7)), name


@pytest.mark.parametrize("name", [f"solve {law}" for law in shards.options()] + ["double", "half", "three"])
@pytest.mark.parametrize("size", shards.CUTS)
def test_solutions_are_those_of_the_whole(found: list[dict], whole: dict, size: int, name: str) -> None:
    ours, theirs = parts(found, size)[0][name], whole[name]
    assert torch.equal(ours.status, theirs.status)
    # Both solve to the same tolerance, but their sums are rounded in a different order.
    tolerance = 1e-11 if name == "double" else 2e-6
    torch.testing.assert_close(ours.alpha, theirs.alpha, atol=tolerance, rtol=0.0, equal_nan=True)
    torch.testing.assert_close(ours.log_z, theirs.log_z, atol=tolerance, rtol=tolerance, equal_nan=True)
    if theirs.diagnostics is not None:
        for field in set(theirs.diagnostics._fields) - {"sweeps"}:
            mine, other = getattr(ours.diagnostics, field), getattr(theirs.diagnostics, field)
            loose = 1e-9 if name == "double" else 2e-5
            torch.testing.assert_close(mine, other, atol=loose, rtol=loose, equal_nan=True, msg=field)


def test_every_status_is_among_the_rows(whole: dict) -> None:
    status = set(whole["solve kl_symmetry"].status.tolist())
    assert status >= {Status.OK, Status.IDENTICAL, Status.DISJOINT, Status.INVALID}


@pytest.mark.parametrize("name", [f"sample {draw}" for draw in shards.samplings()])
@pytest.mark.parametrize("size", shards.CUTS)
def test_samples_are_those_of_the_whole(found: list[dict], whole: dict, size: int, name: str) -> None:
    """The same uniforms give the same tokens, unless one falls within rounding of a border."""
    ours, theirs = parts(found, size)[0][name], whole[name]
    assert torch.equal(ours.status, theirs.status)
    other = ours.token != theirs.token
    assert other.float().mean() < 1e-3
    for field in ("log_q", "log_theta", "log_t", "alpha"):
        mine, theirs_ = (getattr(x, field).masked_fill(other, 0.0) for x in (ours, theirs))
        torch.testing.assert_close(mine, theirs_, atol=3e-4, rtol=1e-5, equal_nan=True)
    drawn = ours.token[ours.status != Status.INVALID]
    if name == "sample many":  # every part is drawn from, even that of a single token if it has mass
        edges = torch.tensor(shards.CUTS[size])
        counts = torch.histc(torch.bucketize(drawn.flatten(), edges, right=True).float(), size, 1, size)
        assert (counts > 0).sum() >= size - 1
    if name == "sample padded":
        assert drawn.max() < shards.CUT_VOCAB


@pytest.mark.parametrize("size", shards.CUTS)
def test_token_logprobs_and_gradients_are_those_of_the_whole(found: list[dict], whole: dict, size: int) -> None:
    for ours, theirs in zip(flat(parts(found, size)[0]["token_logprobs"]), flat(whole["token_logprobs"]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9, equal_nan=True)
    for model in (0, 1):
        joined = torch.cat([part["gradients"][model] for part in parts(found, size)], -1)
        torch.testing.assert_close(joined, whole["gradients"][model], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("size", shards.CUTS)
def test_few_collectives(found: list[dict], size: int) -> None:
    """One compares shapes; a solve gathers once, or twice if rows need a second sweep."""
    assert found[0][size, "collectives"] == {"random": 2, "close": 3, "sample": 7, "token_logprobs": 2}


@pytest.mark.parametrize("size", shards.CUTS)
def test_what_is_wrong_is_said_by_all(found: list[dict], size: int) -> None:
    """Also if only one process is wrong: the others would wait for it, or compute with different arguments."""
    expected = {
        "vocab_size": "ValueError: vocab_size must be between 1 and the shards' length 20000, but is 20001",
        "rows": "ValueError: logits must have the same number of rows in all processes of group",
        "inplace": "ValueError: inplace_backward cannot be combined with group",
        "no columns": "ValueError: logits_theta must have shape [..., V] with V >= 1, but has shape [12, 0]",
        "none to draw": "ValueError: logits_theta must have shape [..., V] with V >= 1, but has shape [12, 0]",
        "none to read": "ValueError: logits must have shape [..., V] with V >= 1, but has shape [12, 0]",
        "longer": "ValueError: logits_t has a vocabulary of",
        "type": "TypeError: seed must be an int or a tensor of integers, but is float",
        "dtype": "ValueError: the logits' dtype must be the same in all processes",
        "seed": "ValueError: seed must be the same in all processes of group, but process 1 differs from 0",
        "seeds": "ValueError: seed must be the same in all processes of group, but process 1 differs from 0",
        "temperature": "ValueError: temperature_t must be the same in all processes",
        "tokens": "ValueError: tokens must be the same in all processes",
        "models": "ValueError: logits_t must be the same in all processes",
        "function": "ValueError: alpha must be the same in all processes",
        "length": "TypeError: vocab_size must be an int of at least 1, but is float",
    }
    first, *others = (found[rank][size, "errors"] for rank in range(size))
    assert all(other == first for other in others)
    assert first.keys() == expected.keys()
    for name, words in expected.items():
        assert first[name].startswith(words)
        assert "\n" not in first[name]
    for name in ("no columns", "longer", "type"):
        assert first[name].endswith(f"(in process {size - 1} of group)")


def test_a_group_needs_torch_distributed() -> None:
    rows = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="init_process_group"):
        ost.solve(rows, rows, group="world")


def test_a_sum_that_overflows_brackets_nothing(device: str) -> None:
    """The largest logit of one model lies far after the tokens that set the references."""
    theta, t = (x[7].roll(-shards.CUTS[4][2]) for x in shards.rows())
    theta, t = (theta / 0.7).to(device), (t / 2.0).to(device)
    exact = truth.solve(theta[None].cpu(), t[None].cpu())
    solution = ost.solve(theta, t)
    assert int(solution.status) == Status.OK
    assert float(solution.alpha) == pytest.approx(float(exact.alpha), abs=2e-6)
