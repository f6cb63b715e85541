"""Recovery ends with a merged checkpoint that equals its adapter, or with one clear line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from support.recovering import SETTINGS, assert_equal_weights, prune_to, weights, write_animals
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gqaprune import PrunedLlamaForCausalLM, UsageError, WorkError, merge, recover
from hf_gqaprune.checkpoint import identity
from hf_gqaprune.configuration import RecoveryConfig
from hf_gqaprune.trainer.data import load_data
from hf_gqaprune.trainer.models import lora_targets


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_animals(tmp_path_factory.mktemp("text"))


@pytest.fixture
def pruned(tmp_path: Path, dense: Path) -> Path:
    """A pruned checkpoint whose layers differ, with all that lies beside its weights."""
    return prune_to(dense, tmp_path / "pruned", 0.3)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 51).view(2, 24)
    with torch.no_grad():
        return model.eval()(ids).logits


def adapted(base: Path, adapter: Path, dtype: Any = "auto") -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)


def test_the_merged_checkpoint_is_the_adapter_on_its_base(pruned: Path, text: str, tmp_path: Path) -> None:
    out = recover(pruned, [text], tmp_path / "out", **SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(pruned)
    assert isinstance(model, PrunedLlamaForCausalLM)
    assert model.prune_plan == base.prune_plan is not None
    expected = logits(adapted(pruned, out / "adapter"))
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits(base) - expected).abs().max() > 1e-3
    for name in ("tokenizer.json", "recipe.yaml", "LICENSE"):
        assert (out / name).read_bytes() == (pruned / name).read_bytes()
    assert (out / "generation_config.json").exists()
    assert json.loads((out / identity.IDENTITY_FILE).read_text()) == {
        "version": 1,
        "fingerprint": identity.fingerprint(out),
        "plan_hash": identity.read_identity(pruned)["plan_hash"],
    }
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out.training").exists()


def test_the_log_says_what_was_trained(pruned: Path, text: str, tmp_path: Path) -> None:
    out = recover(pruned, [f"{text}=2.5"], tmp_path / "out", held_out_tokens=64, evaluations=3, **SETTINGS)
    log = json.loads((out / "training_log.json").read_text())
    assert (log["steps"], log["tokens"], log["rows_per_step"], log["processes"]) == (3, 768, 8, 1)
    assert [entry["tokens"] for entry in log["train"]] == [256, 512, 768]
    assert log["train"][0]["loss"] > log["train"][-1]["loss"]
    assert [entry["step"] for entry in log["held_out"]] == [0, 1, 2, 3]
    for entry in log["held_out"]:
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
    (source,) = log["data"]
    assert (source["name"], source["split"], source["weight"]) == ("animals", "file", 2.5)
    assert (source["rows"], source["tokens"]) == (24, 768)
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert log["trainable"] == sum(tensor.numel() for tensor in adapter.values())
    assert str(tmp_path) not in (out / "training_log.json").read_text()


def test_held_out_perplexity_is_that_of_the_rows(dense: Path, text: str, tmp_path: Path) -> None:
    """The last measurement equals one of the merged checkpoint on the rows that did not train."""
    settings = {**SETTINGS, "max_tokens": 1600, "held_out_tokens": 64}
    out = recover(dense, [text], tmp_path / "out", **settings)
    config = RecoveryConfig.from_preset(data=[text], **settings)
    data = load_data(AutoTokenizer.from_pretrained(dense), config, vocabulary=259, seed=0)
    ids = torch.tensor(data.held_out["input_ids"])
    assert ids.shape == (2, 32)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss
    log = json.loads((out / "training_log.json").read_text())
    assert log["held_out"][-1]["loss"] == pytest.approx(float(expected), abs=1e-5)


def test_lora_adapts_every_linear_of_the_layers_and_nothing_else(pruned: Path, text: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    projections = ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert lora_targets(model) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *projections]
    out = recover(pruned, [text], tmp_path / "out", **SETTINGS)
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    linears = {n for n, m in model.get_decoder().layers.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name.removeprefix("base_model.model.model.layers.").rsplit(".", 2)[0] for name in adapter} == linears


def test_blocks_that_are_skipped_need_no_adapter(tmp_path: Path, tokenizer: Any, text: str) -> None:
    from hf_gqaprune import PrunedLlamaConfig

    sizes = {"1": {"skip": ["attention"], "intermediate_size": 5}, "2": {"skip": ["mlp"]}}
    config = PrunedLlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=128, per_layer_config=sizes,
    )  # fmt: skip
    PrunedLlamaForCausalLM(config).save_pretrained(tmp_path / "skips")
    tokenizer.save_pretrained(tmp_path / "skips")
    out = recover(tmp_path / "skips", [text], tmp_path / "out", **SETTINGS)
    expected = logits(adapted(tmp_path / "skips", out / "adapter"))
    assert (logits(AutoModelForCausalLM.from_pretrained(out)) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{"rslora": True}, {"dora": True}, {"dropout": 0.5}])
def test_variants_of_lora_merge_too(dense: Path, text: str, tmp_path: Path, options: dict[str, Any]) -> None:
    out = recover(dense, [text], tmp_path / "out", **SETTINGS, **options)
    expected = logits(adapted(dense, out / "adapter"))
    assert (logits(AutoModelForCausalLM.from_pretrained(out)) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_half_precision_weights_are_merged_in_float32(dense: Path, text: str, tmp_path: Path, options: dict[str, Any]) -> None:
    base = prune_to(dense, tmp_path / "base", 0.2, torch.bfloat16)
    out = recover(base, [text], tmp_path / "out", **SETTINGS, **options)
    wide = adapted(base, out / "adapter", torch.float32)
    expected = wide.merge_and_unload().bfloat16().state_dict()
    changed = [name for name, tensor in weights(base).items() if not torch.equal(tensor, expected[name])]
    assert all("_proj" in name for name in changed) and changed
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out).items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_dtype_of_the_checkpoint_is_kept(dense: Path, text: str, tmp_path: Path, method: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        base = prune_to(dense, tmp_path / f"base{dtype}", 0.2, dtype)
        out = recover(base, [text], tmp_path / f"out{dtype}", method=method, **SETTINGS)
        assert {tensor.dtype for tensor in weights(out).values()} == {dtype}
        assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_full_fine_tuning_trains_all_weights(pruned: Path, text: str, tmp_path: Path) -> None:
    out = recover(pruned, [text], tmp_path / "out", method="full", **{**SETTINGS, "learning_rate": 1e-3})
    before, after = weights(pruned), weights(out)
    assert all(not torch.equal(before[name], after[name]) for name in after)
    assert not (out / "adapter").exists()
    assert AutoModelForCausalLM.from_pretrained(out).prune_plan is not None
    log = json.loads((out / "training_log.json").read_text())
    assert log["trainable"] == sum(tensor.numel() for tensor in after.values())


# --- merge


def test_merge_gives_the_checkpoint_that_recover_gave(pruned: Path, text: str, tmp_path: Path) -> None:
    out = recover(pruned, [text], tmp_path / "out", **SETTINGS)
    again = merge(out / "adapter", tmp_path / "again")
    assert_equal_weights(out, again)
    assert identity.read_identity(again) == identity.read_identity(out)
    with pytest.raises(UsageError, match="exists already"):
        merge(out / "adapter", tmp_path / "again")


def test_an_adapter_of_other_weights_is_refused(pruned: Path, dense: Path, text: str, tmp_path: Path) -> None:
    out = recover(pruned, [text], tmp_path / "out", **SETTINGS)
    # the same plan and the same shapes, but other weights
    other = Path(shutil.copytree(pruned, tmp_path / "other"))
    model = AutoModelForCausalLM.from_pretrained(pruned)
    model.model.norm.weight.data[0] += 1e-3
    model.save_pretrained(other)
    with pytest.raises(UsageError, match="was trained on weights [0-9a-f]{32}"):
        merge(out / "adapter", tmp_path / "merged", base=other)
    shutil.rmtree(pruned)
    with pytest.raises(UsageError, match="is no longer in"):
        merge(out / "adapter", tmp_path / "merged")
    with pytest.raises(UsageError, match="no adapter in"):
        merge(dense, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_names_no_local_path(pruned: Path, text: str, tmp_path: Path) -> None:
    out = recover(pruned, [text], tmp_path / "out", **SETTINGS)
    holding = [p.name for p in (out / "adapter").iterdir() if str(tmp_path).encode() in p.read_bytes()]
    assert holding == ["local_base.json"]


# --- losses


@pytest.mark.parametrize(("method", "rate"), [("lora", 10.0), ("lora", 1e30), ("full", 1e30)])
def test_what_is_not_finite_stops_with_its_step(
    dense: Path, text: str, tmp_path: Path, method: str, rate: float
) -> None:
    settings = {**SETTINGS, "max_tokens": 768 * 4, "learning_rate": rate}
    told = r"the (loss is (nan|inf)|gradient is not finite) at step \d+, in a batch of 8 rows .* begins '.*lower learning_rate"
    with pytest.raises(WorkError, match=told):
        recover(dense, [text], tmp_path / "out", method=method, **settings)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_stop_the_first_step(dense: Path, text: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.model.norm.weight.data[3] = math.nan
    model.save_pretrained(dense)
    with pytest.raises(WorkError, match="the loss is nan at step 1, in a batch of 8 rows whose first one begins '"):
        recover(dense, [text], tmp_path / "out", held_out_tokens=0, **SETTINGS)


def test_early_stopping_keeps_the_best_weights(dense: Path, text: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_tokens": 768 * 4, "learning_rate": 1.0, "schedule": "constant"}
    out = recover(dense, [text], tmp_path / "out", patience=1, evaluations=12, held_out_tokens=64, **settings)
    log = json.loads((out / "training_log.json").read_text())
    assert log["steps"] < 12
    assert log["kept"] == min(log["held_out"], key=lambda entry: entry["loss"])


@pytest.mark.parametrize(("method", "rate"), [("lora", 3.0), ("full", 1.0)])
def test_a_training_that_makes_it_worse_keeps_the_weights_as_they_were(
    pruned: Path, text: str, tmp_path: Path, method: str, rate: float, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**SETTINGS, "learning_rate": rate, "schedule": "constant", "warmup": 0.0, "held_out_tokens": 64}
    out = recover(pruned, [text], tmp_path / "out", method=method, **settings)
    log = json.loads((out / "training_log.json").read_text())
    assert log["kept"]["step"] == 0 and log["held_out"][-1]["loss"] > log["held_out"][0]["loss"]
    assert_equal_weights(out, pruned)
    assert "no evaluation improved on the held-out loss before the training" in caplog.text
    if method == "lora":
        assert_equal_weights(merge(out / "adapter", tmp_path / "again"), pruned)


def test_the_best_evaluation_is_kept(dense: Path, text: str, tmp_path: Path) -> None:
    """The weights of the output have the lowest held-out loss, whichever evaluation it was."""
    settings = {**SETTINGS, "max_tokens": 768 * 4, "learning_rate": 0.03, "schedule": "constant", "evaluations": 12}
    out = recover(dense, [text], tmp_path / "out", held_out_tokens=64, **settings)
    log = json.loads((out / "training_log.json").read_text())
    assert log["kept"] == min(log["held_out"], key=lambda entry: entry["loss"]) and log["kept"]["step"] > 0
    config = RecoveryConfig.from_preset(data=[text], held_out_tokens=64, **settings)
    rows = load_data(AutoTokenizer.from_pretrained(dense), config, vocabulary=259, seed=0).held_out["input_ids"]
    ids = torch.tensor(rows[:])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(out)(ids, labels=ids).loss
    assert log["kept"]["loss"] == pytest.approx(float(loss), abs=1e-5)


def test_threads_are_those_asked_for_and_given_back(dense: Path, text: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    out = recover(dense, [text], tmp_path / "out", threads=before + 1, **SETTINGS)
    assert json.loads((out / "training_log.json").read_text())["threads"] == before + 1
    assert torch.get_num_threads() == before


# --- requests that make no sense


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "defualt"}, r"unknown preset 'defualt' \(did you mean 'default'\?\)"),
        ({"schedule": "cosin"}, r"unknown schedule 'cosin' \(did you mean 'cosine'\?\)"),
        ({"packing": "no"}, "packing='no' must be true or false"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a number"),
        ({"report_to": "tensorbord"}, r"unknown tracker in report_to: 'tensorbord' \(did you mean 'tensorboard'\?\)"),
        ({"report_to": ["mlflow"]}, "report_to=mlflow needs mlflow: pip install mlflow"),
        ({"split": "train+test"}, "split='train\\+test' is for evaluation and never trains"),
        ({"rnak": 4}, r"unknown recovery setting 'rnak' \(did you mean 'rank'\?\)"),
        ({"rank": 0}, "rank=0 must be a whole number from 1"),
        ({"learning_rate": -1}, "learning_rate=-1.0 must be positive and finite"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be positive and finite"),
        ({"dropout": 1.5}, "dropout=1.5 must be a number from 0 to 1"),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number from 1"),
        ({"seq_len": 129}, "seq_len=129 is longer than the 128 positions"),
        ({"seq_len": 1}, "seq_len=1 must be a whole number from 2"),
        ({"split": "test"}, "split='test' is for evaluation and never trains"),
        ({"streaming": True, "max_tokens": None, "preset": "alpaca"}, "streaming needs an end: set max_tokens"),
        ({"quantize": "4bit"}, "quantize=4bit needs bitsandbytes: pip install bitsandbytes"),
        ({"quantize": "4bit", "method": "full"}, "use method=lora"),
        ({"method": "qlora"}, "unknown method 'qlora' .*allowed: lora, full"),
        ({"patience": 1, "held_out_tokens": 0}, "patience needs text to measure on"),
        ({"distillation": 0.5}, "need the dense model: pass --teacher"),
        ({"data": []}, "no training text was given"),
        ({"data": ["nosuchtext"]}, "unknown text 'nosuchtext'"),
        ({"data": ["no/such/file.txt"]}, "no such file: no/such/file.txt"),
        ({"model": "/no/such/folder"}, "no such model folder: /no/such/folder"),
    ],
)
def test_bad_requests_are_refused_in_one_line(
    dense: Path, text: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arguments = {"model": dense, "data": [text], "output": tmp_path / "out", **changes}
    with pytest.raises(UsageError, match=message) as caught:
        recover(arguments.pop("model"), arguments.pop("data"), arguments.pop("output"), **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_every_schedule_is_one_of_transformers() -> None:
    from torch.optim import AdamW
    from transformers import get_scheduler

    from hf_gqaprune.configuration.recovery import Schedule

    optimizer = AdamW([torch.nn.Parameter(torch.ones(1))])
    for name in get_args(Schedule):
        get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)


def test_an_output_that_exists_is_refused_before_any_work(dense: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(UsageError, match="exists already"):
        recover(dense, [text], tmp_path / "out", **SETTINGS)
    with pytest.raises(UsageError, match="out is no checkpoint, adapter, "):
        recover(dense, [text], tmp_path / "out", overwrite=True, **SETTINGS)
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    recover(dense, [text], tmp_path / "out", overwrite=True, **SETTINGS)
    assert not (tmp_path / "out" / "file").exists()


def test_a_folder_of_the_name_of_the_training_stays(dense: Path, text: str, tmp_path: Path) -> None:
    notes = tmp_path / "out.training" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="out.training, where the training would be kept, holds other files"):
            recover(dense, [text], tmp_path / "out", overwrite=overwrite, **SETTINGS)
    assert notes.read_text() == "mine"


def test_text_that_will_be_evaluated_on_never_trains(dense: Path, text: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    shutil.copyfile(text, copy)
    with pytest.raises(UsageError, match="animals .file. will be evaluated on and cannot be trained on"):
        recover(dense, [text], tmp_path / "out", evaluation=[str(copy)], **SETTINGS)


def test_text_of_less_than_one_window_is_refused(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UsageError, match="short has 9 tokens, fewer than one window of 31"):
        recover(dense, [str(tmp_path / "short.txt")], tmp_path / "out", **SETTINGS)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(dense: Path, text: str, tmp_path: Path) -> None:
    from support.tiny import tiny_llama

    tiny_llama().save_pretrained(dense)
    with pytest.raises(UsageError, match=r"token \d+ of animals is beyond the model's 48 embeddings"):
        recover(dense, [text], tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out.training").exists()


def test_a_padding_token_beyond_the_embeddings_is_not_used(dense: Path, tmp_path: Path) -> None:
    """As where a padding token was added to the tokenizer alone; examples of unequal length are padded."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id == 259
    tokenizer.save_pretrained(dense)
    rows = [{"prompt": "ab", "completion": "cd" * (i % 5 + 1)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = recover(dense, [str(tmp_path / "pairs.jsonl")], tmp_path / "out", packing=False, **SETTINGS)
    assert AutoTokenizer.from_pretrained(out).pad_token_id == 259


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_quantized_weights_are_refused(dense: Path, text: str, tmp_path: Path, role: str) -> None:
    """As where the weights were dequantized and the config was not."""
    other = Path(shutil.copytree(dense, tmp_path / "quantized"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    student, teacher = (other, None) if role == "student" else (dense, other)
    with pytest.raises(UsageError, match="quantized is quantized, and pruning, evaluation and recovery need the plain weights"):
        recover(student, [text], tmp_path / "out", teacher=teacher, **SETTINGS)


def test_a_teacher_of_another_vocabulary_is_refused(dense: Path, text: str, tmp_path: Path) -> None:
    from support.tiny import tiny_llama

    tiny_llama().save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="has a vocabulary of 48, .* one of 259"):
        recover(dense, [text], tmp_path / "out", teacher=tmp_path / "other", distillation=0.5, **SETTINGS)
    with pytest.raises(UsageError, match="preset alpaca does not distil"):
        recover(dense, [text], tmp_path / "out", teacher=dense, preset="alpaca")
