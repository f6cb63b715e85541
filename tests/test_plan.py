"""Plans as data, the exact cost model, and budgets that are met to one FFN channel."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.tiny import tiny_config, tiny_llama, token_ids
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, MistralConfig

from hf_gqaprune import (
    Calibration,
    PrunedLlamaConfig,
    PrunedLlamaForCausalLM,
    PruningPlan,
    collect_statistics,
    make_plan,
)
from hf_gqaprune.errors import UsageError
from hf_gqaprune.models.shapes import LayerShape, ModelShape, layer_shapes, unit_parameters
from hf_gqaprune.plan import LayerPlan
from hf_gqaprune.statistics.moments import Curve
from hf_gqaprune.statistics.store import BlockStatistics, Statistics

LAYERED: dict[str, Any] = {"ratio": 0.2, "allocation": "layer_importance"}
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    dtype="bfloat16",
)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    layers = [
        LayerShape(kv * n_rep, kv, ffn, 8)
        for kv, n_rep, ffn in draw(
            st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(0, 40)), min_size=1, max_size=4)
        )
    ]
    layers[-1] = LayerShape(4, 2, 20, 8)
    return ModelShape(
        hidden_size=draw(st.integers(4, 32)),
        vocab_size=draw(st.integers(4, 500)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        layers=tuple(layers),
    )


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    source = draw(shapes())
    layers = []
    for shape in source.layers:
        groups = draw(st.sets(st.integers(0, shape.kv_heads - 1))) if shape.kv_heads else set()
        channels = draw(st.sets(st.integers(0, shape.ffn - 1))) if shape.ffn else set()
        layers.append(LayerPlan.of_groups(shape, groups, channels))
    assume(any(layer.kv_groups for layer in layers))
    return PruningPlan(source, tuple(layers), "random", "global", source.attention_bias, source.mlp_bias)


@settings(max_examples=50, deadline=None)
@given(plans())
def test_json_round_trip(plan: PruningPlan) -> None:
    again = PruningPlan.from_dict(json.loads(plan.to_json()))
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.hash() == plan.hash()
    assert PruningPlan.from_dict(plan.to_dict()) == plan


def small_plan() -> PruningPlan:
    return PruningPlan(
        ModelShape(8, 10, False, False, False, "bfloat16", (LayerShape(4, 2, 6, 8), LayerShape(4, 2, 6, 8))),
        (LayerPlan((1,), (2, 3), (0, 1, 2, 5)), LayerPlan((0, 1), (0, 1, 2, 3), ())),
        "taylor",
        "global",
    )


def test_the_file_has_one_line_per_layer(tmp_path: Path) -> None:
    plan = small_plan()
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == plan.to_json()
    assert '    {"kv_groups": "1", "query_heads": "2-3", "ffn_channels": "0-2,5"},\n' in plan.to_json()
    assert PruningPlan.load(tmp_path / "plan.json") == plan


def test_cost_by_hand() -> None:
    plan = small_plan()
    # attention: q 8x32, k and v 8x16 each, o 32x8, norm 8; FFN: 3x8x6, norm 8; embeddings and head 10x8 each, norm 8
    assert plan.before.backbone_parameters == 2 * (256 + 128 + 128 + 256 + 8 + 144 + 8)
    assert plan.before.parameters == plan.before.backbone_parameters + 80 + 80 + 8
    # layer 0: one group of two query heads and 4 channels; layer 1: all of attention, no FFN and no norm of it
    assert plan.after.backbone_parameters == (128 + 64 + 64 + 128 + 8 + 96 + 8) + (256 + 128 + 128 + 256 + 8)
    assert plan.before.kv_bytes_per_token == 2 * 2 * 2 * 8 * 2
    assert plan.after.kv_bytes_per_token == 2 * (1 + 2) * 8 * 2
    assert plan.before.flops_per_token == 2 * (2 * (768 + 144) + 80)
    assert plan.backbone_ratio == 1 - plan.after.backbone_parameters / plan.before.backbone_parameters


def test_the_table_shows_every_layer_and_the_totals() -> None:
    lines = str(small_plan()).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["layer", "Q", "heads", "KV", "heads", "FFN", "parameters", "kept"],
        ["0", "4", "->", "2", "2", "->", "1", "6", "->", "4", "496", "53.4%"],
        ["1", "4", "2", "6", "->", "0", "776", "83.6%"],
    ]
    assert lines[4:] == [
        "parameters        2,024 -> 1,440",
        "ratio             28.8538% of all parameters = 31.4655% of the backbone",
        "KV cache / token  128 -> 96 bytes",
        "FLOPs / token     3,808 -> 2,656",
        "chosen by         criterion taylor, allocation global",
    ]


def test_summary_names_skipped_blocks() -> None:
    summary = small_plan().summary()
    assert summary["layers"] == [
        {"query_heads": 2, "kv_heads": 1, "ffn": 4, "skip": []},
        {"query_heads": 4, "kv_heads": 2, "ffn": 0, "skip": ["mlp"]},
    ]
    assert (summary["parameters_before"], summary["parameters_after"]) == (2024, 1440)
    assert summary["hash"] == small_plan().hash()
    json.dumps(summary)


def edited(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The small plan's dict with one value replaced; `...` deletes it."""
    data = copy.deepcopy(small_plan().to_dict())
    node: Any = data
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 99, "not a pruning plan of version 1 \\(found 99\\)"),
        (("version",), ..., "found None"),
        (("source",), ..., "'source'"),
        (("criterion",), ..., "'criterion'"),
        (("layers",), None, "malformed"),
        (("layers", 0), ..., "the plan has 1 layers, its model has 2"),
        (("layers", 0, "kv_groups"), "2", "layer 0: kv_groups must be sorted, distinct and below 2, got 2"),
        (("layers", 0, "kv_groups"), "", "layer 0: query head 2 is kept but its KV group 1 is not"),
        (("layers", 1, "query_heads"), "0-2", "layer 1: kept KV groups must keep equal numbers of query heads"),
        (("layers", 0, "query_heads"), "", "layer 0: kept KV groups must keep equal numbers"),
        (("layers", 0, "ffn_channels"), "3,1", "layer 0: ffn_channels must be sorted"),
        (("layers", 0, "ffn_channels"), "1,1", "layer 0: ffn_channels must be sorted"),
        (("layers", 0, "ffn_channels"), "a-b", "'a-b' is not an index range"),
        (("layers", 0, "ffn_channels"), "0-99999999999999", "0-99999999999999"),
        (("layers", 0, "ffn_channels"), [1, 2], "malformed"),
        (("layers", 0, "ffn_channels"), ..., "malformed"),
        (("layers", 0, "width"), "1", "malformed.*width"),
        (("source", "layers", 0, "ffn"), "six", "layer 0: ffn must be an integer .* got 'six'"),
        (("source", "layers", 0, "kv_heads"), -2, "layer 0: kv_heads must be an integer .* got -2"),
        (("source", "layers", 0, "query_heads"), 3, "layer 0: 3 query heads cannot share 2 KV heads"),
        (("source", "layers", 0, "kv_heads"), 0, "layer 0: 4 query heads cannot share 0 KV heads"),
        (("source", "hidden_size"), "8", "hidden_size must be an integer .* got '8'"),
        (("source", "unknown"), 1, "malformed.*unknown"),
    ],
)
def test_malformed_plans_are_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        PruningPlan.from_dict(edited(path, value))
    assert "\n" not in str(error.value)


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read plan .*absent.json: No such file"):
        PruningPlan.load(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="broken.json is not a pruning plan"):
        PruningPlan.load(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UsageError, match="list.json: not a pruning plan of version 1 \\(found 'list'\\)"):
        PruningPlan.load(tmp_path / "list.json")


