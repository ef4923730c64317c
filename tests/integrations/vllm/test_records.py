"""Records without an engine: parts that are put together, torn lines, late ones, and a callback that fails."""

import json
import math
import threading
import time

import pytest

from optsample_triton.integrations.vllm import read_records
from optsample_triton.integrations.vllm.records import FIGURES, Record, Recorder

ROW = (-1.0, -2.0, -3.0, 0.5, 0.0)


def test_parts_are_put_together(tmp_path):
    path = tmp_path / "records.jsonl"
    recorder = Recorder(str(path))
    whole, other = Record("a", 3, []), Record("a", 3, [])
    for k in range(4):
        whole.append(k, [x + k for x in ROW])
        other.append(k % 2, [x - k for x in ROW])
        if k in (0, 2):  # two samples of one request, both preempted
            whole.hand_over(recorder)
            other.hand_over(recorder)
            resumed = Record("a", 3, whole.tokens)
            resumed.hand_over(recorder)  # nothing new, nothing written
            whole = resumed
    whole.hand_over(recorder)
    other.hand_over(recorder)
    assert len(path.read_text().splitlines()) == 6
    records = read_records(path)
    assert [one["tokens"] for one in records] == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert records[0]["alpha"] == [0.5, 1.5, 2.5, 3.5]
    assert records[1]["log_q"] == [-1.0, -2.0, -3.0, -4.0]
    assert records[0]["status"] == [0, 1, 2, 3]
    assert all(set(one) == {"id", "prompt_tokens", "tokens", *FIGURES} for one in records)


def test_what_is_missing_and_what_is_torn(tmp_path):
    path = tmp_path / "records.jsonl"
    recorder = Recorder(str(path))
    late = Record(7, 2, [4, 5])  # the first part was never written
    late.append(6, (math.nan, -math.inf, math.inf, math.nan, 3.0))
    late.hand_over(recorder)
    with path.open("a") as file:
        file.write('{"id": "torn", "tok')
    (one,) = read_records(path)
    assert one == {"id": 7, "prompt_tokens": 2, "tokens": [4, 5, 6], "status": [None, None, 3]} | {
        name: [None] * 3 for name in FIGURES if name != "status"
    }
    json.loads(path.read_text().splitlines()[0], parse_constant=pytest.fail)  # JSON knows neither NaN nor Infinity


def test_waiting_for_records(tmp_path):
    path = tmp_path / "records.jsonl"
    recorder = Recorder(str(path))
    with pytest.raises(TimeoutError, match=r"has no complete record of 'a' after 0\.1 s"):
        read_records(path, expected={"a": 1}, timeout=0.1)

    def write():
        time.sleep(0.2)
        for _ in range(2):
            record = Record("a", 1, [])
            record.append(1, ROW)
            record.hand_over(recorder)

    writer = threading.Thread(target=write)
    writer.start()
    assert len(read_records(path, expected={"a": 2}, timeout=30)) == 2
    writer.join()


def test_a_callback_that_fails(caplog_vllm):
    recorder = Recorder(callback="math:sqrt")
    recorder.write({"id": "a"})
    assert caplog_vllm == ["the callback failed on the record of request 'a'"]
