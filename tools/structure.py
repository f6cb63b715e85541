"""Print the folders of the package in order, who imports whom, and whatever breaks the order.

    python tools/structure.py            folders from the ground up, with the folders that each one imports
    python tools/structure.py --files    the same for files
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "hf_gqaprune"
#: parts of the package that lie beside it in the repository
BESIDE = ("configuration", "trainer", "model_cards")
#: folders and root modules from the ground up; each imports only from those before it
ORDER = (
    *("version", "errors", "linalg", "configuration", "utils", "models", "data", "checkpoint", "plan", "dependency_graph"),
    *("statistics", "torch_pruning", "compensation", "selection", "surgery", "streaming", "evaluation", "model_cards"),
    *("hub", "exporters", "trainer", "pipeline", "cli", "__main__", "__init__"),
)

Graph = dict[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Find the modules of the package: `{dotted name without the package: file}`."""
    found = {}
    for base in (PACKAGE, *BESIDE):
        for path in sorted((root / base).rglob("*.py")):
            parts = path.relative_to(root if base in BESIDE else root / PACKAGE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(name: str, path: Path) -> list[tuple[str, int, bool]]:
    """List what a module imports of the package: `(dotted name, line, whether only type checkers see it)`."""
    is_package = path.name == "__init__.py"
    here = [] if name == "__init__" else name.split(".")
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = {id(node) for block in ast.walk(tree) if _for_types(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            parent = here[: len(here) - node.level + (1 if is_package else 0)] if here else []
            base = [*parent, *(node.module or "").split(".")] if node.module else parent
        elif (node.module or "").split(".")[0] == PACKAGE:
            base = (node.module or "").split(".")[1:]
        else:
            continue
        for alias in node.names:
            target = ".".join(base) if base else alias.name
            found.append((target, node.lineno, id(node) in typed))
    return found


def folder_of(name: str) -> str:
    """Return the folder of a module, or a root module's own name."""
    return name.partition(".")[0]


def graphs(root: Path = ROOT) -> tuple[Graph, Graph]:
    """Return who imports whom, by folder and by file; the faces of folders are not followed."""
    found = modules(root)
    files: Graph = {name: set() for name in found}
    folders: Graph = {folder_of(name): set() for name in found}
    for name, path in found.items():
        for target, _, _ in imports(name, path):
            if folder_of(target) != folder_of(name):
                folders[folder_of(name)].add(folder_of(target))
            if target in found and target != name:
                files[name].add(target)
    return folders, files


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def floors(graph: Graph) -> dict[str, int]:
    """Return the floor of each node: 1 where nothing is imported, else one above the highest import (circles left out)."""
    inside = {node for circle in circles(graph) for node in circle}
    known: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in known:
            known[node] = 1 + max((floor(t) for t in graph.get(node, ()) if not (t in inside and node in inside)), default=0)
        return known[node]

    return {node: floor(node) for node in graph}


def problems(root: Path = ROOT) -> list[str]:
    """List every import that goes up, every circle, and every name that is not taken from the face of its folder."""
    found, (folders, files) = modules(root), graphs(root)
    place = {name: number for number, name in enumerate(ORDER)}
    said = [f"{name} stands in no order: add it to ORDER" for name in folders if name not in place]
    for name, path in found.items():
        for target, line, _ in imports(name, path):
            mine, other = folder_of(name), folder_of(target)
            where = f"{path.relative_to(root)}:{line}"
            if mine == other:
                continue
            if place.get(other, 0) >= place.get(mine, 0):
                said.append(f"{where}: {mine} imports {other}, which stands above it")
            if "." in target:
                said.append(f"{where}: imports {target}, not from the face of {other}")
    said += [f"circle of files: {', '.join(circle)}" for circle in circles(files)]
    said += [f"circle of folders: {', '.join(circle)}" for circle in circles(folders)]
    return said


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def main() -> int:
    """Print the graph; exit with 1 where something breaks the order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="files instead of folders")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    args = parser.parse_args()
    graph = graphs(args.root)[1 if args.files else 0]
    floor = floors(graph)
    for name in sorted(graph, key=lambda node: (floor[node], node)):
        print(f"{floor[name]:3}  {name:42} {', '.join(sorted(graph[name]))}")
    arrows = sum(len(targets) for targets in graph.values())
    print(f"\n{len(graph)} nodes, {arrows} arrows, {max(floor.values())} floors, {len(circles(graph))} circles")
    found = problems(args.root)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
