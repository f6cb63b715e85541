"""No test reaches the outside: a loopback Hub stands in before anything imports `huggingface_hub`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.hub_server import TOKEN, HubServer

_HUB = HubServer()
_HOME = tempfile.TemporaryDirectory(prefix="hf_home_")
os.environ.update(
    HF_ENDPOINT=_HUB.endpoint,
    HF_HOME=_HOME.name,
    HF_TOKEN=TOKEN,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    NO_PROXY="127.0.0.1,localhost",
    no_proxy="127.0.0.1,localhost",
    TOKENIZERS_PARALLELISM="false",
    # the models are too small for more, also in the processes that are started
    OMP_NUM_THREADS="1",
    # bits are compared, and a GPU rounds in an order of its own
    CUDA_VISIBLE_DEVICES="",
)
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The loopback Hub with no repository in it and all its lines up."""
    _HUB.repos.clear()
    _HUB.objects.clear()
    _HUB.requests.clear()
    _HUB.outage = None
    yield _HUB
    _HUB.outage = None


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, 259 in all; `<s>` goes in front, as Llama-3's tokenizer does."""
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A fresh random Llama for `tokenizer`: 3 layers, 8 query heads on 4 KV heads of width 8, FFN 48, float32."""
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def dense(tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint of `llama` and `tokenizer`."""
    llama.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"
