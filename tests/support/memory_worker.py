"""Prints what steps take beyond what this process has, in bytes, as JSON; a process of its own has nothing to reuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_gqaprune.data.text import Text
from hf_gqaprune.data.windows import token_windows
from hf_gqaprune.dependency_graph import trace_units
from hf_gqaprune.linalg.obs import remove_within
from hf_gqaprune.linalg.symmetric import invert_, weighted_gram
from hf_gqaprune.models.shapes import LayerShape
from hf_gqaprune.statistics.criteria import CRITERIA, Block

HIDDEN, FFN, WIDE, GROUPS = 768, 6144, 1536, 32
LAYER = LayerShape(8, 2, FFN, HIDDEN // 8)
TEXT = "one two three four five, and then it counts again: six seven. " * 5_000


def main() -> None:
    torch.set_num_threads(1)
    units = trace_units((LAYER,))[0].units("mlp")
    small, block = (
        Block(
            0,
            "mlp",
            {
                "mlp.gate_proj": torch.ones(FFN, hidden, dtype=torch.bfloat16),
                "mlp.up_proj": torch.ones(FFN, hidden, dtype=torch.bfloat16),
                "mlp.down_proj": torch.ones(hidden, FFN, dtype=torch.bfloat16),
            },
            units,
        )
        for hidden in (8, HIDDEN)
    )
    weight, columns = torch.ones(WIDE, WIDE, dtype=torch.bfloat16), torch.arange(WIDE).view(GROUPS, -1)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])

    def remove(n: int, columns: torch.Tensor) -> None:
        inverse = invert_(torch.eye(n, dtype=torch.float64))
        remove_within(inverse, weighted_gram(weight[:n, :n], torch.eye(n)), columns)

    # what libraries allocate once
    CRITERIA["magnitude"].curve(small)
    remove(64, torch.arange(64).view(4, -1))
    token_windows(tokenizer, Text("text", "file", TEXT[:1000]), 32, 1)
    found = {
        "tokenizing": peak_of(lambda: token_windows(tokenizer, Text("text", "file", TEXT), 32, 1)),
        "norms": peak_of(lambda: CRITERIA["magnitude"].curve(block)),
        "removal": peak_of(lambda: remove(WIDE, columns)),
    }
    print(json.dumps(found))


def peak_of(work: Callable[[], object]) -> int:
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
