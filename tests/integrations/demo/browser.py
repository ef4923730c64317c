"""A page in a real browser, headless: what its DOM holds once everything is loaded, and how it looks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import pytest

# Written into a copy of the page: the sizes of its pictures, and whether it is wider than the window.
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  root.dataset.pictures = [...document.images].map(i => `${i.id}:${i.complete}:${i.naturalWidth}:${i.width}`).join(" ");
  root.dataset.widths = `${root.scrollWidth}:${root.clientWidth}`;
})</script>"""
# A fresh profile, and no requests of the browser's own.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


class Picture(NamedTuple):
    name: str
    complete: bool
    natural_width: int
    width: int


class Seen(NamedTuple):
    pictures: list[Picture]
    page_width: int
    window_width: int
    pixels: Any  # [height, width, 3], from 0 to 1


def chromium() -> str:
    """The browser's command; without one the test is skipped, unless OPTSAMPLE_NEED_CHROMIUM says that it must not."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        sentence = "there is no Chromium on this machine to open the demo's page with"
        if os.environ.get("OPTSAMPLE_NEED_CHROMIUM"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    return found


def look(page: Path, folder: Path, width: int, *, dark: bool = False) -> Seen:
    """Open a copy of the page in a frame of that width: a browser's own window cannot be as narrow as a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    copy, outer, shot = folder / "page.html", folder / "outer.html", folder / "shot.png"
    copy.write_text(page.read_text(encoding="utf-8").replace("</head>", f"{PROBE}</head>"), encoding="utf-8")
    outer.write_text(
        f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:2000px"></iframe>',
        encoding="utf-8",
    )
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    common = [chromium(), *FLAGS, scheme, f"--user-data-dir={folder / 'profile'}"]
    dom = run([*common, f"--window-size={max(width, 600)},2000", "--dump-dom", copy.as_uri()])
    run([*common, f"--window-size={max(width, 600)},2000", f"--screenshot={shot}", outer.as_uri()])
    pictures = [
        Picture(name, complete == "true", int(natural), int(wide))
        for name, complete, natural, wide in re.findall(r"(\w+):(true|false):(\d+):(\d+)", attribute(dom, "pictures"))
    ]
    page_width, window_width = map(int, attribute(dom, "widths").split(":"))
    return Seen(pictures, page_width, window_width, matplotlib.image.imread(shot)[:, :width, :3])


def attribute(dom: str, name: str) -> str:
    found = re.search(rf'<html[^>]* data-{name}="([^"]*)"', dom)
    assert found, f"the page's script has not written data-{name}"
    return found[1]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
