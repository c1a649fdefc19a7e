"""The direction of imports: cli -> calibration -> surgery, training -> model -> families, axes -> checkpoint."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tlt_cli

ROOT = Path(tlt_cli.__file__).parent
FOUNDATION = {"errors", "checkpoint"}
MODEL = FOUNDATION | {"axes", "families"}
SURGERY = MODEL | {"model"}

# What each part of the house may import of the others. A new part is entered here, in its place.
MAY_IMPORT = {
    "axes": set[str](),
    "errors": set[str](),
    "checkpoint": {"errors"},
    "families": FOUNDATION | {"axes"},
    "model": MODEL,
    "calibration": SURGERY | {"surgery"},
    "surgery": SURGERY,
    "training": SURGERY,
    "cli": SURGERY | {"calibration", "surgery", "training"},
    "__main__": {"cli"},
}


def parts_imported(tree: ast.AST) -> Iterator[str]:
    """The parts of tlt_cli that a module imports, anywhere in it: at its top, inside functions, for type checking."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            part = rest.partition(".")[0]
            if package == "tlt_cli" and part and part != "__version__":
                yield part


def wrong_ways(part: str, source: str) -> list[str]:
    """What a module of `part` imports though it may not."""
    return sorted(set(parts_imported(ast.parse(source))) - MAY_IMPORT[part] - {part})


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert part in MAY_IMPORT, f"{part} has no place in the house yet"
    assert wrong_ways(part, path.read_text()) == []


def test_the_wrong_way_is_seen() -> None:
    assert wrong_ways("checkpoint", "def f():\n    from tlt_cli.families.fit import fit") == ["families"]
    assert wrong_ways("axes", "import tlt_cli.errors") == ["errors"]
    assert wrong_ways("model", "from tlt_cli import cli, surgery") == ["cli", "surgery"]
    assert wrong_ways("families", "import torch\nfrom tlt_cli.axes import parse\nfrom tlt_cli import __version__") == []
