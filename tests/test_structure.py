"""Check that the folders import downwards, through faces, without circles, and nothing that is not declared."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import structure

ROOT = Path(__file__).resolve().parent.parent
#: imported only where an option asks for it, and named in the error where it is missing
OPTIONAL = {"bitsandbytes", "triton"}


def test_imports_go_down_and_through_faces() -> None:
    assert structure.problems() == []
    folders, files = structure.graphs()
    assert structure.circles(folders) == structure.circles(files) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package without its data."""
    for part in (structure.PACKAGE, *structure.BESIDE):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "demo_model"))
    return tmp_path


@pytest.mark.parametrize(
    "file, line, said",
    [
        ("hf_gqaprune/linalg/obs.py", "from ..selection import make_plan", "linalg imports selection, which stands above it"),
        ("hf_gqaprune/selection/planner.py", "from ..plan import x\nfrom ..models.shapes import Cost", "from the face of models"),
        ("hf_gqaprune/selection/budget.py", "from .planner import make_plan", "circle of files: "),
        ("hf_gqaprune/utils/files.py", "from hf_gqaprune.trainer import recover", "utils imports trainer"),
    ],
)
def test_what_breaks_the_order_is_found(copy: Path, file: str, line: str, said: str) -> None:
    path = copy / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert any(said in problem for problem in structure.problems(copy))


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[<>=\[; ]", line)[0].lower().replace("_", "-") for line in lines}
    owners = packages_distributions()
    found = set()
    for path in structure.modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    missing = {
        name
        for name in found - set(sys.stdlib_module_names) - OPTIONAL - {structure.PACKAGE}
        if not {owner.lower().replace("_", "-") for owner in owners.get(name, [name])} & declared
    }
    assert missing == set()


@pytest.mark.parametrize("line", ["--help", "prune --help", "run --help", "recover --help", "recipes ls", "plna", "plan demo -o x"])
def test_help_and_refusals_load_neither_torch_nor_transformers(line: str, tmp_path: Path) -> None:
    code = (
        "import sys; from hf_gqaprune.cli import main\n"
        f"try: code = main({line.split()!r})\n"
        "except SystemExit as stop: code = stop.code\n"
        "print(code, [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{2 if line.startswith('pl') else 0} []"


KNOB = '    knob: int = setting(default=3, help="turns a knob", check=at_least(2))\n'
KNOB_CHECK = """
from hf_gqaprune.cli import make_parser
from hf_gqaprune.cli.verbs import _prune_request
from hf_gqaprune.configuration import PruningConfig, Recipe
from hf_gqaprune.errors import UsageError
assert PruningConfig(ratio=0.2).knob == 3 and PruningConfig(ratio=0.2, knob=5).knob == 5
recipe = Recipe.load("demo", ["prune.knob=7"])
assert recipe.prune.knob == 7 and "knob: 7" in recipe.to_yaml()
args = make_parser().parse_args("prune demo --ratio 0.2 --knob 4 -o out".split())
assert _prune_request(args).pruning.knob == 4
for make in (lambda: PruningConfig(ratio=0.2, knob=1), lambda: Recipe.load("demo", ["prune.knob=1"])):
    try:
        make()
    except UsageError as error:
        print(error)
make_parser().parse_args(["prune", "--help"])
"""


def test_a_setting_is_declared_in_one_line(copy: Path, tmp_path: Path) -> None:
    file = copy / "configuration" / "pruning.py"
    text = file.read_text()
    before = "    round_to: int | None = setting("
    assert before in text
    file.write_text(text.replace(before, KNOB + before))
    (copy / "pyproject.toml").touch()
    done = subprocess.run([sys.executable, "-c", KNOB_CHECK], cwd=copy, capture_output=True, text=True, check=True)
    assert "knob=1 must be a whole number from 2\ndemo: prune.knob=1 must be a whole number from 2\n" in done.stdout
    assert "turns a knob (default: 3)" in " ".join(done.stdout.split()) and "--knob N" in done.stdout
