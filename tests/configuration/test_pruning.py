"""Check that what can be named is what is registered, and that one setting is refused alike everywhere."""

from __future__ import annotations

from typing import get_args

import pytest

from hf_gqaprune import make_plan
from hf_gqaprune.configuration import Allocation, Compensation, Criterion, PruningConfig, Recipe, RecoveryConfig
from hf_gqaprune.errors import UsageError
from hf_gqaprune.selection import ALLOCATIONS
from hf_gqaprune.statistics import CRITERIA
from hf_gqaprune.surgery import COMPENSATIONS


def test_names_of_choices_are_those_of_the_registries() -> None:
    assert set(get_args(Criterion)) == set(CRITERIA)
    assert set(get_args(Allocation)) == set(ALLOCATIONS)
    assert set(get_args(Compensation)) == set(COMPENSATIONS)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ratio": 1.5}, "ratio=1.5 must be a number between 0 and 1, such as 0.2"),
        ({"ratio": 0.2, "min_ffn": -1}, "min_ffn=-1 must be a whole number from 0"),
        ({"ratio": 0.2, "criterion": "tailor"}, "unknown criterion 'tailor' .did you mean 'taylor'"),
    ],
)
def test_the_api_and_a_recipe_refuse_a_value_alike(fields: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PruningConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=said):
        make_plan(**fields)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=said):
        Recipe.from_dict({"model": "m", "output": "o", "prune": fields})


def test_a_config_cannot_be_changed_and_is_not_what_it_was_not_told() -> None:
    config = PruningConfig(ratio=0.2, keep_layers=[0, -1])
    with pytest.raises(AttributeError):
        config.ratio = 0.3  # type: ignore[misc]
    assert config == PruningConfig(ratio=0.2, keep_layers=(0, -1)) and config.keep_layers == (0, -1)
    with pytest.raises(UsageError, match="unknown pruning setting 'raito' .did you mean 'ratio'"):
        PruningConfig(raito=0.2)  # type: ignore[call-arg]


def test_distillation_without_a_teacher_is_refused_and_a_preset_leaves_it_out() -> None:
    assert RecoveryConfig.from_preset().distillation == 0
    assert RecoveryConfig.from_preset(teacher="dense").distillation == 0.7
    with pytest.raises(UsageError, match="need the dense model: pass --teacher"):
        RecoveryConfig.from_preset(distillation=0.5)
    with pytest.raises(UsageError, match="preset alpaca does not distil"):
        RecoveryConfig.from_preset("alpaca", teacher="dense")
