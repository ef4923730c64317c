"""Names of models depend on content: trained weights get another name, a moved directory keeps its name."""

import shutil
from pathlib import Path

import numpy as np

from optsample_triton.pipeline.identity import model_identity

SIZE = 8 << 20


def folder(path: Path, weights: bytes) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_a_change_inside_of_large_weights_is_seen(tmp_path: Path) -> None:
    """Training changed a layer in the middle of the file, not its ends."""
    weights = np.random.default_rng(0).bytes(SIZE)
    name = model_identity(str(folder(tmp_path / "a", weights)), None)
    for k, start in enumerate(range(0, SIZE, SIZE // 16)):
        changed = weights[:start] + bytes(SIZE // 16) + weights[start + SIZE // 16 :]
        assert model_identity(str(folder(tmp_path / str(k), changed)), None) != name
    shutil.move(tmp_path / "a", tmp_path / "moved")
    assert model_identity(str(tmp_path / "moved"), "any") == name


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    weights = bytearray(20_000)
    names = {model_identity(str(folder(tmp_path / "a", bytes(weights))), None)}
    for k, at in enumerate((0, 4095, 4096, 12_345, 19_999)):
        changed = weights.copy()
        changed[at] = 1
        names.add(model_identity(str(folder(tmp_path / str(k), bytes(changed))), None))
    assert len(names) == 6


def test_a_name_of_the_hub_counts_with_its_revision() -> None:
    assert model_identity("some/model", None) == "some/model@main"
    assert model_identity("some/model", "0f" * 20) == "some/model@" + "0f" * 20
