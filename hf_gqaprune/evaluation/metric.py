"""Wrap `evaluate_perplexity` as a metric of `evaluate`.

Import the class as `hf_gqaprune.evaluation.Perplexity`, or load this file by its path without the Hub:
`evaluate.load(hf_gqaprune.evaluation.metric.__file__)`.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_gqaprune.data import Text
from hf_gqaprune.evaluation import evaluate_perplexity

_INPUTS = """
Args:
    predictions: texts, which are joined by blank lines and scored as one text, so that nothing is averaged over texts of
        unequal length.
    model: a loaded causal LM.
    tokenizer: its tokenizer.
    seq_len, stride, drop_tail, max_chars, batch_size: as for `hf_gqaprune.evaluate_perplexity`.

Returns:
    `value` (the perplexity), `nats`, `tokens`, `dataset`, `split`, `seq_len`, `stride`, `bos`, `text_sha256`.

Example:
    >>> perplexity = Perplexity()
    >>> perplexity.compute(predictions=["To be, or not to be."], model=model, tokenizer=tokenizer)["value"]
"""


class Perplexity(evaluate.Metric):
    """Compute perplexity by `compute(predictions=texts, model=..., tokenizer=..., ...)`."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="exp(total nats / scored tokens): windows of BOS and seq_len - 1 tokens, each token scored once",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, *, predictions: list[str], model: Any, tokenizer: Any, **options: Any) -> dict[str, Any]:
        text = Text("predictions", "given", "\n\n".join(predictions))
        return evaluate_perplexity(model, tokenizer, text, **options).to_dict()