def test_attention_must_stay_somewhere() -> None:
    shape = LayerShape(2, 1, 4, 8)
    with pytest.raises(UsageError, match="removes attention from every layer"):
        PruningPlan(ModelShape(8, 9, False, False, False, "float32", (shape,)), (LayerPlan((), (), (0,)),))


def test_compose_needs_plans_that_follow_each_other() -> None:
    with pytest.raises(UsageError, match="second plan was not made for the model that the first one leaves"):
        small_plan().compose(small_plan())


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="'mistral' is not a Llama-shaped model"):
        ModelShape.from_config(MistralConfig(num_hidden_layers=1))


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_cost_model_counts_the_parameters_of_the_built_model(attention_bias: bool, mlp_bias: bool, tied: bool) -> None:
    options = {"attention_bias": attention_bias, "mlp_bias": mlp_bias, "tie_word_embeddings": tied}
    dense = tiny_config(layers=4, **options)
    sizes = {
        1: {"skip": ["attention"], "intermediate_size": 5},
        2: {"skip": ["mlp"], "num_attention_heads": 3, "num_key_value_heads": 1},
        3: {"skip": ["attention", "mlp"]},
    }
    values = dense.to_dict()
    values.pop("model_type")
    pruned = PrunedLlamaConfig(**values, per_layer_config=sizes)
    for config, model_class in ((dense, LlamaForCausalLM), (pruned, PrunedLlamaForCausalLM)):
        with torch.device("meta"):
            model = model_class(config)
        cost = ModelShape.from_config(config).cost
        assert cost.parameters == model.num_parameters()
        assert cost.backbone_parameters == sum(parameter.numel() for parameter in model.model.layers.parameters())
        linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        assert cost.flops_per_token == 2 * linears
    assert [shape.skip for shape in layer_shapes(pruned)] == [[], ["attention"], ["mlp"], ["attention", "mlp"]]


