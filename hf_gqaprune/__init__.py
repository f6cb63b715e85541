"""Structured pruning of Llama-family checkpoints by whole KV groups and FFN channels.

Importing the package loads the config and model classes and registers them with transformers' Auto classes; everything
else is imported when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from .configuration_pruned_llama import PrunedLlamaConfig
from .errors import UsageError, WorkError
from .modeling_pruned_llama import (
    PrunedLlamaForCausalLM,
    PrunedLlamaForQuestionAnswering,
    PrunedLlamaForSequenceClassification,
    PrunedLlamaForTokenClassification,
    PrunedLlamaModel,
    register,
)

__version__ = "0.1.0"

if (_root := Path(__file__).parents[1]).joinpath("pyproject.toml").is_file():
    # a source tree, which Python prefers where it is started in one, keeps trainer/ and others beside this package
    __path__.append(str(_root))

register()

_LAZY = {
    "Calibration": "calibration",
    "PruningPlan": "plan",
    "Statistics": "statistics",
    "collect_statistics": "measurement",
    "stream_statistics": "streamed_statistics",
    "create_model_card": "model_cards.card",
    "evaluate_perplexity": "evaluation",
    "make_plan": "planner",
    "merge": "trainer.merge",
    "prune": "surgery",
    "prune_checkpoint": "streaming",
    "push": "hub",
    "recover": "trainer.recover",
}

__all__ = [
    "PrunedLlamaConfig",
    "PrunedLlamaForCausalLM",
    "PrunedLlamaForQuestionAnswering",
    "PrunedLlamaForSequenceClassification",
    "PrunedLlamaForTokenClassification",
    "PrunedLlamaModel",
    "UsageError",
    "WorkError",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
