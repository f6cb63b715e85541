"""Evaluate checkpoints on the same tokens and write the report that compares them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import LOG_FILE, ModelFolder, read_identity, read_training_log, refuse_overlap, texts_used
from ..configuration import EvaluationConfig
from ..data import Text, token_ids
from ..errors import UsageError
from ..models import PLAN_FILE
from ..plan import PruningPlan
from ..utils import compute_dtype, memory_limit, refuse_existing, select_device
from .perplexity import PerplexityResult, evaluate_perplexity, window
from .report import Report, Stage, versions
from .tasks import evaluate_tasks

REPORT, PLOT = "report.json", "report.png"


@dataclass(frozen=True)
class CheckpointResult:
    """Results of one checkpoint; `tasks` is None if none were requested."""

    parameters: int
    perplexity: tuple[PerplexityResult, ...]
    tasks: dict[str, dict[str, float]] | None


def evaluate_checkpoints(
    models: Mapping[str, ModelFolder], texts: Sequence[Text], config: EvaluationConfig, hint: str
) -> Iterator[tuple[str, CheckpointResult]]:
    """Evaluate checkpoints one after the other and yield each name with its result.

    Args:
        models: checkpoints by name.
        texts: the loaded texts of `config.data`.
        config: windows, tasks and device; `seq_len=None` for the shortest default window among the checkpoints.
        hint: what to do if the memory of a GPU is full; ends that error message.

    Raises:
        UsageError: a checkpoint has no weights or tokenizer, one of the models cannot run the windows, or the tokenizers
            yield different tokens; raised before any model is loaded.
        WorkError: the memory of a GPU is full; or as `evaluate_perplexity`.
    """
    seq_len = config.seq_len or min(window(model.config, None, None)[0] for model in models.values())
    for model in models.values():
        window(model.config, seq_len, config.stride)
        model.check_weights()
    texts = [replace(text, content=text.content[: config.max_chars]) for text in texts]
    _check_tokens(models, texts)
    device = select_device(config.device)
    for name, folder in models.items():
        with memory_limit(device, hint):
            dtype = getattr(torch, config.dtype) if config.dtype else compute_dtype(folder.dtype, device)
            loaded = folder.load(dtype, config.device)
            results = tuple(
                evaluate_perplexity(
                    loaded, folder.tokenizer, text, seq_len=seq_len, stride=config.stride, drop_tail=config.drop_tail
                )
                for text in texts
            )
            options: dict[str, Any] = {"include_path": config.include_path, "limit": config.limit}
            tasks = evaluate_tasks(loaded, folder.tokenizer, config.tasks, **options) if config.tasks else None
            parameters = loaded.num_parameters()
            del loaded  # a GPU may not hold two models
        yield name, CheckpointResult(parameters, results, tasks)


def _check_tokens(models: Mapping[str, ModelFolder], texts: Iterable[Text]) -> None:
    """Raise [`UsageError`] unless the tokenizers of all models yield the same tokens of every text."""
    for text in texts:
        if not text.content.strip():
            raise UsageError(f"the text {text.name} is empty")
        tokens = {
            name: (model.tokenizer.bos_token_id, token_ids(model.tokenizer, text.content)) for name, model in models.items()
        }
        first, *others = tokens
        for name in others:
            if tokens[name] != tokens[first]:
                counts = len(tokens[first][1]), len(tokens[name][1])
                raise UsageError(
                    f"{text.name} is {counts[0]:,} tokens for {first} and {counts[1]:,} different tokens for {name}: "
                    "perplexities of different tokenizers cannot be compared, evaluate the checkpoints one by one"
                )


def check_unique_names(texts: Iterable[Text]) -> None:
    """Raise [`UsageError`] if two texts have the same name, by which a report identifies them."""
    for name, times in Counter(text.name for text in texts).items():
        if times > 1:
            raise UsageError(f"two evaluation texts are called {name!r}, and a report needs distinct names: rename a file")


def check_unseen(texts: Iterable[Text], used: Iterable[Mapping[str, Any]]) -> None:
    """Raise [`UsageError`] if one of `texts` was `used` for calibration or training."""
    refuse_overlap(used, [{"name": text.name, "split": text.split, "sha256": text.sha256} for text in texts])


def report_stages(models: Mapping[str, ModelFolder], texts: Iterable[Text], overwrite: bool) -> dict[str, ModelFolder]:
    """Check that a report can compare `models` and return them by stage.

    Args:
        models: the dense, the pruned and optionally the recovered checkpoint, by the names the user gave.
        texts: texts that they will be evaluated on.
        overwrite: replace an existing report in the last folder.

    Raises:
        UsageError: there are fewer or more checkpoints, they are in another order or have different plans, the last one
            is not a local folder, a report exists, or the weights have seen one of the texts or two have the same name.
    """
    folders = {name: model.path for name, model in models.items()}
    if not 2 <= len(folders) <= 3:
        raise UsageError("a report compares DENSE PRUNED or DENSE PRUNED RECOVERED: name two or three checkpoints")
    names, paths = list(folders), list(folders.values())
    last = paths[-1]
    if not Path(names[-1]).is_dir():
        raise UsageError(f"{names[-1]} is not a local folder, and the report is written into it: give a folder")
    for name, folder in list(folders.items())[1:]:
        if not (folder / PLAN_FILE).is_file():
            raise UsageError(f"{name} has no {PLAN_FILE}: a report compares DENSE PRUNED [RECOVERED], in this order")
    trained = [(folder / LOG_FILE).is_file() for folder in paths]
    if len(paths) == 3:
        hashes = [PruningPlan.load(folder / PLAN_FILE).hash() for folder in paths[1:]]
        if hashes[0] != hashes[1]:
            raise UsageError(
                f"{names[1]} and {names[2]} were pruned by different plans: the second must be recovered from the first"
            )
        if trained[1] and not trained[2]:
            raise UsageError(f"{names[1]} was trained and {names[2]} was not: give the recovered checkpoint last")
    for file in (REPORT, PLOT):
        refuse_existing(last / file, overwrite, file=True)
    texts = list(texts)
    check_unique_names(texts)
    check_unseen(texts, texts_used(last))
    stages = ["dense", "pruned", "recovered"] if len(paths) == 3 else ["dense", "recovered" if trained[1] else "pruned"]
    return dict(zip(stages, models.values(), strict=True))


def write_report(
    model: str, stages: Mapping[str, ModelFolder], results: Iterable[CheckpointResult], target: Path
) -> Report:
    """Write the report and its picture into `target`, replacing existing ones.

    Args:
        model: name of the dense model.
        stages: checkpoints by stage; plan, calibration text and seed are read from the last folder.
        results: result of each stage, in the same order.
    """
    last = list(stages.values())[-1].path
    log, known = read_training_log(last), read_identity(last) or {}
    evaluated = tuple(
        Stage(
            stage,
            result.parameters,
            log["trainable"] if log and stage == "recovered" else None,
            {perplexity.dataset: perplexity for perplexity in result.perplexity},
            result.tasks,
        )
        for stage, result in zip(stages, results, strict=True)
    )
    plan = PruningPlan.load(last / PLAN_FILE).summary()
    report = Report(model, evaluated, plan, versions(), known.get("seed"), tuple(known.get("calibration", ())))
    report.plot(target / PLOT, overwrite=True)
    report.save(target / REPORT, overwrite=True)
    return report
