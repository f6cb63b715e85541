"""Perplexities: each token once, the same number however it is computed, and nothing that makes no sense."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gqaprune import PrunedLlamaConfig, PrunedLlamaForCausalLM
from hf_gqaprune.data.text import Text
from hf_gqaprune.errors import UsageError, WorkError
from hf_gqaprune.evaluation import perplexity as evaluation
from hf_gqaprune.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from hf_gqaprune.evaluation.tasks import evaluate_tasks

TEXT = Text(
    "letters", "test", "Anna put the old key under the bed. Where was it? Ben did not know, and so he went home."
)


@pytest.fixture
def without_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer as a model without a BOS token has it."""
    backend = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def nats_one_by_one(
    model: LlamaForCausalLM, ids: list[int], bos: int | None, seq_len: int, stride: int
) -> list[float]:
    """The definition, one forward pass per token: its context starts where its window starts."""
    span = seq_len if bos is None else seq_len - 1
    nats = []
    for position in range(0 if bos is not None else 1, len(ids)):
        # the first window that holds the token and, without BOS, does not begin with it
        start = 0
        while start + span <= position:
            start += stride
        context = ([] if bos is None else [bos]) + ids[start:position]
        with torch.no_grad():
            logits = model(torch.tensor([context])).logits[0, -1]
        nats.append(-float(logits.log_softmax(-1)[ids[position]]))
    return nats


@pytest.mark.parametrize(("seq_len", "stride"), [(16, None), (16, 15), (16, 7), (16, 1), (2, None), (128, None)])
@pytest.mark.parametrize("has_bos", [True, False])
def test_the_definition(
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    without_bos: PreTrainedTokenizerFast,
    seq_len: int,
    stride: int | None,
    has_bos: bool,
) -> None:
    chosen = tokenizer if has_bos else without_bos
    result = evaluate_perplexity(llama, chosen, TEXT, seq_len=seq_len, stride=stride)
    ids = chosen(TEXT.content, add_special_tokens=False)["input_ids"]
    nats = nats_one_by_one(llama, ids, chosen.bos_token_id, seq_len, stride or seq_len - 1)
    assert result.tokens == len(nats) == len(ids) - (not has_bos)
    assert result.nats == pytest.approx(sum(nats), rel=1e-6)
    assert result.value == math.exp(result.nats / result.tokens)
    assert (result.dataset, result.split, result.text_sha256) == ("letters", "test", TEXT.sha256)
    assert (result.seq_len, result.stride, result.bos) == (seq_len, stride or seq_len - 1, has_bos)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.nn.init.zeros_(llama.lm_head.weight)
    result = evaluate_perplexity(llama, tokenizer, TEXT, seq_len=32)
    assert result.value == pytest.approx(259, rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 200),
    seq_len=st.integers(2, 40),
    stride=st.integers(1, 39),
    bos=st.booleans(),
    drop_tail=st.booleans(),
)
def test_every_token_is_scored_once_in_the_first_window_that_holds_it(
    count: int, seq_len: int, stride: int, bos: bool, drop_tail: bool
) -> None:
    stride = min(stride, seq_len - 1)
    span = seq_len if not bos else seq_len - 1
    windows = evaluation._windows(count, seq_len, stride, bos, drop_tail)
    scored = [token for _, end, first in windows for token in range(first, end)]
    assert scored == list(range(0 if bos else 1, len(scored) + (not bos)))
    assert [start for start, _, _ in windows] == [i * stride for i in range(len(windows))]
    if drop_tail:
        assert all(end - start == span for start, end, _ in windows)
        assert count - (scored[-1] + 1 if scored else 0) <= span
    else:
        assert len(scored) == max(0, count - (not bos))
    batched = [window for batch in evaluation._batches(windows, 3) for window in batch]
    assert batched == windows


