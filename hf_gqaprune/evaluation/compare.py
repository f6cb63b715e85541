"""Measure checkpoints on the same tokens, and write the report that compares them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import (
    LOG_FILE,
    ModelFolder,
    read_identity,
    read_training_log,
    refuse_overlap,
    texts_used,
)
from ..configuration import EvaluationConfig
from ..data import Text, token_ids
from ..errors import UsageError
from ..models import PLAN_FILE
from ..plan import PruningPlan
from ..utils import compute_dtype, memory_limit, refuse_existing, select_device
from .perplexity import PerplexityResult, evaluate_perplexity, window
from .report import Report, Stage, count_parameters, versions
from .tasks import evaluate_tasks

REPORT, PLOT = "report.json", "report.png"


@dataclass(frozen=True)
class CheckpointResult:
    """One checkpoint's results; `tasks` is None where none were asked for."""

    parameters: int
    perplexity: tuple[PerplexityResult, ...]
    tasks: dict[str, dict[str, float]] | None


def measure(
    models: Mapping[str, ModelFolder], texts: Sequence[Text], config: EvaluationConfig, hint: str
) -> Iterator[tuple[str, CheckpointResult]]:
    """Measure checkpoints one after the other, `{name: folder}`, and yield each name with its results.

    Args:
        models: what to measure.
        texts: the texts of `config.data`, loaded.
        config: windows, tasks and device; `seq_len` None for the smallest default window of all the checkpoints.
        hint: ends the message where the memory of a GPU is full.

    Raises:
        UsageError: before any model is loaded, for a checkpoint without weights or tokenizer, windows that one of the
            models cannot run, and tokenizers that cut a text into other tokens.
        WorkError: the memory of a GPU is full; as `evaluate_perplexity`.
    """
    configs = [model.config for model in models.values()]
    seq_len = config.seq_len or min(window(each, None, None)[0] for each in configs)
    for each in configs:
        window(each, seq_len, config.stride)
    for model in models.values():
        model.check_weights()
    texts = [replace(text, content=text.content[: config.max_chars]) for text in texts]
    _check_tokens({name: model.tokenizer for name, model in models.items()}, texts)
    device = select_device(config.device)
    for name, folder in models.items():
        with memory_limit(device, hint):
            dtype = getattr(torch, config.dtype) if config.dtype else compute_dtype(folder.dtype, device)
            model = folder.load(dtype, config.device)
            results = tuple(
                evaluate_perplexity(
                    model, folder.tokenizer, text, seq_len=seq_len, stride=config.stride, drop_tail=config.drop_tail
                )
                for text in texts
            )
            options: dict[str, Any] = {"include_path": config.include_path, "limit": config.limit}
            tasks = evaluate_tasks(model, folder.tokenizer, config.tasks, **options) if config.tasks else None
            parameters = count_parameters(model)
            del model  # two of them may be too much for a GPU
        yield name, CheckpointResult(parameters, results, tasks)


def _check_tokens(tokenizers: Mapping[str, Any], texts: Iterable[Text]) -> None:
    """Raise [`UsageError`] unless all tokenizers make the same tokens of every text."""
    for text in texts:
        if not text.content.strip():
            raise UsageError(f"the text {text.name} is empty")
        made = {name: (tokenizer.bos_token_id, token_ids(tokenizer, text.content)) for name, tokenizer in tokenizers.items()}
        first, *others = made
        for name in others:
            if made[name] != made[first]:
                counts = len(made[first][1]), len(made[name][1])
                raise UsageError(
                    f"{text.name} is {counts[0]:,} tokens for {first} and {counts[1]:,} others for {name}: perplexities of "
                    "different tokenizers cannot be compared, evaluate them one by one"
                )


def refuse_same_names(texts: Iterable[Text]) -> None:
    """Raise [`UsageError`] where two texts have one name, which is all that a report tells them apart by."""
    for name, times in Counter(text.name for text in texts).items():
        if times > 1:
            raise UsageError(f"two evaluation texts are called {name!r}, and a report has one of a name: rename a file")


def refuse_seen(texts: Iterable[Text], used: Iterable[Mapping[str, Any]]) -> None:
    """Raise [`UsageError`] where a text is one of those that were `used` to calibrate or to train."""
    refuse_overlap(used, [{"name": text.name, "split": text.split, "sha256": text.sha256} for text in texts])


def compared(models: Mapping[str, ModelFolder], texts: Iterable[Text], overwrite: bool) -> dict[str, ModelFolder]:
    """Name the stages that the last checkpoint's report will compare, `{stage: folder}`.

    Args:
        models: the dense, the pruned and, where there is one, the recovered checkpoint, by the names they were given.
        texts: what they will be measured on.
        overwrite: replace the report that is there.

    Raises:
        UsageError: fewer or more, not in this order, of different plans, a last one that is no folder here, a report
            that exists, or texts that the weights have seen or that have one name.
    """
    folders = {name: model.path for name, model in models.items()}
    if not 2 <= len(folders) <= 3:
        raise UsageError("a report compares DENSE PRUNED or DENSE PRUNED RECOVERED: name two or three checkpoints")
    names, places = list(folders), list(folders.values())
    last = places[-1]
    if not Path(names[-1]).is_dir():
        raise UsageError(f"{names[-1]} is no folder here, and its report is written into it: give a folder")
    for name, folder in list(folders.items())[1:]:
        if not (folder / PLAN_FILE).is_file():
            raise UsageError(f"{name} has no {PLAN_FILE}: a report compares DENSE PRUNED [RECOVERED], in this order")
    trained = [(folder / LOG_FILE).is_file() for folder in places]
    if len(places) == 3:
        hashes = [PruningPlan.load(folder / PLAN_FILE).hash() for folder in places[1:]]
        if hashes[0] != hashes[1]:
            raise UsageError(f"{names[1]} and {names[2]} were pruned by different plans: name what one was made of the other")
        if trained[1] and not trained[2]:
            raise UsageError(f"{names[1]} was trained and {names[2]} was not: name the recovered checkpoint last")
    for file in (REPORT, PLOT):
        refuse_existing(last / file, overwrite, file=True)
    texts = list(texts)
    refuse_same_names(texts)
    refuse_seen(texts, texts_used(last))
    stages = ["dense", "pruned", "recovered"] if len(places) == 3 else ["dense", "recovered" if trained[1] else "pruned"]
    return dict(zip(stages, models.values(), strict=True))


def write_report(
    model: str, stages: Mapping[str, ModelFolder], measured: Iterable[CheckpointResult], target: Path
) -> Report:
    """Write the report and its picture into `target`, over those that are there.

    Args:
        model: name of the dense model.
        stages: `{stage: folder}`; the last one's files tell plan, calibration text and seed.
        measured: of each, in the same order.
    """
    last = list(stages.values())[-1].path
    log, known = read_training_log(last), read_identity(last) or {}
    made = tuple(
        Stage(
            stage,
            found.parameters,
            log["trainable"] if log and stage == "recovered" else None,
            {result.dataset: result for result in found.perplexity},
            found.tasks,
        )
        for stage, found in zip(stages, measured, strict=True)
    )
    plan = PruningPlan.load(last / PLAN_FILE).summary()
    report = Report(model, made, plan, versions(), known.get("seed"), tuple(known.get("calibration", ())))
    report.plot(target / PLOT, overwrite=True)
    report.save(target / REPORT, overwrite=True)
    return report
