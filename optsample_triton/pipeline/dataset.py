"""The rows of a dataset in its own order, from a file, a directory or the hub; an unusable row becomes a ``Reject``.

Text formats are read line by line here and not by ``datasets``, which drops a whole file for one bad line.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from optsample_triton.pipeline.job import SAFE, PipelineError, first_line, need

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")


class Reject(NamedTuple):
    """Why a row gives no sample: a word that programs can count, and a sentence."""

    reason: str  # "undecodable", "malformed", "empty", "too_long", "invalid_logits"
    message: str


Row = dict[str, Any] | Reject


def read(dataset: str, config: str | None = None, split: str = "train") -> Iterator[Row]:
    """All rows, one at a time. Rejected rows are included, so a row's number is its place in the dataset."""
    try:
        yield from _rows(dataset, config, split)
    except PipelineError:
        raise
    except Exception as error:  # from the disk, a decompressor, the hub, or code that a dataset runs
        raise PipelineError(f"dataset {dataset} cannot be read further: {first_line(error)}; {SAFE}") from error


def _rows(dataset: str, config: str | None, split: str) -> Iterator[Row]:
    path = Path(dataset)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if path.is_dir():
        return _directory(path, config, split)
    if path.is_file():
        if suffix not in FORMATS:
            raise PipelineError(f"dataset {dataset} must end in one of {', '.join(FORMATS)}, or one of them and .gz")
        return _file(path, suffix)
    if suffix in FORMATS:
        raise PipelineError(f"dataset {dataset} was not found: there is no such file")
    return _hub(dataset, config, split)


def _file(path: Path, suffix: str) -> Iterator[Row]:
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    with cast(BinaryIO, gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")) as file:
        if suffix in (".csv", ".tsv"):
            yield from _table(file, "," if suffix == ".csv" else "\t")
        elif suffix == ".txt":
            yield from _lines(file, lambda line: {"text": line})
        elif suffix == ".json" and _first_byte(file) == b"[":
            yield from _array(file, path)
        else:
            yield from _lines(file, _object)


def _lines(file: BinaryIO, parse: Any) -> Iterator[Row]:
    """One row per line; blank lines are skipped."""
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield Reject("undecodable", f"line {number} is not UTF-8: {error.reason} at byte {error.start}")
            continue
        if text.strip():
            try:
                yield parse(text)
            except (ValueError, RecursionError) as error:
                yield Reject("undecodable", f"line {number} is not JSON: {error}")


def _object(text: str) -> Row:
    value = json.loads(text)
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        return Reject("malformed", f"a row must be an object or a string, but is {type(value).__name__}")
    return value


def _first_byte(file: BinaryIO) -> bytes:
    while (byte := file.read(1)) in (b" ", b"\t", b"\r", b"\n", b"\xef", b"\xbb", b"\xbf"):
        pass
    file.seek(0)
    return byte


def _array(file: BinaryIO, path: Path) -> Iterator[Row]:
    try:
        values = json.loads(file.read().decode("utf-8-sig"))
    except ValueError as error:
        raise PipelineError(f"dataset {path} begins like a JSON array, but cannot be read: {error}") from error
    for value in values:
        yield _object(json.dumps(value))


def _table(file: BinaryIO, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # A byte that is not UTF-8 becomes an unpaired surrogate; the check of the prompts then rejects that row alone.
    lines = (line.decode("utf-8-sig" if k == 0 else "utf-8", "surrogateescape") for k, line in enumerate(file))
    rows = csv.DictReader(lines, delimiter=delimiter)
    if rows.fieldnames is None:  # an empty file; an error in the header is an error of the whole dataset
        return
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Reject("undecodable", f"record {number} cannot be read: {error}")
            continue
        if None in row or None in row.values():
            yield Reject("malformed", f"record {number} does not have as many fields as the header")
        else:
            yield dict(row)


def _parquet(path: Path) -> Iterator[Row]:
    parquet = need("pyarrow.parquet")
    try:
        opened = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise PipelineError(f"dataset {path} is not a Parquet file: {first_line(error)}") from error
    for batch in opened.iter_batches(batch_size=256):
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            for k in range(batch.num_rows):
                try:
                    yield batch.slice(k, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield Reject("undecodable", f"a string of the row is not UTF-8: {error.reason}")


def _directory(path: Path, config: str | None, split: str) -> Iterator[Row]:
    datasets = need("datasets")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, dict):
            if split not in loaded:
                raise PipelineError(f"split {split!r} is not in dataset {path}, which has {', '.join(loaded)}")
            loaded = loaded[split]
        return iter(loaded)
    return _hub(str(path), config, split)


def _hub(name: str, config: str | None, split: str) -> Iterator[Row]:
    datasets = need("datasets")
    try:
        return iter(datasets.load_dataset(name, config, split=split, streaming=True))
    except Exception as error:  # the hub's errors come from many libraries
        raise PipelineError(
            f"dataset {name!r} could not be loaded, neither as a file nor from the hub: {first_line(error)}"
        ) from error