def drawn_statistics(source: ModelShape, seed: int) -> Statistics:
    """Curves with random order and cost for every block."""
    generator = torch.Generator().manual_seed(seed)
    blocks = {}
    for layer, kind in unit_parameters(source):
        shape = source.layers[layer]
        units = shape.kv_heads if kind == "attention" else shape.ffn
        order = torch.randperm(units, generator=generator)
        cost = torch.rand(units, generator=generator, dtype=torch.float64).cumsum(0)
        blocks[layer, kind] = BlockStatistics(layer, kind, Curve(order, cost))
    return Statistics(source, "random", blocks)


@settings(max_examples=100, deadline=None)
@given(
    shapes(),
    st.floats(0.01, 0.99),
    st.sampled_from(["global", "uniform", "layer_importance"]),
    st.sampled_from(["ratio", "backbone_ratio"]),
    st.sampled_from([(1, 1), (0, 0), (1, 0), (0, 1), (2, 3)]),
    st.sampled_from([None, 1, 2, 5, 8]),
    st.sets(st.sampled_from([0, 1, 2, -1, -2])),
    st.integers(0, 99),
)
def test_budgets_are_met_to_one_channel(
    source: ModelShape,
    ratio: float,
    allocation: str,
    name: str,
    floors: tuple[int, int],
    round_to: int | None,
    keep: set[int],
    seed: int,
) -> None:
    """One channel, or as many as are traded together; what is to be kept is kept."""
    layers = len(source.layers)
    keep = {index % layers for index in keep if -layers <= index < layers}
    granule = (round_to or 1) * (3 * source.hidden_size + (2 if source.mlp_bias else 0))
    groups = [n for (index, kind), n in unit_parameters(source).items() if kind == "attention" and index not in keep]
    open_layers = [shape for index, shape in enumerate(source.layers) if index not in keep]
    tradable = granule * sum(max(0, shape.ffn - floors[1]) // (round_to or 1) for shape in open_layers)
    # with less FFN than that, whole KV groups are too coarse for an exact budget
    assume(tradable >= (max(groups, default=0) if allocation == "global" else sum(groups)))
    more: dict[str, Any] = {}
    if allocation == "layer_importance":
        more["layer_scores"] = torch.rand(layers, generator=torch.Generator().manual_seed(seed)).tolist()
        more["temperature"] = [0.01, 0.5, 1.0, 100.0][seed % 4]
    try:
        plan = make_plan(
            drawn_statistics(source, seed),
            **{name: ratio},
            allocation=allocation,
            min_kv_heads=floors[0],
            min_ffn=floors[1],
            keep_layers=sorted(keep),
            round_to=round_to,
            **more,
        )
    except UsageError as error:
        named = f"layers {', '.join(map(str, sorted(keep)))} kept" if keep else ""
        if f"{name}={ratio} removes more than the layers hold" in str(error):
            assert named in str(error)
        else:
            assert round_to is not None and f"round_to={round_to}" in str(error)
        return
    whole = source.cost.parameters if name == "ratio" else source.cost.backbone_parameters
    removed = source.cost.parameters - plan.after.parameters
    assert abs(removed - ratio * whole) <= granule
    for index, (shape, kept) in enumerate(zip(plan.source.layers, plan.target.layers, strict=True)):
        assert kept.kv_heads >= min(floors[0], shape.kv_heads)
        assert kept.ffn >= min(floors[1], shape.ffn)
        assert kept.n_rep in (0, shape.n_rep)
        assert kept == shape if index in keep else kept.ffn % (round_to or 1) == 0


@settings(max_examples=100, deadline=None)
@given(shapes(), st.floats(0.1, 0.4), st.floats(0, 0.6), st.sampled_from([(1, 1), (0, 0)]), st.integers(0, 99))
def test_attention_gives_its_share_to_half_a_group(
    source: ModelShape, ratio: float, share: float, floors: tuple[int, int], seed: int
) -> None:
    source = replace(source, layers=tuple(replace(shape, ffn=shape.ffn + 60) for shape in source.layers))
    options: dict[str, Any] = {"backbone_ratio": ratio, "min_kv_heads": floors[0], "min_ffn": floors[1]}
    channel = 3 * source.hidden_size + (2 if source.mlp_bias else 0)
    group = max(n for (_, kind), n in unit_parameters(source).items() if kind == "attention") + 2 * source.hidden_size
    # otherwise the FFN cannot make up for the rounding to whole groups
    wanted = (1 - share) * ratio * source.cost.backbone_parameters
    assume(group <= wanted <= channel * sum(max(0, shape.ffn - floors[1]) for shape in source.layers) - group)
    try:
        plan = make_plan(drawn_statistics(source, seed), attention_share=share, **options)
    except UsageError as error:
        assert f"attention_share={share} with backbone_ratio={ratio}" in str(error) or "removes more" in str(error)
        return
    target = ratio * source.cost.backbone_parameters
    taken = sum(
        source.attention_parameters(old) - source.attention_parameters(new)
        for old, new in zip(source.layers, plan.target.layers, strict=True)
    )
    assert abs(target - (source.cost.parameters - plan.after.parameters)) <= channel
    assert abs(taken - share * target) <= group / 2


def test_the_shares_named_in_the_refusal_are_possible() -> None:
    statistics = collect_statistics(tiny_llama(), criterion="magnitude", moments=False)
    with pytest.raises(UsageError, match="enough for a share from 0.3\\d+ to 0.8\\d+: change --attention-share") as error:
        make_plan(statistics, backbone_ratio=0.4, attention_share=1)
    most = float(str(error.value).split(" to ")[1].split(":")[0])
    plan = make_plan(statistics, backbone_ratio=0.4, attention_share=most)
    assert [layer.kv_heads for layer in plan.target.layers] == [1, 1]
    with pytest.raises(UsageError, match="attention_share=0.0 with backbone_ratio=0.6"):
        make_plan(statistics, backbone_ratio=0.6, attention_share=0)


EQUAL = ModelShape(32, 100, False, False, False, "float32", (LayerShape(16, 4, 3000, 8),) * 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_layers_lose_by_the_softmax_of_their_standardised_importance(temperature: float) -> None:
    """Scores 3, 1, 2 stand at 1.2247, -1.2247 and 0; with attention kept, channels go by exp(-z / temperature)."""
    plan = make_plan(
        drawn_statistics(EQUAL, 0),
        backbone_ratio=0.2,
        allocation="layer_importance",
        layer_scores=[3.0, 1.0, 2.0],
        temperature=temperature,
        min_kv_heads=4,
    )
    weights = [math.exp(-z * math.sqrt(1.5) / temperature) for z in (1, -1, 0)]
    total = 0.2 * EQUAL.cost.backbone_parameters / (3 * 32)
    for weight, kept in zip(weights, plan.target.layers, strict=True):
        assert abs(3000 - kept.ffn - total * weight / sum(weights)) <= 1


def test_scores_that_tell_nothing_are_uniform() -> None:
    statistics = drawn_statistics(EQUAL, 0)
    uniform = make_plan(statistics, backbone_ratio=0.3, allocation="uniform").target

    def target(scores: list[float], temperature: float | None) -> ModelShape:
        chosen: dict[str, Any] = {"allocation": "layer_importance", "layer_scores": scores, "temperature": temperature}
        return make_plan(statistics, backbone_ratio=0.3, **chosen).target

    assert target([0.1, 0.1, 0.1], None) == uniform
    hot = target([0.3, 0.1, 0.2], 1e9)
    # which layer takes the odd channel is all that may differ
    assert sorted(hot.layers, key=str) == sorted(uniform.layers, key=str)
    # the floor of the least important layer hands the rest on to the next
    assert [layer.kv_heads for layer in target([0.3, 0.1, 0.2], 0.01).layers] == [4, 1, 4]


def test_kept_layers_are_whole_and_the_others_bear_the_budget() -> None:
    plan = make_plan(drawn_statistics(EQUAL, 0), backbone_ratio=0.2, allocation="uniform", keep_layers=[-1])
    assert plan.target.layers[2] == EQUAL.layers[2]
    assert plan.target.layers[0].kv_heads == 3
    assert plan.backbone_ratio == pytest.approx(0.2, abs=1e-4)
    assert str(plan).endswith("allocation uniform (layers kept: 2)")


def test_widths_in_multiples_are_printed_as_such() -> None:
    plan = make_plan(drawn_statistics(EQUAL, 0), backbone_ratio=0.2, round_to=32, keep_layers=[0])
    # 3000 is no multiple of 32, but a kept layer is not touched
    assert [layer.ffn % 32 for layer in plan.target.layers] == [3000 % 32, 0, 0]
    told = "allocation global (layers kept: 0; FFN widths in multiples of 32)"
    assert f"chosen by         criterion random, {told}" in str(plan)
    assert f"{plan.backbone_ratio:.4%} of the backbone" in str(plan)


def test_lots_are_the_cheapest_channels_of_the_curve() -> None:
    """11 channels in lots of 4: 3 go in any case, then 4 at a time in the curve's order."""
    source = ModelShape(8, 10, False, False, False, "float32", (LayerShape(2, 2, 11, 8),))
    order = torch.tensor([7, 2, 9, 0, 1, 3, 4, 5, 6, 8, 10])
    ffn = BlockStatistics(0, "mlp", Curve(order, torch.arange(1.0, 12.0, dtype=torch.float64)))
    attention = BlockStatistics(0, "attention", Curve(torch.arange(2), torch.tensor([1e6, 2e6], dtype=torch.float64)))
    statistics = Statistics(source, "wanda", {(0, "attention"): attention, (0, "mlp"): ffn})
    for removed, kept in ((3, 8), (5.5, 4), (8, 4)):
        plan = make_plan(statistics, ratio=removed * 24 / source.cost.parameters, round_to=4)
        assert plan.layers[0].ffn_channels == tuple(sorted(order[-kept:].tolist()))
    with pytest.raises(UsageError, match="ratio=0.01 removes less than round_to=4 takes .*at least 0.0\\d+.*raise --ratio"):
        make_plan(statistics, ratio=0.01, round_to=4)


@pytest.mark.parametrize("backbone_ratio", [0.05, 0.2, 0.35, 0.6, 0.8])
def test_uniform_layers_are_equal_give_or_take_one_channel(backbone_ratio: float) -> None:
    source = ModelShape(32, 100, False, False, False, "float32", (LayerShape(16, 4, 160, 8),) * 5)
    target = make_plan(drawn_statistics(source, 0), backbone_ratio=backbone_ratio, allocation="uniform").target
    assert len({layer.kv_heads for layer in target.layers}) == 1
    widths = [layer.ffn for layer in target.layers]
    assert max(widths) - min(widths) <= 1


def test_per_layer_rates_are_met_in_every_layer() -> None:
    source = ModelShape(32, 100, False, False, False, "float32", (LayerShape(16, 4, 160, 8),) * 3)
    plan = make_plan(drawn_statistics(source, 0), rates=[0.0, 0.25, 0.5])
    assert plan.allocation == "per_layer"
    group, channel = 32 * 10 * 8, 3 * 32
    layer = 4 * group + 160 * channel
    for rate, kept in zip([0.0, 0.25, 0.5], plan.target.layers, strict=True):
        assert abs((4 - kept.kv_heads) * group + (160 - kept.ffn) * channel - rate * layer) <= channel
    with pytest.raises(UsageError, match="2 rates for a model of 3 layers"):
        make_plan(drawn_statistics(source, 0), rates=[0.1, 0.1])
    with pytest.raises(UsageError, match="holds 1.5: every rate must be at least 0 and below 1"):
        make_plan(drawn_statistics(source, 0), rates=[0.1, 1.5, 0.1])


def test_global_spends_where_it_costs_least() -> None:
    """Layer 0's channels cost 1 each, layer 1's 10 each, groups 1000 each: only layer 0's channels go."""
    source = ModelShape(8, 10, False, False, False, "float32", (LayerShape(2, 2, 10, 8),) * 2)
    blocks = {}
    for key, price in {(0, "attention"): 1e3, (0, "mlp"): 1.0, (1, "attention"): 1e3, (1, "mlp"): 10.0}.items():
        units = 2 if key[1] == "attention" else 10
        order = torch.arange(units).flip(0)
        blocks[key] = BlockStatistics(*key, Curve(order, torch.arange(1, units + 1, dtype=torch.float64) * price))
    plan = make_plan(Statistics(source, "wanda", blocks), ratio=5 * 24 / source.cost.parameters)
    assert [layer.ffn_channels for layer in plan.layers] == [(0, 1, 2, 3, 4), tuple(range(10))]
    assert [layer.kv_groups for layer in plan.layers] == [(0, 1), (0, 1)]


def test_llama_3_8b_at_the_reports_ratio() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA_3_8B)
    plan = make_plan(model=model, ratio=0.1738856, criterion="random")
    assert plan.before.parameters == model.num_parameters() == 8_030_261_248
    assert plan.after.parameters == 6_633_914_368
    # 32 equal layers lose a multiple of 32 groups, which no number of channels completes to the same sum
    uniform = make_plan(model=model, ratio=0.1738856, criterion="random", allocation="uniform")
    assert abs(uniform.after.parameters - 6_633_914_368) <= 3 * 4096 / 2
    assert {layer.kv_heads for layer in uniform.target.layers} == {6}
    assert plan.before.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert len(str(plan).splitlines()) == 1 + 32 + 1 + 5


@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor", "curvature"])
def test_same_seed_same_bytes(criterion: str) -> None:
    model = tiny_llama(layers=3, ffn=30)
    calibration = Calibration.from_ids(token_ids(4, 16))

    def text(seed: int) -> str:
        statistics = collect_statistics(model, calibration, criterion=criterion, seed=seed)
        return make_plan(statistics, backbone_ratio=0.3).to_json()

    assert text(0) == text(0)
    assert (text(0) == text(1)) is (criterion != "random")


def test_a_path_is_enough_for_criteria_without_calibration(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    for criterion in ("magnitude", "magnitude_l1", "random"):
        from_path = make_plan(model=tmp_path, criterion=criterion, backbone_ratio=0.3)
        assert from_path == make_plan(model=model, criterion=criterion, backbone_ratio=0.3)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of ratio, backbone_ratio"),
        ({"ratio": 0.1, "backbone_ratio": 0.1}, "exactly one of"),
        ({"ratio": 0}, "ratio=0.0 must be a number between 0 and 1"),
        ({"ratio": 1}, "ratio=1.0 must be"),
        ({"ratio": -1}, "ratio=-1.0 must be"),
        ({"ratio": "abc"}, "ratio='abc' must be"),
        ({"ratio": float("nan")}, "ratio=nan must be"),
        ({"ratio": True}, "ratio=True must be"),
        ({"ratio": 0.2, "rates": [0.1, 0.1]}, "allocation='per_layer' requires rates|exactly one"),
        ({"rates": [0.1, 0.1], "allocation": "global"}, "allocation='per_layer' requires rates"),
        ({"allocation": "per_layer"}, "allocation='per_layer' requires rates"),
        ({"ratio": 0.2, "allocation": "unifrom"}, "unknown allocation 'unifrom' \\(did you mean 'uniform'\\?\\)"),
        ({"ratio": 0.2, "criterion": "magnitud"}, "unknown criterion 'magnitud' \\(did you mean 'magnitude'\\?\\)"),
        ({"ratio": 0.2, "criterion": "taylor"}, "criterion taylor needs statistics"),
        ({"ratio": 0.2, "min_ffn": -1}, "min_ffn=-1 must be a whole number from 0"),
        ({"ratio": 0.2, "temperature": 1.0}, "temperature is a setting of allocation layer_importance, not of global"),
        ({"ratio": 0.2, "attention_share": 0.5, "allocation": "uniform"}, "attention_share is a setting of allocation global"),
        ({"ratio": 0.2, "attention_share": -0.1}, "attention_share=-0.1 must be a number from 0 to 1"),
        ({"ratio": 0.2, "attention_share": float("nan")}, "attention_share=nan must be"),
        ({"ratio": 0.2, "round_to": 0}, "round_to=0 must be a whole number from 1"),
        ({"ratio": 0.2, "round_to": 2.5}, "round_to=2.5 must be"),
        ({"ratio": 0.2, "round_to": 64}, "layer 0: FFN width 12 leaves no multiple of round_to=64 with min_ffn=1: lower"),
        ({"ratio": 0.2, "round_to": 8, "min_ffn": 10}, "FFN width 12 leaves no multiple of round_to=8 with min_ffn=10"),
        ({"ratio": 0.2, "keep_layers": [2]}, "keep_layers names layer 2, the model has 2: give numbers from -2 to 1"),
        ({"ratio": 0.2, "keep_layers": [-3]}, "keep_layers names layer -3"),
        ({"ratio": 0.2, "keep_layers": [0.5]}, "keep_layers=\\(0.5,\\) must be a list of whole numbers"),
        ({"ratio": 0.2, "keep_layers": [0, -1]}, "layers 0, 1 kept \\(at most 0.0\\): lower .* or keep fewer layers"),
        ({"rates": [0.1, 0.1], "keep_layers": [0]}, "rate 0 keeps a layer"),
        ({"rates": [0.1, 0.1], "round_to": 2}, "keep_layers and round_to do not combine with rates"),
        ({"ratio": 0.2, "allocation": "layer_importance"}, "allocation='layer_importance' requires layer_scores"),
        ({"ratio": 0.2, "layer_scores": [1, 2]}, "allocation='layer_importance' requires layer_scores"),
        (LAYERED | {"layer_scores": [1]}, "1 layer scores for a model of 2 layers"),
        (LAYERED | {"layer_scores": [1, float("nan")]}, "layer 1: score nan must be a finite number"),
        (LAYERED | {"layer_scores": [1, 2], "temperature": 0}, "temperature=0.0 must be a number from 0.01"),
        (LAYERED | {"layer_scores": [1, 2], "temperature": float("inf")}, "temperature=inf must be"),
        ({"ratio": 0.99}, "ratio=0.99 removes more than the layers hold .*at most 0\\.\\d+"),
    ],
)
def test_bad_requests_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(model=tiny_llama(), **arguments)


