"""Records without an engine: parts that are joined, incomplete lines, late ones, and a callback that fails."""

import json
import math
import os
import resource
import threading
import time

import pytest

from optsample_triton.integrations.vllm import read_records
from optsample_triton.integrations.vllm.records import DIAGNOSTICS, Record, Recorder

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
    assert all(set(one) == {"id", "prompt_tokens", "tokens", *DIAGNOSTICS} for one in records)


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
        name: [None] * 3 for name in DIAGNOSTICS if name != "status"
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


def test_ids_that_come_again(tmp_path):
    """Lines before the offset do not count towards what is expected."""
    path = tmp_path / "records.jsonl"
    recorder = Recorder(str(path))

    def write(token):
        record = Record("a", 1, [])
        record.append(token, ROW)
        record.hand_over(recorder)

    write(1)
    size = path.stat().st_size
    assert [one["tokens"] for one in read_records(path, {"a": 1})] == [[1]]
    with pytest.raises(TimeoutError, match="has no complete record of 'a'"):
        read_records(path, {"a": 1}, timeout=0.05, offset=size)
    writer = threading.Timer(0.2, write, (2,))
    writer.start()
    assert [one["tokens"] for one in read_records(path, {"a": 1}, timeout=30, offset=size)] == [[2]]
    writer.join()
    assert [one["tokens"] for one in read_records(path)] == [[1], [2]]


def test_a_token_that_was_dropped_with_a_preemption(tmp_path):
    path = tmp_path / "records.jsonl"
    recorder = Recorder(str(path))
    for tokens in ([0, 1], [0, 1, 2]):  # two samples of one request; the second lost its last token
        record = Record("a", 3, [])
        for k, token in enumerate(tokens):
            record.append(token, [x - k for x in ROW])
        record.hand_over(recorder)
    for token in (5, 6):
        resumed = Record("a", 3, [0, 1])
        for k in range(2):
            resumed.append(token, [x - 10 - k for x in ROW])
        resumed.hand_over(recorder)
    records = read_records(path)
    assert sorted(one["tokens"] for one in records) == [[0, 1, 5, 5], [0, 1, 6, 6]]
    for one in records:
        assert one["log_q"] == [-1.0, -2.0, -11.0, -12.0]
        assert all(len(one[name]) == 4 for name in DIAGNOSTICS)


def test_a_file_that_a_process_left_torn(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"id": "torn", "tok\xff')
    recorder = Recorder(str(path))
    record = Record("whole", 1, [])
    record.append(1, ROW)
    record.hand_over(recorder)
    Recorder(str(path))  # writes nothing to a file that ends with a whole line
    assert [one["id"] for one in read_records(path)] == ["whole"]
    assert len(path.read_bytes().split(b"\n")) == 3


def test_a_line_that_did_not_fit(tmp_path, caplog_vllm):
    """The next record does not continue the incomplete line."""
    path, limit = tmp_path / "records.jsonl", 2**22
    path.touch()
    os.truncate(path, limit - 11)
    recorder, before = Recorder(str(path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    records = [Record(name, 1, []) for name in "ab"]
    for record in records:
        record.append(1, ROW)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        records[0].hand_over(recorder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == limit
    records[1].hand_over(recorder)
    assert [one["id"] for one in read_records(path)] == ["b"]
    assert caplog_vllm == ["the record of request 'a' was not written"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_does_not_end_the_engine(caplog_vllm):
    Recorder("/dev/full").write({"id": "a"})
    assert caplog_vllm == ["the record of request 'a' was not written"]


def emptied(part):
    part["tokens"].clear()


def test_a_callback_that_changes_what_it_gets():
    """The record keeps its own tokens."""
    recorder, record = Recorder(callback="test_records:emptied"), Record("a", 1, [])
    for k in range(3):
        record.append(k, ROW)
        record.hand_over(recorder)
    assert record.tokens == [0, 1, 2]
    assert record.start == 3


def test_a_callback_that_fails(caplog_vllm):
    recorder = Recorder(callback="math:sqrt")
    recorder.write({"id": "a"})
    assert caplog_vllm == ["the callback failed on the record of request 'a'"]
