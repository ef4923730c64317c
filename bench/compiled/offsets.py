"""Row offsets that are computed in 32 bits, found in Triton's intermediate code."""

from __future__ import annotations

import re


def narrow_offsets(ttir: str) -> list[str]:
    """32-bit products of a program id and a kernel argument from which an address is made.

    Such a product overflows once rows x stride reaches 2**31 elements. A product with a constant (a chunk's
    number times the chunk's size) stays inside a row and is no fault.
    """
    operation_of: dict[str, str] = {}
    uses: dict[str, list[str]] = {}
    arguments: set[str] = set()
    for raw in ttir.splitlines():
        line = re.sub(r"loc\(.*?\)", "", raw)
        if "tt.func" in line:
            arguments.update(re.findall(r"(%[\w$]+): ", line))
            continue
        for name, start in re.findall(r"(%[\w$]+) = (%[\w$#]+)(?=[,)])", line):  # iter_args(%x = %start)
            uses[name] = [start.split("#")[0]]
        induction = re.search(r"scf\.for (%[\w$]+) = (%[\w$#]+) to", line)
        if induction:
            name, start = induction.groups()
            uses[name] = [start.split("#")[0]]
        result = re.match(r"\s*(%[\w$]+)(?::\d+)? = (.*)", line)
        if result:
            name, operation = result.groups()
            operation_of[name] = operation
            uses[name] = [operand.split("#")[0] for operand in re.findall(r"%[\w$#]+", operation)]

    def ancestors(name: str) -> set[str]:
        seen = {name}
        pending = [name]
        while pending:
            for operand in uses.get(pending.pop(), ()):
                if operand not in seen:
                    seen.add(operand)
                    pending.append(operand)
        return seen

    def from_program_id(names: set[str]) -> bool:
        return any(operation_of.get(name, "").startswith("tt.get_program_id") for name in names)

    found: dict[str, None] = {}
    for operation in operation_of.values():
        if not operation.startswith("tt.addptr"):
            continue
        for name in ancestors(re.findall(r"%[\w$#]+", operation)[1].split("#")[0]):
            product = operation_of.get(name, "")
            if not (product.startswith("arith.muli") and re.search(r"(: |x)i32\b", product)):
                continue
            factors = re.findall(r"%[\w$#]+", product)[:2]  # not from uses: sibling regions may reuse a name
            left, right = (ancestors(factor.split("#")[0]) for factor in factors)
            if (from_program_id(left) and right & arguments) or (from_program_id(right) and left & arguments):
                found[f"{name} = {product.strip()}"] = None
    return list(found)
