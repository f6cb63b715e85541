"""What `Workload` says a step takes, beside what it does take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.memory_worker import GROUPS, HIDDEN, LAYER, TEXT, WIDE

from hf_gqaprune.data.calibration import sampling_bytes
from hf_gqaprune.data.text import Text
from hf_gqaprune.models.shapes import LayerShape, ModelShape
from hf_gqaprune.statistics.criteria import CRITERIA
from hf_gqaprune.streaming.memory_bound import Workload

#: buffers of a library's own, which are part of `memory_bound.PROCESS`
OWN = 32 << 20


def measuring(criterion: str, layer: LayerShape, hidden: int, windows: int = 0) -> int:
    """What the estimate has for scoring a layer, without its weights and sums."""
    shape = ModelShape(hidden, 8, False, False, False, "bfloat16", (layer,))
    work = Workload(shape, 2, windows, 1, CRITERIA[criterion], False)
    wide = layer.query_heads * layer.head_dim
    sums = 4 * (wide**2 + layer.ffn**2) + 8 * hidden**2 if windows else 0
    return work.stages()["measuring a layer"] - work._weights(layer) - sums


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
def test_steps_take_no_more_than_is_said(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, Path(__file__).parents[1] / "support" / "memory_worker.py", tmp_path]
    taken = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    said = {
        "norms": measuring("magnitude", LAYER, HIDDEN),
        "removal": measuring("curvature", LayerShape(GROUPS, GROUPS, 8, WIDE // GROUPS), WIDE, windows=1),
        "tokenizing": sampling_bytes(tokenizer, [(Text("text", "file", TEXT), 1.0)], 8, 32),
    }
    assert taken.keys() == said.keys()
    for name, size in said.items():
        assert taken[name] < size + OWN < 6 * taken[name], (name, taken[name], size)


def test_weights_that_are_stored_wider_are_there_twice() -> None:
    shape = ModelShape(64, 1000, False, False, False, "bfloat16", (LayerShape(4, 2, 128, 16),))
    stages = [Workload(shape, 2, 4, 8, CRITERIA["curvature"], False, stored=stored).stages() for stored in (0, 2, 4)]
    assert stages[0] == stages[1]
    assert stages[2]["the embeddings"] - stages[1]["the embeddings"] == 4 * 64 * 1000
