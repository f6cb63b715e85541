"""Cache the teacher's top-k predictions on disk and look them up by the tokens of a row.

Each entry belongs to one sequence of tokens, so that order, packing, epochs and number of processes may differ between
writing and reading.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import WorkError
from ..models import IGNORED, TopLogProbs
from ..utils import write_json
from .distill import Teacher, scored

_INDEX = "sequences.json"


class TeacherCache:
    """Read the predictions that `write_cache` wrote, in place of a `Teacher`.

    Args:
        folder: has one sub-folder per process that wrote.
        temperature: temperature of the distillation that the cache was written for.
    """

    def __init__(self, folder: Path, temperature: float) -> None:
        self.temperature = temperature
        self._arrays: list[tuple[np.ndarray, ...]] = []
        self._entries: dict[str, tuple[int, int, int]] = {}
        for part, path in enumerate(sorted(folder.glob(f"*/{_INDEX}"))):
            index = json.loads(path.read_text(encoding="utf-8"))
            self._arrays.append(tuple(np.load(path.with_name(f"{name}.npy"), mmap_mode="r") for name in _ARRAYS))
            self._entries |= {key: (part, start, count) for key, (start, count) in index.items()}

    def targets(self, inputs: dict[str, Any], mask: torch.Tensor) -> TopLogProbs:
        """Return what `Teacher.targets` predicts after each position of `mask`."""
        parts: list[list[np.ndarray]] = [[], [], []]
        for ids, labels in sequences(inputs):
            wanted = int((labels[1:] != IGNORED).sum())
            part, start, count = self._entries.get(_key(ids, labels), (0, 0, -1))
            if count != wanted:
                raise WorkError("the teacher's predictions on disk belong to other data: start again without --resume")
            for column, array in zip(parts, self._arrays[part], strict=True):
                column.append(array[start : start + count])
        device = mask.device
        indices, log_probs, rest = (torch.from_numpy(np.concatenate(column)).to(device) for column in parts)
        return TopLogProbs(indices.long(), log_probs, rest)


_ARRAYS = ("indices", "log_probs", "rest")


def write_cache(teacher: Teacher, batches: Iterable[dict[str, torch.Tensor]], folder: Path, device: Any) -> None:
    """Write the predictions of `teacher` for each distinct sequence in `batches`.

    Args:
        batches: batches of the training's collator (`input_ids`, `labels`, and `attention_mask` or `position_ids`).
        folder: receives one file per field and, last, the index that marks the cache as complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, tuple[int, int]] = {}
    columns: list[list[np.ndarray]] = [[], [], []]
    total = 0
    for batch in batches:
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        found = teacher.targets(inputs, scored(inputs["labels"]))
        rows = (found.indices.int().cpu().numpy(), found.log_probs.cpu().numpy(), found.rest.cpu().numpy())
        start = 0
        for ids, labels in sequences(batch):
            count = int((labels[1:] != IGNORED).sum())
            key = _key(ids, labels)
            if key not in index:
                index[key] = (total, count)
                total += count
                for column, array in zip(columns, rows, strict=True):
                    column.append(array[start : start + count])
            start += count
    for name, column in zip(_ARRAYS, columns, strict=True):
        np.save(folder / f"{name}.npy", np.concatenate(column))
    write_json(folder / _INDEX, index)


def is_cached(folder: Path) -> bool:
    """Return whether `write_cache` has finished in `folder`."""
    return (folder / _INDEX).is_file()


def sequences(inputs: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `(ids, labels)` of each sequence in a batch without padding or packing; int64 `(length,)`, on the CPU."""
    ids, labels = inputs["input_ids"].cpu(), inputs["labels"].cpu()
    if "attention_mask" in inputs:
        for row, label, length in zip(ids, labels, inputs["attention_mask"].sum(1).tolist(), strict=True):
            yield row[:length], label[:length]
        return
    starts = (inputs["position_ids"][0].cpu() == 0).nonzero().flatten().tolist()
    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        yield ids[0, start:end], labels[0, start:end]


def _key(ids: torch.Tensor, labels: torch.Tensor) -> str:
    import xxhash

    # labels are part of the key; the first token never has a loss
    digest = xxhash.xxh3_128(ids.numpy().tobytes())
    digest.update((labels[1:] != IGNORED).numpy().tobytes())
    return digest.hexdigest()