def test_statistics_of_another_criterion_are_refused() -> None:
    statistics = collect_statistics(tiny_llama(), criterion="magnitude", moments=False)
    with pytest.raises(UsageError, match="collected for criterion magnitude, not random"):
        make_plan(statistics, ratio=0.1, criterion="random")
    with pytest.raises(UsageError, match="needs statistics or a model"):
        make_plan(ratio=0.1)


def test_the_largest_ratio_named_in_the_refusal_is_possible() -> None:
    model = tiny_llama()
    with pytest.raises(UsageError) as error:
        make_plan(model=model, ratio=0.99)
    most = float(str(error.value).split("at most ")[1].split(")")[0])
    plan = make_plan(model=model, ratio=most)
    assert [(layer.kv_heads, layer.ffn) for layer in plan.target.layers] == [(1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", "no"), ("mlp_bias", 1), ("criterion", 7), ("allocation", None),
        ("dtype", 7), ("tie_word_embeddings", "yes"), ("hidden_size", 0), ("vocab_size", 0), ("hidden_size", True),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(key: str, value: object) -> None:
    data = PruningPlan.keep_all(tiny_config()).to_dict()
    (data["source"] if key in data["source"] and key not in ("attention_bias", "mlp_bias") else data)[key] = value
    with pytest.raises(UsageError, match="malformed pruning plan"):
        PruningPlan.from_dict(data)
