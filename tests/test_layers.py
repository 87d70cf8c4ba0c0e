"""The arrows of the architecture: what may import what, and what must not need torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "anchored"

# a part may import parts of lower rank, and itself; stages have the same rank, so they never import each other
RANK = {
    **dict.fromkeys(["records", "datasets_io", "leak", "cards", "runs", "errors", "settings", "progress"], 0),
    **dict.fromkeys(["process", "own", "teachers"], 0),
    **dict.fromkeys(["llm", "contrast", "objectives", "batches", "decisions"], 1),
    **dict.fromkeys(["create", "train", "evaluate", "report", "hub"], 2),
    **dict.fromkeys(["recipe", "trial", "pipeline", "plan", "pocket", "inspect", "terminal", "cli", "__main__"], 3),
}
FIRST_LAYER = {name for name, rank in RANK.items() if rank == 0}
TOP_LAYER = {name for name, rank in RANK.items() if rank == 3}


def part_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """The parts of anchored that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "anchored":
                found |= {alias.name for alias in node.names if alias.name != "__version__"}
            elif module.startswith("anchored."):
                found.add(part_of(module))
        elif isinstance(node, ast.Import):
            found |= {part_of(alias.name) for alias in node.names if alias.name.startswith("anchored.")}
    return found


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_only_to_lower_layers(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in RANK, f"{part} has no place in the layers"
    for other in imports(path) - {part}:
        same_layer_allowed = part in FIRST_LAYER | TOP_LAYER and RANK[part] == RANK[other]
        assert RANK[other] < RANK[part] or same_layer_allowed, f"{path}: {part} must not import {other}"


def test_modules_form_no_circle_within_a_layer() -> None:
    needs: dict[str, set[str]] = {}
    for path in files():
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        needs.setdefault(part, set()).update(imports(path) - {part})
    done: set[str] = set()
    while len(done) < len(needs):
        free = {part for part, others in needs.items() if part not in done and others <= done}
        assert free, f"a circle among {sorted(set(needs) - done)}"
        done |= free


@pytest.mark.parametrize(
    "module",
    ["anchored.cli", "anchored.create.stage", "anchored.llm.openai_chat", "anchored.recipe", "anchored.hub.share"],
)
def test_help_and_data_creation_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
