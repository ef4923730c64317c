"""Names of prompts, samples and models that depend only on content, and the random streams that follow from them.

A sample's id is a hash of its prompt, of the distribution (the law) that it is drawn from, of the seed and of its place
in the dataset. Its random stream is keyed by that id and the token's position. So it does not matter when, where or in
which run a sample is drawn.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_BLOCK, _BLOCKS = 4096, 256  # bytes per block, and how many blocks represent a large file


def canonical(value: Any) -> bytes:
    """One spelling per value: sorted keys, no spaces.

    >>> canonical({"b": 1, "a": "ü"}).decode()
    '{"a":"ü","b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(*values: Any) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(canonical(list(values)), digest_size=16).hexdigest()


def prompt_id(messages: list[dict[str, str]]) -> str:
    return digest("prompt", messages)


def sample_id(prompt: str, law: str, row: int, repeat: int, hint: str | None = None) -> str:
    """``prompt`` is a prompt's id, ``law`` the digest of the configuration with its seed."""
    return digest("sample", prompt, law, row, repeat, *([] if hint is None else [hint]))


def stream(sample: str) -> int:
    """The seed of a sample's random stream, 63 bits of its id.

    >>> 0 <= stream(sample_id("p", "l", 0, 0)) < 2**63
    True
    """
    return int(sample[:16], 16) >> 1


def model_identity(name: str, revision: str | None) -> str:
    """A directory by its content, so that it may be moved; a hub model by its name and revision.

    A large file counts with its size and with blocks spread over it, since hashing tens of gigabytes at every start
    would take minutes. This detects training that changed more than a few tensors; it misses a change between the
    blocks.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision or 'main'}"
    whole = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        size = file.stat().st_size
        whole.update(canonical([file.name, size]))
        with file.open("rb") as opened:
            for start in _starts(size):
                opened.seek(start)
                whole.update(opened.read(_BLOCK))
    return f"directory {whole.hexdigest()}"


def _starts(size: int) -> list[int]:
    """The starts of the blocks to read: all of a small file, evenly spread from first to last byte of a large one.

    >>> _starts(5000), len(_starts(10**9)), _starts(10**9)[-1]
    ([0, 4096], 256, 999995904)
    """
    if size <= _BLOCK * _BLOCKS:
        return list(range(0, size, _BLOCK))
    return [k * (size - _BLOCK) // (_BLOCKS - 1) for k in range(_BLOCKS)]
