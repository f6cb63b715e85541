"""Train the embedded demo model: `python benchmarks/train_demo.py -o hf_gqaprune/demo_model`.

A Llama with 32 query and 8 KV heads, its tokenizer, and nothing but the stories of `hf_gqaprune.demo`.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gqaprune import demo

WINDOW, BATCH = 64, 32


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,024 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[1], model_max_length=512
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About 1.3 M parameters, most of them in the decoder layers."""
    config = LlamaConfig(
        hidden_size=128,
        head_dim=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=5,
        intermediate_size=448,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(demo.text("train"))
    ids = torch.tensor(tokenizer(demo.text("train", 6_500_000), add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1)
    windows = torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id), windows], 1)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {windows.numel():,} tokens, {args.steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / args.steps)))),
    )
    order = torch.randperm(len(windows))
    start = time.time()
    for step in range(args.steps):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)
        batch = windows[order[rows]]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
