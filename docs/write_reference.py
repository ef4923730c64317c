"""Fill in docs/reference.md: `python -m docs.write_reference`, from the root of the repository.

Between <!-- api: NAME --> and <!-- /api --> stands what the source says of a public name: its heading, its signature
and its docstring as Markdown. The text around the marks is written by hand. The source is parsed and not imported, so
that the adapters are described without their frameworks.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "optsample_triton"
PAGE = ROOT / "docs" / "reference.md"
BLOCK = re.compile(r"(<!-- api: ([\w.]+) -->\n).*?(<!-- /api -->)", re.DOTALL)
SECTIONS = {"Args:": "", "Returns:": "**Returns** "}


def source(module: str) -> Path:
    """The file of a module, named from the package on: "is_reshape", or "" for the package itself."""
    path = ROOT.joinpath(PACKAGE, *filter(None, module.split(".")))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def names_of(module: str) -> list[str]:
    """What a module offers: its __all__, or else the public functions and classes that it defines."""
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            found: list[str] = ast.literal_eval(node.value)
            return found
    return [
        node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
    ]


def public() -> list[str]:
    """Every public function, class and table, each under the shortest name that it has."""
    folder = ROOT / PACKAGE / "integrations"
    adapters = sorted(path.stem for path in folder.iterdir() if path.stem[0] not in "._")
    modules = ["is_reshape", "pipeline", *(f"integrations.{name}" for name in adapters)]
    top = [name for name in names_of("") if name not in ("__version__", "integrations", "is_reshape", "pipeline")]
    return top + [f"{module}.{name}" for module in modules for name in names_of(module) if name not in top]


def definition(module: str, name: str) -> tuple[ast.stmt, str]:
    """The statement that defines a name, and the text of its file; imports are followed."""
    text = source(module).read_text(encoding="utf-8")
    tree = ast.parse(text)
    for node in tree.body:
        if getattr(node, "name", None) == name:
            return node, text
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return node, text
    for each in ast.walk(tree):
        if isinstance(each, ast.ImportFrom) and name in [alias.asname or alias.name for alias in each.names]:
            return definition((each.module or "").removeprefix(PACKAGE).removeprefix("."), name)
    raise ValueError(f"{module or PACKAGE} has no public name {name!r}")


def signature(node: ast.FunctionDef | ast.ClassDef, text: str) -> str:
    """The lines from def or class to the colon, as the source has them."""
    lines = text.splitlines()[node.lineno - 1 : node.body[0].lineno - 1] or [text.splitlines()[node.lineno - 1]]
    head = textwrap.dedent("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    return re.sub(r":\s*(#.*)?$", "", head.rstrip())


def fields(node: ast.ClassDef, text: str) -> list[str]:
    """A class's fields or values with the comments beside them, and then how it is made and called."""
    found = []
    for one in node.body:
        if isinstance(one, ast.AnnAssign | ast.Assign):
            found.append(_field(one, text))
        elif isinstance(one, ast.FunctionDef) and one.name in ("__init__", "__call__"):
            found.append(signature(one, text).replace("self, ", "").replace("    self,\n", ""))
    return found


def _field(node: ast.AnnAssign | ast.Assign, text: str) -> str:
    """Its line; of a field made by a call the default alone, which is the last of the call's several arguments."""
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call) or node.value.keywords:
        return text.splitlines()[node.lineno - 1].strip()
    default = f" = {ast.get_source_segment(text, node.value.args[-1])}" if len(node.value.args) > 1 else ""
    return f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}{default}"


def markdown(docstring: str) -> str:
    """A docstring of this package as Markdown: one line per paragraph, arguments as a list, examples fenced."""
    parts = []
    before = ""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        head, _, rest = block.partition("\n")
        if head in SECTIONS:
            parts.append(_section(SECTIONS[head], inspect.cleandoc(rest)))
        elif head.startswith(">>> "):
            parts.append(f"```pycon\n{block}\n```")
        elif before.endswith("::"):
            parts.append(f"```py\n{textwrap.dedent(block)}\n```")
        elif block != "::":
            parts.append(_prose(re.sub(r"::$", ":", textwrap.dedent(block))))
        before = block
    return "\n\n".join(parts)


def _section(title: str, text: str) -> str:
    if title:
        return title + _prose(text)
    entries = re.split(r"\n(?=\S)", text)
    return "\n".join(f"* {_names(name)}: {_prose(rest)}" for name, _, rest in (one.partition(": ") for one in entries))


def _names(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _prose(text: str) -> str:
    """Joined lines, bullets apart, with stars outside of code escaped."""
    lines = re.split(r"\n(?=\* )", text)
    joined = (re.sub(r"\s*\n\s*", " ", line).replace("``", "`") for line in lines)
    pieces = (re.split(r"(`[^`]*`)", line) for line in joined)
    return "\n".join(
        "".join(piece if piece.startswith("`") else re.sub(r"(?<!^)\*|^\*(?! )", r"\\*", piece) for piece in line)
        for line in pieces
    )


def entry(name: str) -> str:
    """What the page says of one name."""
    module, _, last = name.rpartition(".")
    node, text = definition(module, last)
    heading = f"### `{name}`\n\n"
    if isinstance(node, ast.AnnAssign):
        keys = [ast.literal_eval(key) for key in node.value.keys if key] if isinstance(node.value, ast.Dict) else []
        listed = ", ".join(f"`{key}`" for key in keys)
        return f"{heading}```py\n{last}: {ast.unparse(node.annotation)}\n```\n\nKeys: {listed}.\n"
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    code = signature(node, text)
    if isinstance(node, ast.ClassDef):
        code = "\n".join([code + ":", *(textwrap.indent(each, "    ") for each in fields(node, text))])
    docstring = ast.get_docstring(node, clean=False)
    return f"{heading}```py\n{code}\n```\n" + (f"\n{markdown(docstring)}\n" if docstring else "")


def filled(text: str) -> str:
    """The page with every marked block written anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{entry(match[2])}{match[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
