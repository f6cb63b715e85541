"""A report says what was measured, on what, and refuses to compare what cannot be compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gqaprune.checkpoint.provenance import refuse_overlap
from hf_gqaprune.errors import UsageError
from hf_gqaprune.evaluation.perplexity import PerplexityResult
from hf_gqaprune.evaluation.report import Report, Stage, versions
from hf_gqaprune.plan import LayerPlan, PruningPlan

SOURCE = {"name": "books", "split": "train", "sha256": "c" * 64, "windows": 8, "weight": 1.0}


def perplexity(value: float, dataset: str = "books", **changes: Any) -> PerplexityResult:
    """1,000 tokens at seq_len 128."""
    result = PerplexityResult(
        value=value,
        nats=1000 * math.log(value),
        tokens=1000,
        dataset=dataset,
        split="test",
        seq_len=128,
        stride=127,
        bos=True,
        text_sha256=(dataset[0] * 64),
    )
    return replace(result, **changes)


def stage(name: str, parameters: int, trainable: int | None, *results: PerplexityResult, **kwargs: Any) -> Stage:
    return Stage(name, parameters, trainable, {result.dataset: result for result in results}, **kwargs)


@pytest.fixture
def report() -> Report:
    """Two layers, of which the second loses two of four KV groups and a quarter of its FFN."""
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
    )
    plan = PruningPlan.keep_all(config)
    plan = replace(plan, layers=(plan.layers[0], LayerPlan.of_groups(plan.source.layers[1], (0, 3), range(36))))
    stages = (
        stage("dense", 2000, None, perplexity(10.0), perplexity(20.0, "wiki"), tasks={"count": {"acc": 0.5}}),
        stage("pruned", 1500, None, perplexity(1234.5), perplexity(30.0, "wiki"), tasks={"count": {"acc": 0.25}}),
        stage("recovered", 1500, 64, perplexity(12.5), perplexity(21.0, "wiki")),
    )
    return Report("org/model", stages, plan.summary(), {"torch": "2.13.0"}, 7, (SOURCE,))


def test_the_file_has_the_documented_form_and_loads_equal(tmp_path: Path, report: Report) -> None:
    report.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert list(data) == ["version", "model", "stages", "plan", "versions", "seed", "calibration"]
    assert (data["version"], data["model"], data["seed"], data["plan"]) == (1, "org/model", 7, report.plan)
    assert data["stages"][2] == {
        "name": "recovered",
        "parameters": 1500,
        "trainable": 64,
        "perplexity": {
            name: {
                "value": value,
                "nats": 1000 * math.log(value),
                "tokens": 1000,
                "split": "test",
                "seq_len": 128,
                "stride": 127,
                "bos": True,
                "text_sha256": name[0] * 64,
            }
            for name, value in (("books", 12.5), ("wiki", 21.0))
        },
    }
    assert data["stages"][0]["tasks"] == {"count": {"acc": 0.5}}
    assert data["stages"][0]["trainable"] is None
    assert Report.load(tmp_path / "report.json") == report


def test_nothing_is_overwritten(tmp_path: Path, report: Report) -> None:
    for write, name in ((report.save, "report.json"), (report.plot, "report.png")):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match="exists already"):
            write(tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
        with pytest.raises(UsageError, match="is not replaced"):
            write(tmp_path / name, overwrite=True)
        (tmp_path / name).unlink()
        write(tmp_path / name)
        written = (tmp_path / name).read_bytes()
        write(tmp_path / name, overwrite=True)
        assert (tmp_path / name).read_bytes()[:8] == written[:8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]


def test_the_table(report: Report) -> None:
    removed = (
        f"{report.plan['ratio']:.2%} of all parameters removed, {report.plan['backbone_ratio']:.2%} of the backbone"
    )
    assert report.table().splitlines() == [
        "                   dense               pruned        recovered",
        "parameters         2,000      1,500 (0.7500x)  1,500 (0.7500x)",
        "trainable              -                    -               64",
        "books perplexity   10.00  1,234.50 (123.450x)   12.50 (1.250x)",
        "wiki perplexity    20.00       30.00 (1.500x)   21.00 (1.050x)",
        "count acc         0.5000               0.2500                -",
        "",
        f"books (test): 1,000 tokens, seq_len 128, stride 127, BOS, sha256 {'b' * 12}",
        f"wiki (test): 1,000 tokens, seq_len 128, stride 127, BOS, sha256 {'w' * 12}",
        "calibrated on books (train)",
        f"{removed}; criterion {report.plan['criterion']}, allocation {report.plan['allocation']}",
    ]


def test_the_plot_is_one_png(tmp_path: Path, report: Report) -> None:
    report.plot(tmp_path / "report.png")
    only_tasks = tuple(replace(stage, perplexity={}) for stage in report.stages)
    replace(report, stages=only_tasks).plot(tmp_path / "tasks.png")
    data = (tmp_path / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1650, 750)


@pytest.mark.parametrize(
    "change",
    [{"tokens": 999}, {"seq_len": 64}, {"stride": 64}, {"bos": False}, {"split": "train"}, {"text_sha256": "0"}],
)
def test_stages_measured_on_different_tokens_are_refused(report: Report, change: dict[str, Any]) -> None:
    other = stage("pruned", 1500, None, perplexity(15.0, **change), perplexity(30.0, "wiki"))
    key = next(iter(change))
    with pytest.raises(UsageError, match=rf"books has {key}=.* for dense but {key}={change[key]} for pruned"):
        replace(report, stages=(report.stages[0], other))


def test_a_stage_that_lacks_a_text_is_refused(report: Report) -> None:
    other = stage("pruned", 1500, None, perplexity(15.0))
    with pytest.raises(UsageError, match="dense was measured on books, wiki but pruned on books"):
        replace(report, stages=(report.stages[0], other))


@pytest.mark.parametrize(
    "source",
    [
        {"name": "other", "split": "train", "sha256": "b" * 64},
        {"name": "books", "split": "test", "sha256": "d" * 64},
    ],
)
def test_calibrating_on_the_evaluation_text_is_refused(report: Report, source: dict[str, Any]) -> None:
    with pytest.raises(
        UsageError, match=rf"books \(test\) is evaluated on, but {source['name']} \({source['split']}\) is"
    ):
        replace(report, calibration=({**SOURCE, **source},))


def test_another_split_or_another_text_is_no_overlap() -> None:
    measured = [{"name": "books", "split": "test", "sha256": "b"}]
    refuse_overlap(
        [{"name": "books", "split": "train", "sha256": "a"}, {"name": "x", "split": "test", "sha256": "c"}], measured
    )


def test_stages_are_known_once_and_in_order(report: Report) -> None:
    dense, pruned, _ = report.stages
    for stages in ((pruned, dense), (dense, dense), ()):
        with pytest.raises(UsageError, match="at most once, in order"):
            replace(report, stages=stages)
    with pytest.raises(UsageError, match=r"unknown stage 'prunned' \(did you mean 'pruned'\?\)"):
        replace(report, stages=(dense, replace(pruned, name="prunned")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "a report must be a JSON object"),
        ('{"version": 2}', "report version 2 cannot be read, only 1"),
        ('{"version": 1, "modle": ""}', r"unknown key of a report 'modle' \(did you mean 'model'\?\)"),
        ('{"version": 1, "model": "m"}', "the report lacks 'stages'"),
        ('{"version": 1, "model": "m", "stages": 3}', "malformed report"),
    ],
)
def test_files_that_are_no_reports(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UsageError, match=rf"report\.json.*{message}"):
        Report.load(tmp_path / "report.json")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read report .*none\.json: No such file"):
        Report.load(tmp_path / "none.json")


def test_tied_weights_count_once(llama: LlamaForCausalLM) -> None:
    untied = llama.num_parameters()
    assert untied == sum(tensor.numel() for tensor in llama.state_dict().values())
    llama.lm_head.weight = llama.model.embed_tokens.weight
    assert llama.num_parameters() == untied - 259 * 32


def test_versions_name_what_results_depend_on() -> None:
    assert {"python", "hf_gqaprune", "torch", "transformers", "torch-pruning"} <= versions().keys()