def test_the_tail_is_scored_unless_dropped(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    count = len(TEXT.content)  # one token a byte
    whole = evaluate_perplexity(llama, tokenizer, TEXT, seq_len=21)
    full = evaluate_perplexity(llama, tokenizer, TEXT, seq_len=21, drop_tail=True)
    assert (whole.tokens, full.tokens) == (count, count // 20 * 20)
    assert count % 20
    cut = Text(TEXT.name, TEXT.split, TEXT.content[: full.tokens])
    assert evaluate_perplexity(llama, tokenizer, cut, seq_len=21).nats == full.nats


def test_batches_change_nothing_but_rounding(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    one, three = (evaluate_perplexity(llama, tokenizer, TEXT, seq_len=8, batch_size=size).nats for size in (1, 3))
    assert one == pytest.approx(three, rel=1e-6)


def test_a_file_a_text_and_the_metric_agree(
    tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    import evaluate

    from hf_gqaprune.evaluation import metric as perplexity

    (tmp_path / "letters.txt").write_text("one two three\n\nfour five")
    of_file = evaluate_perplexity(llama, tokenizer, str(tmp_path / "letters.txt"), seq_len=8, max_chars=20)
    metric = perplexity.Perplexity()
    assert isinstance(metric, evaluate.Metric)
    found = metric.compute(
        predictions=["one two three", "four five"], model=llama, tokenizer=tokenizer, seq_len=8, max_chars=20
    )
    assert found == {**of_file.to_dict(), "dataset": "predictions", "split": "given"}
    # the loader copies the file and takes the class from the copy
    assert perplexity.__file__ is not None
    loaded = evaluate.load(perplexity.__file__)
    assert loaded.compute(predictions=["one two three\n\nfour "], model=llama, tokenizer=tokenizer, seq_len=8) == {
        **found
    }
    assert (
        PerplexityResult(**found).conditions().startswith("predictions (given): 20 tokens, seq_len 8, stride 7, BOS")
    )


def test_half_precision_is_summed_in_full(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    exact = evaluate_perplexity(llama, tokenizer, TEXT, seq_len=32).value
    assert evaluate_perplexity(llama.bfloat16(), tokenizer, TEXT, seq_len=32).value == pytest.approx(exact, rel=0.02)


def test_the_mode_of_the_model_is_kept(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    llama.train()
    evaluate_perplexity(llama, tokenizer, TEXT)
    assert llama.training


def test_the_default_window_is_the_models(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert evaluate_perplexity(llama, tokenizer, TEXT).seq_len == 128
    llama.config.max_position_embeddings = 8192
    assert evaluate_perplexity(llama, tokenizer, TEXT).seq_len == 2048


def test_a_window_that_is_not_finite_is_named(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        llama.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("?")] = math.nan
    place = TEXT.content.index("?")
    window = place // 7
    message = rf"window {window} of letters \(tokens {7 * window} to {7 * window + 6}\) has logits that are not finite"
    with pytest.raises(WorkError, match=message):
        evaluate_perplexity(llama, tokenizer, TEXT, seq_len=8)


def test_an_infinite_logit_of_any_token_is_not_finite(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    # -inf at a token that the text does not hold leaves every likelihood finite
    bias = torch.zeros(259)
    bias[tokenizer.convert_tokens_to_ids("~")] = -math.inf
    llama.lm_head.bias = torch.nn.Parameter(bias)
    with pytest.raises(WorkError, match="window 0 of letters"):
        evaluate_perplexity(llama, tokenizer, TEXT, seq_len=8)


def test_logits_in_several_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    """A vocabulary so large that the head is applied to 16 rows at a time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2**21, initializer_range=0.5, **sizes)).eval()
    text = Text("long", "test", TEXT.content[:40])
    result = evaluate_perplexity(model, tokenizer, text, seq_len=41)
    ids = torch.tensor([[0, *tokenizer(text.content, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert result.nats == pytest.approx(float(loss) * 40, rel=1e-5)


def test_a_pruned_model(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Layers of unequal size, one without attention and one without FFN: equal to the loss of its own forward pass."""
    config = PrunedLlamaConfig(
        **{key: value for key, value in llama.config.to_dict().items() if key != "model_type"},
        per_layer_config={
            "0": {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 20},
            "1": {"skip": ["attention"]},
            "2": {"skip": ["mlp"]},
        },
    )
    torch.manual_seed(0)
    model = PrunedLlamaForCausalLM(config).eval()
    result = evaluate_perplexity(model, tokenizer, TEXT)
    ids = torch.tensor([tokenizer(TEXT.content)["input_ids"]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert result.nats == pytest.approx(float(loss) * result.tokens, rel=1e-6)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    with pytest.raises(UsageError, match="is beyond the model's 50 embeddings: give the model's own tokenizer"):
        evaluate_perplexity(model, tokenizer, TEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 129}, "seq_len=129 must be from 2 to 128, the model's max_position_embeddings"),
        ({"seq_len": 1}, "seq_len=1 must be from 2"),
        ({"seq_len": 16, "stride": 16}, "stride=16 must be from 1 to 15 text tokens for seq_len=16"),
        ({"seq_len": 16, "stride": 0}, "stride=0 must be from 1 to 15"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_chars": 0}, "max_chars=0 must be at least 1"),
        ({"seq_len": 128, "drop_tail": True}, "the text letters has 88 tokens, scoring needs at least 127"),
    ],
)
def test_requests_that_make_no_sense(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate_perplexity(llama, tokenizer, TEXT, **options)


def test_texts_too_short_to_score(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, without_bos: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UsageError, match="the text short has 0 tokens, scoring needs at least 1"):
        evaluate_perplexity(llama, tokenizer, Text("short", "test", ""))
    with pytest.raises(UsageError, match="the text short has 1 tokens, scoring needs at least 2"):
        evaluate_perplexity(llama, without_bos, Text("short", "test", "a"))
    assert evaluate_perplexity(llama, tokenizer, Text("short", "test", "a")).tokens == 1


def write_task(folder: Path) -> Path:
    """A task of two questions with two choices each, and its data."""
    rows = [{"question": "one two", "choices": ["three", "blue"], "answer": 0}] * 2
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "counting.yaml").write_text(
        f"""
task: counting
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
- metric: acc
"""
    )
    return folder


def test_a_local_task(tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = str(write_task(tmp_path))
    llama.train()
    found = evaluate_tasks(llama, tokenizer, ["counting"], include_path=folder, limit=2)
    nats = []
    for choice in ("three", "blue"):
        question = tokenizer("one two")["input_ids"]
        answer = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            scores = llama(torch.tensor([question + answer])).logits[0].log_softmax(-1)
        nats.append(-sum(float(scores[len(question) + i - 1, token]) for i, token in enumerate(answer)))
    assert found["counting"]["acc"] == float(nats[0] < nats[1])
    assert found["counting"].keys() == {"acc", "acc_stderr"}
    assert llama.training
    message = r"unknown task 'countin' \(did you mean 'counting'\?\); allowed: counting"
    with pytest.raises(UsageError, match=message):
        evaluate_tasks(llama, tokenizer, ["countin"], include_path=folder)
    with pytest.raises(UsageError, match="no such folder of task files: .*/none"):
        evaluate_tasks(llama, tokenizer, ["counting"], include_path=f"{folder}/none")


def test_importing_the_module_and_reading_a_file_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    code = (
        "import sys, hf_gqaprune.evaluation.perplexity; from hf_gqaprune.data import load_text; "
        f"load_text({str(tmp_path / 'a.txt')!r}, split='test'); "
        "print([name for name in ('evaluate', 'datasets', 'lm_eval') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_of_the_module_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Perplexty'"):
        evaluation.Perplexty  # noqa: B018
