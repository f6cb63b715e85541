"""The Auto classes know the pruned Llama, whichever of transformers and this package is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import tiny_llama
from transformers.dynamic_module_utils import get_relative_import_files

from hf_gqaprune import PruningPlan, prune
from hf_gqaprune.models import configuration_pruned_llama, modeling_pruned_llama

LOAD = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert type(AutoConfig.from_pretrained(sys.argv[1])).__module__ == "hf_gqaprune.models.configuration_pruned_llama"
assert "hf_gqaprune.models.modeling_pruned_llama" not in sys.modules
for auto, name in ((AutoModel, "PrunedLlamaModel"), (AutoModelForCausalLM, "PrunedLlamaForCausalLM")):
    model = auto.from_pretrained(sys.argv[1])
    assert (type(model).__module__, type(model).__name__) == ("hf_gqaprune.models.modeling_pruned_llama", name)
model.save_pretrained(sys.argv[2])
"""


@pytest.mark.parametrize(
    "first",
    [
        "import hf_gqaprune; assert not {'torch', 'transformers'} & set(sys.modules)",
        "import transformers, hf_gqaprune; assert 'torch' not in sys.modules",
        "from transformers import AutoModelForCausalLM; import hf_gqaprune",
        # imports the Auto classes halfway through what the pruned Llama is built on
        "import hf_gqaprune; from transformers import LlamaForCausalLM",
    ],
)
def test_both_import_orders_load_and_save(first: str, tmp_path: Path) -> None:
    model = tiny_llama()
    prune(model, PruningPlan.keep_all(model.config), compensation="none").save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", f"import sys\n{first}\n{LOAD}", str(tmp_path / "model"), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"configuration_pruned_llama.py", "modeling_pruned_llama.py"} <= {p.name for p in (tmp_path / "again").iterdir()}
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "model" / "config.json").read_text()


def test_the_shipped_files_import_nothing_else_of_ours() -> None:
    assert get_relative_import_files(modeling_pruned_llama.__file__) == [configuration_pruned_llama.__file__]
    assert get_relative_import_files(configuration_pruned_llama.__file__) == []
