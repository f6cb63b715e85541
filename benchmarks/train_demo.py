"""Train the embedded demo model: `python benchmarks/train_demo.py -o hf_gqaprune/data/demo_model`.

A Llama with 32 query and 8 KV heads, its tokenizer, trained on the stories of `hf_gqaprune.data.demo` alone. Takes minutes
on two CPU cores. The README.md of the folder is kept.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gqaprune.data import demo

WINDOW, PEAK, FLOOR = 128, 4e-3, 0.02
CHARS = 3_500_000
#: about 1.2 M parameters, most of them in the decoder layers
SIZES = {
    "hidden_size": 128,
    "head_dim": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 5,
    "intermediate_size": 352,
}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 1,024 tokens that starts every text with `<|begin_of_text|>`, as Llama-3's does."""
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[bos, eos], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos, model_max_length=512
    )


def build_model(tokenizer: PreTrainedTokenizerFast, **sizes: int) -> LlamaForCausalLM:
    """Initialise a Llama of `sizes`, fields of `LlamaConfig`, for texts of up to 512 tokens."""
    config = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, steps: int, batch: int, warmup: int) -> None:
    """Train `model` in place on windows of `text`, `batch` at a time; a cosine with linear warm-up sets the rate."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1)
    windows = torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id), windows], 1)
    print(f"{model.num_parameters():,} parameters, {windows.numel():,} tokens, {steps:,} steps", flush=True)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min((step + 1) / warmup, FLOOR + (1 - FLOOR) * cosine)

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = torch.randperm(len(windows))
    start = time.time()
    for step in range(steps):
        rows = windows[order[torch.arange(step * batch, (step + 1) * batch) % len(windows)]]
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:6d}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the sums, hence the weights, then do not depend on the number of cores
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(demo.demo_text("train"))
    model = build_model(tokenizer, **SIZES)
    train(model, tokenizer, demo.demo_text("train", CHARS), args.steps, batch=8, warmup=60)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
