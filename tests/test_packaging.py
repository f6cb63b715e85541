"""What a user installs: the wheel, outside the checkout, and what the README tells them to type."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_gqaprune.cli import make_parser
from hf_gqaprune.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, cwd: Path, **environment: str) -> str:
    """Run `code` in a fresh process and return what it prints."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the built wheel was unpacked into."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_the_wheel_holds_all_subpackages_and_data(installed, tmp_path):
    code = """
import hf_gqaprune, hf_gqaprune.trainer.recover, hf_gqaprune.model_cards.card
from hf_gqaprune.configuration import builtin
from hf_gqaprune import demo
from pathlib import Path
print(Path(hf_gqaprune.__file__).parent)
print(sorted(builtin("recipes")), sorted(builtin("accelerate")))
print((demo.model_path() / "model.safetensors").is_file())
print((Path(hf_gqaprune.model_cards.card.__file__).parent / "template.md.jinja").is_file())
"""
    place, names, model, template = python(code, tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(place) == installed / "hf_gqaprune"
    assert "'demo'" in names and "'single'" in names and "'cpu_2'" in names
    assert (model, template) == ("True", "True")


def test_importing_loads_the_model_classes_only(tmp_path):
    code = "import sys, hf_gqaprune; print([n for n in sys.argv[1:] if n in sys.modules] or 'none')"
    heavy = "('evaluate', 'trl', 'peft', 'torch_pruning', 'datasets', 'lm_eval', 'matplotlib')"
    code = code.replace("sys.argv[1:]", heavy)
    assert python(code, tmp_path).strip() == "none"


def test_every_public_name_exists(tmp_path):
    code = "import hf_gqaprune as gp; print(all(getattr(gp, name) is not None for name in gp.__all__))"
    assert python(code, tmp_path).strip() == "True"


def commands() -> list[str]:
    lines = re.findall(r"^ {4}(gqaprune .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [line.split("#")[0].strip() for line in lines]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_readme_parse(line):
    args = make_parser().parse_args(shlex.split(line)[1:])
    assert callable(args.function)
    if hasattr(args, "recipe"):
        assert Recipe.load(args.recipe, args.set)


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
