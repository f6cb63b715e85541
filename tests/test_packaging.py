"""What a user installs: the wheel, outside the checkout, and what the README tells them to type."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_gqaprune.cli import make_parser, verbs
from hf_gqaprune.cli.flags import given
from hf_gqaprune.configuration import PRESETS, Recipe, RecoveryConfig, builtin
from hf_gqaprune.trainer.launch import accelerate_flags

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, cwd: Path, **environment: str) -> str:
    """Run `code` in a fresh process and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the built wheel was unpacked into."""
    folder = tmp_path_factory.mktemp("wheel")
    # built from a copy: what an earlier build left in the checkout would go into the wheel
    left_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_the_wheel_holds_all_subpackages_and_data(installed, tmp_path):
    code = """
import hf_gqaprune, hf_gqaprune.trainer.recovery, hf_gqaprune.model_cards.card
from hf_gqaprune.configuration import builtin
from hf_gqaprune.data import demo
from pathlib import Path
print(Path(hf_gqaprune.__file__).parent)
print(sorted(builtin("recipes")), sorted(builtin("accelerate")))
print((demo.demo_model_path() / "model.safetensors").is_file())
print((Path(hf_gqaprune.model_cards.card.__file__).parent / "template.md.jinja").is_file())
"""
    place, names, model, template = python(code, tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(place) == installed / "hf_gqaprune"
    assert "'demo'" in names and "'single'" in names and "'cpu_2'" in names
    assert (model, template) == ("True", "True")


def test_the_wheel_has_every_folder_of_code(installed):
    folders = {"hf_gqaprune": "", "configuration": "configuration", "trainer": "trainer", "model_cards": "model_cards"}
    for folder, place in folders.items():
        modules = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        assert {path for path in modules if not (installed / "hf_gqaprune" / place / path).is_file()} == set()


def test_a_source_tree_is_whole_where_python_finds_it_first(installed, tmp_path):
    parts = ("hf_gqaprune", "configuration", "trainer", "model_cards")
    for part in parts:
        shutil.copytree(ROOT / part, tmp_path / part)
    (tmp_path / "pyproject.toml").touch()
    code = "from hf_gqaprune.trainer import recovery; from hf_gqaprune.configuration import builtin; print(recovery.__file__)"
    # installed as well, which comes behind the folder that Python is started in
    assert python(code, tmp_path, PYTHONPATH=str(installed)).strip() == str(tmp_path / "trainer" / "recovery.py")


def test_importing_loads_nothing_heavy(tmp_path):
    code = "import sys, hf_gqaprune; print([n for n in sys.argv[1:] if n in sys.modules] or 'none')"
    heavy = "('torch', 'transformers', 'evaluate', 'trl', 'peft', 'torch_pruning', 'datasets', 'lm_eval', 'matplotlib')"
    code = code.replace("sys.argv[1:]", heavy)
    assert python(code, tmp_path).strip() == "none"


def test_every_public_name_exists(tmp_path):
    code = "import hf_gqaprune as gp; print(all(getattr(gp, name) is not None for name in gp.__all__))"
    assert python(code, tmp_path).strip() == "True"


def commands(page: str = "README.md") -> list[str]:
    lines = re.findall(r"^ {4}(gqaprune .*)$", (ROOT / page).read_text(), re.MULTILINE)
    return [line.split("#")[0].strip() for line in lines]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_readme_parse(line):
    args = make_parser().parse_args(shlex.split(line)[1:])
    assert callable(args.function)
    if hasattr(args, "recipe"):
        assert Recipe.load(args.recipe, args.set)


@pytest.mark.parametrize("line", commands("docs/recovery.md"))
def test_commands_about_recovery_parse(line):
    args, rest = make_parser().parse_known_args(shlex.split(line)[1:])
    if args.function is verbs.recover:
        accelerate_flags(rest)
        assert RecoveryConfig.from_preset(**given(args, RecoveryConfig))
    else:
        assert rest == []
    if hasattr(args, "recipe"):
        assert Recipe.load(args.recipe, args.set)


def test_the_recovery_page_names_what_there_is(tmp_path):
    page = (ROOT / "docs" / "recovery.md").read_text()
    for name in PRESETS:
        config = RecoveryConfig.from_preset(name)
        assert f"| `{name}` | {config.rank} | {config.epochs}" in page
    for name in builtin("accelerate"):
        assert f"| `{name}` |" in page
    for name, value in re.findall(r"`(\w+)=([\w.]+)`", page):
        assert name in RecoveryConfig.names() or name == "KEY", (name, value)
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    arguments = yaml.safe_load(example)
    assert set(arguments) - set(RecoveryConfig.names()) == {"model", "output"}
    assert RecoveryConfig.from_dict({k: v for k, v in arguments.items() if k in RecoveryConfig.names()}).learning_rate == 1e-4


def test_the_python_of_the_readme_runs(tmp_path, llama, tokenizer, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name in ("text.txt", "notes.txt"):
        (tmp_path / name).write_text(f"The {name} counts: one two three four five six seven. " * 100)
    llama.save_pretrained(tmp_path / "MODEL")
    tokenizer.save_pretrained(tmp_path / "MODEL")
    # the same code on a model and texts of a test's size
    smaller = {"wikitext2": "text.txt", "samples=128": "samples=8", "seq_len=2048": "seq_len=32"}
    for wanted, instead in smaller.items():
        assert wanted in code
        code = code.replace(wanted, instead)
    for name in ("MODEL", "text.txt", "notes.txt", "pruned"):
        code = code.replace(f'"{name}', f'"{tmp_path / name}')
    exec(code, {})
    assert "of all parameters" in capsys.readouterr().out
    assert (tmp_path / "pruned" / "prune_plan.json").is_file()


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
