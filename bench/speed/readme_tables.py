"""The documents' tables, generated from bench/results: never typed by hand. `python -m bench.plot` writes them.

Each table stands between <!-- bench: NAME --> and <!-- /bench --> in one of TARGETS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import tables
from bench.compiled import check
from bench.paths import ROOT

from . import goals, results, table
from .cases import SHORT
from .expected import bound_of, expectations
from .results import Measurement

# The documents that hold tables, and their language.
TARGETS = {ROOT / "docs" / "performance.md": "en"}
BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
CHINESE = {
    "case": "用例",
    "reference": "参考实现",
    "this package": "本包",
    "speed-up": "加速比",
    "of copy speed": "占拷贝速度",
    "work": "任务",
    "kernel": "内核",
    "target": "目标架构",
    "slots / pair": "发射槽 / 对",
    "exps / pair": "指数 / 对",
    "load": "读取宽度",
    "registers": "寄存器",
    "spills": "溢出",
    "goal": "目标",
    "measured": "实测",
    "time": "时间",
    "bound": "下界",
    "graph replay": "图重放",
    "reached": "达到",
    "missed": "未达到",
    "at least": "至少",
    "at most": "至多",
    "memory": "显存",
    "cache": "缓存",
    "issue": "发射",
    "special": "特殊函数",
    "float32": "float32",
    "threads": "线程",
    "commit": "提交",
    "No GPU has been measured yet.": "尚未在 GPU 上实测。",
}
# What the table of compiled kernels shows.
KERNELS = ("solve bf16", "solve fp32", "gradient bf16")


def words(text: str, language: str) -> str:
    return CHINESE.get(text, text) if language == "zh" else text


def markdown(heading: Sequence[str], lines: Sequence[Sequence[str]], language: str) -> str:
    return tables.markdown([words(cell, language) for cell in heading], lines)


def origin(row: Measurement, language: str) -> str:
    """Where a table's rows come from, in one line."""
    threads = f", {row.threads} {words('threads', language)}" if row.kind == "cpu" else ""
    commit = words("commit", language)
    return f"{row.device}{threads}; torch {row.torch}, triton {row.triton}; {commit} {row.commit}, {row.date}"


def cpu(language: str) -> str:
    """The package against the reference on each CPU that was measured."""
    blocks = []
    for rows in _measured("cpu"):
        lines = []
        for row in rows:
            case = results.of(rows, row.case)
            if row.who == "package" and row.p50_ms is not None and "reference" in case:
                reference = case["reference"]
                lines.append(
                    [
                        _case(row),
                        f"{table.milliseconds(reference.p50_ms)} ms",
                        f"{table.milliseconds(row.p50_ms)} ms",
                        f"{table.number(reference.over)}×",
                    ]
                )
        heading = ("case", "reference", "this package", "speed-up")
        blocks.append(origin(rows[0], language) + "\n\n" + markdown(heading, lines, language))
    return "\n".join(blocks)


def gpu(language: str) -> str:
    """The goals on each GPU that was measured, with the time of their cases and the bound that no run can beat."""
    blocks = []
    for rows in _measured("cuda"):
        lines = []
        for each in goals.measured(rows, "cuda"):
            sign = words("at least" if each.is_floor else "at most", language)
            verdict = words("reached" if each.reached else "missed", language)
            goal = f"{each.goal.quantity}: {sign} {each.goal.limit:g}"
            package = results.of(rows, each.goal.case)["package"]
            limit = bound_of(package)
            least = "-" if limit is None else f"{table.milliseconds(limit.seconds * 1e3)} ms"
            time = f"{table.milliseconds(package.p50_ms)} ms"
            lines.append([f"`{each.goal.case}`", goal, table.number(each.value), verdict, time, least])
        heading = ("case", "goal", "measured", "reached", "time", "bound")
        blocks.append(origin(rows[0], language) + "\n\n" + markdown(heading, lines, language))
    if not blocks:
        return words("No GPU has been measured yet.", language) + "\n"
    return "\n".join(blocks)


def bounds(language: str) -> str:
    """The least time on each device, with what sets it."""
    found = expectations()
    devices = list(next(iter(found.values())))
    heading = ["work", *(("" if device.measured else "~") + device.name for device in devices)]
    lines = []
    for case, of_case in found.items():
        cells = [
            f"{of_case[device].seconds * 1e6:,.0f} µs ({words(of_case[device].limit, language)})" for device in devices
        ]
        lines.append([f"`{case.work}` {SHORT[case.dtype]} {case.N:,} × {case.V:,}", *cells])
    return markdown(heading, lines, language)


def kernels(language: str) -> str:
    """What was read off the compiled kernels' main loops."""
    rows = [row for row in check.read_rows() if row["pass"] == "main" and row["kernel"] in KERNELS]
    lines = [
        [
            f"{row['kernel']}, {row['target']}",
            row["slots_per_pair"],
            row["exps_per_pair"],
            f"{row['load_width']} B",
            row["registers"],
            row["spills"],
        ]
        for row in rows
    ]
    return markdown(("kernel", "slots / pair", "exps / pair", "load", "registers", "spills"), lines, language)


BLOCKS = {"cpu": cpu, "gpu": gpu, "bounds": bounds, "kernels": kernels}


def filled(text: str, language: str) -> str:
    """The text with every marked table written anew."""

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"the marker names the table {match[2]!r}, expected one of: {', '.join(BLOCKS)}")
        return f"{match[1]}{BLOCKS[match[2]](language)}{match[3]}"

    return BLOCK.sub(block, text)


def write(targets: Mapping[Path, str] = TARGETS) -> None:
    for path, language in targets.items():
        path.write_text(filled(path.read_text(encoding="utf-8"), language), encoding="utf-8")


def _measured(kind: str) -> list[list[Measurement]]:
    return [rows for rows in results.read_all().values() if rows[0].kind == kind]


def _case(row: Measurement) -> str:
    return f"`{row.work}` {SHORT[row.dtype]} {row.N:,} × {row.V:,}"
