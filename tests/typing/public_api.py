"""Hold that type checkers see the real types of the public functions; `make lint` checks this file, nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import hf_gqaprune as gp
from hf_gqaprune.configuration import PruningConfig
from hf_gqaprune.evaluation import PerplexityResult


def check(model: gp.PrunedLlamaForCausalLM, statistics: gp.Statistics, tokenizer: object) -> None:
    """Name the type of each result."""
    plan = gp.make_plan(statistics, PruningConfig(ratio=0.2))
    assert_type(plan, gp.PruningPlan)
    assert_type(gp.prune(model, plan, statistics), gp.PrunedLlamaForCausalLM)
    assert_type(gp.Calibration.from_text(tokenizer, ["wikitext2"]), gp.Calibration)
    assert_type(gp.evaluate_perplexity(model, tokenizer, "wikitext2"), PerplexityResult)
    assert_type(gp.prune_checkpoint("model", plan, "out"), Path)
    assert_type(gp.recover("pruned", ["notes.txt"], "recovered"), Path)
    assert_type(gp.merge("adapter", "merged"), Path)
    assert_type(gp.create_model_card("pruned", base_model="base"), Path)
    assert_type(plan.ratio, float)
