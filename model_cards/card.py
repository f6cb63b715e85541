"""Write a model card from the files of its checkpoint."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..checkpoint import read_identity, read_training_log
from ..configuration import PruningConfig, Recipe
from ..errors import UsageError
from ..plan import PruningPlan
from ..utils import refuse_existing, write_text
from .licenses import inherited, is_hub_id, llama_terms

#: named datasets -> id and config on the Hub
_DATASETS = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "ptb": ("ptb-text-only/ptb_text_only", None)}
#: suffix of a model's class name -> (pipeline tag, Auto class)
_HEADS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
}
_BARE = ("feature-extraction", "AutoModel")
_TAGS = ["hf_gqaprune", "pruned", "structured-pruning", "grouped-query-attention", "llama"]
_SIZES = (
    ("parameters", "parameters"),
    ("of the decoder layers", "backbone_parameters"),
    ("KV cache, bytes per token", "kv_bytes_per_token"),
    ("FLOPs per token", "flops_per_token"),
)
#: fields that must agree for two perplexities to be comparable
_CONDITIONS = ("split", "seq_len", "stride", "bos", "tokens", "text_sha256")


def create_model_card(
    folder: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str],
    license: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `folder/README.md` from the files in `folder`, and `NOTICE` if a Llama licence requires one.

    Reads `config.json` and `prune_plan.json`, and if they exist `report.json`, `recipe.yaml`, `gqaprune.json`,
    `training_log.json` and pictures (`*.png`).

    Args:
        base_model: Hub id or folder of the dense model. Only the name of a folder is shown, never its path.
        license: id of the licence on the Hub; None: that of the base model's card or licence file, else "unknown".
        name: `ORG/NAME` on the Hub, or a bare name; None: the folder's name.
        overwrite: replace an existing card.

    Raises:
        UsageError: a folder or file is missing, a card exists, or the files do not belong together: the report is of
            another plan, or its stages were not measured on the same tokens.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}: give a pruned checkpoint")
    refuse_existing(folder / "README.md", overwrite, file=True)
    stated = {"license": license} if license is not None else inherited(base_model)
    text = _render(folder, base_model, stated, name or folder.resolve().name)
    if terms := llama_terms(stated):
        write_text(folder / "NOTICE", terms.notice + "\n")
    write_text(folder / "README.md", text)
    return folder / "README.md"


def head(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return pipeline tag and Auto class of the model class in `config.json`."""
    architecture = (config.get("architectures") or ["LlamaForCausalLM"])[0]
    return next((pair for suffix, pair in _HEADS.items() if architecture.endswith(suffix)), _BARE)


def _render(folder: Path, base_model: str | os.PathLike[str], stated: dict[str, Any], name: str) -> str:
    """Render the card with `stated` as its licence metadata."""
    config = _read_json(folder / "config.json")
    plan = PruningPlan.load(folder / "prune_plan.json").summary()
    report = _read_json(folder / "report.json") if (folder / "report.json").exists() else {}
    stages = report.get("stages", [])
    names = [stage["name"] for stage in stages]
    _check_report(report, plan)
    recipe_path = folder / "recipe.yaml"
    recipe = recipe_path.read_text(encoding="utf-8") if recipe_path.exists() else ""
    known = read_identity(folder) or {}
    log = read_training_log(folder)
    terms = llama_terms(stated)
    pipeline_tag, auto_class = head(config)
    title = name.rpartition("/")[2]
    on_hub = is_hub_id(base_model)
    custom_code = "auto_map" in config
    metadata = ModelCardData(
        **stated,
        base_model=str(base_model) if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=[*_TAGS, *(["custom_code"] if custom_code else [])],
        datasets=_training_data(recipe_path, log) or None,
        model_name=title if stages else None,
        eval_results=_eval_results(stages[-1]) if stages else None,
    )
    base_name = Path(base_model).resolve().name
    return fill(
        resources.files("hf_gqaprune.model_cards").joinpath("template.md.jinja").read_text(encoding="utf-8"),
        metadata=metadata.to_yaml(),
        title=title,
        name=name,
        base=f"[{base_model}](https://huggingface.co/{base_model})" if on_hub else f"`{base_name}`",
        built_with=terms and terms.built_with,
        terms=terms,
        license=stated["license"],
        plan=plan,
        sizes=[_size_row(label, plan[f"{key}_before"], plan[f"{key}_after"]) for label, key in _SIZES],
        layers=_layer_rows(plan),
        unequal=any(layer != plan["layers"][0] for layer in plan["layers"]),
        stages=names,
        columns=[*names, f"{names[-1]} / {names[0]}"] if len(names) > 1 else names,
        results=_perplexity_rows(stages),
        conditions=_condition_rows(stages),
        tasks=_task_rows(stages),
        recovered="recovered" in names or log is not None,
        training=_training(log, stages),
        held_out=_held_out(log or {}),
        calibration=[_source_line(source) for source in report.get("calibration") or known.get("calibration") or []],
        seed=report.get("seed", known.get("seed")),
        compensation=known.get("compensation"),
        ridges=_ridges(known),
        passes=_passes(known),
        settings=_settings(recipe_path) if recipe else [],
        recipe=recipe.strip(),
        identity=[("plan", plan["hash"]), *_fingerprints(known)],
        pictures=[{"file": path.name, "alt": path.stem} for path in sorted(folder.glob("*.png"))],
        auto_class=auto_class,
        custom_code=custom_code,
        versions=sorted(report.get("versions", {}).items()),
    )


def fill(template: str, **values: Any) -> str:
    """Fill a Jinja template; raise `jinja2.UndefinedError` for a name that is not in `values` (Jinja's default is "")."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template).render(values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path.parent} has no {path.name}: give a pruned checkpoint") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} is not a JSON object")
    return data


def _check_report(report: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Raise [`UsageError`] unless the report belongs to this plan and its stages are comparable."""
    reported = (report.get("plan") or {}).get("hash", plan["hash"])
    if reported != plan["hash"]:
        raise UsageError(
            f"report.json is of plan {reported[:12]}, prune_plan.json is {plan['hash'][:12]}: evaluate again"
        )
    first: dict[str, tuple[str, Any]] = {}
    for stage in report.get("stages", []):
        for dataset, result in stage["perplexity"].items():
            name, reference = first.setdefault(dataset, (stage["name"], result))
            for key in _CONDITIONS:
                if result[key] != reference[key]:
                    raise UsageError(
                        f"report.json: {dataset} has {key}={reference[key]} for {name} but {result[key]} for "
                        f"{stage['name']}, which cannot be compared: evaluate both again in one call"
                    )


def _size_row(label: str, before: int, after: int) -> tuple[str, ...]:
    return label, f"{before:,}", f"{after:,}", f"{100 * (after / before - 1):+.2f} %"


def _layer_rows(plan: Mapping[str, Any]) -> list[tuple[str, ...]]:
    keys = ("kv_heads", "query_heads", "ffn")
    rows = []
    for index, (old, new) in enumerate(zip(plan["layers_before"], plan["layers"], strict=True)):
        cells = [f"{old[key]:,}" if old[key] == new[key] else f"{old[key]:,} → {new[key]:,}" for key in keys]
        rows.append((str(index), *cells))
    return rows


def _datasets(stages: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(dataset for stage in stages for dataset in stage["perplexity"]))


def _perplexity_rows(stages: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Format one row per dataset: the perplexity of each stage, and the ratio of the last to the first."""
    rows = []
    for dataset in _datasets(stages):
        values = [stage["perplexity"].get(dataset, {}).get("value") for stage in stages]
        cells = ["-" if value is None else f"{value:,.2f}" for value in values]
        if len(stages) > 1:
            cells.append(f"{values[-1] / values[0]:.3f}" if values[0] and values[-1] else "-")
        rows.append((dataset, *cells))
    return rows


def _condition_rows(stages: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for dataset in _datasets(stages):
        r = next(stage["perplexity"][dataset] for stage in stages if dataset in stage["perplexity"])
        bos = "yes" if r["bos"] else "no"
        sha256 = f"`{r['text_sha256']}`"
        rows.append((dataset, r["split"], str(r["seq_len"]), str(r["stride"]), bos, f"{r['tokens']:,}", sha256))
    return rows


def _metrics(stage: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Map `(task, metric)` to the value of lm-eval, without standard errors."""
    tasks = stage.get("tasks") or {}
    return {
        (task, metric.partition(",")[0]): float(value)
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric
    }


def _task_rows(stages: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    measured = [_metrics(stage) for stage in stages]
    keys = list(dict.fromkeys(key for metrics in measured for key in metrics))
    return [(*key, *(f"{metrics[key]:.4f}" if key in metrics else "-" for metrics in measured)) for key in keys]


def _eval_results(stage: Mapping[str, Any]) -> list[EvalResult] | None:
    """Return the final model's results for the `model-index`."""
    task: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text Generation"}
    results = []
    for dataset, r in stage["perplexity"].items():
        identifier, config = _DATASETS.get(dataset, (dataset, None))
        results.append(
            EvalResult(
                **task,
                dataset_type=identifier,
                dataset_name=dataset,
                dataset_config=config,
                dataset_split=r["split"],
                metric_type="perplexity",
                metric_name=f"perplexity (seq_len {r['seq_len']}, stride {r['stride']})",
                # numpy scalars would be dumped as Python objects
                metric_value=float(r["value"]),
            )
        )
    for (name, metric), value in _metrics(stage).items():
        results.append(
            EvalResult(**task, dataset_type=name, dataset_name=name, metric_type=metric, metric_value=float(value))
        )
    return results or None


def _training(log: Mapping[str, Any] | None, stages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Summarize recovery from its log, else the trained parameters from the report; None without recovery."""
    if log is None:
        trainable = next((stage["trainable"] for stage in reversed(stages) if stage["trainable"]), None)
        return trainable and {"trainable": trainable, "tokens": None, "teacher": None, "merged": True, "data": []}
    return {
        "trainable": log["trainable"],
        "tokens": log["tokens"],
        "teacher": log["teacher"],
        "merged": log["settings"]["method"] == "lora",
        "data": [_source_line(source) for source in log["data"]],
    }


def _held_out(log: Mapping[str, Any]) -> list[str]:
    """Format the held-out perplexities before the training and of the weights that were kept; `[]` without held-out rows."""
    entries = log.get("held_out", [])
    return [f"{entry['perplexity']:,.2f}" for entry in (entries[0], log.get("kept") or entries[-1])] if entries else []


def _source_line(source: Mapping[str, Any]) -> str:
    """Format one source of text: its name, followed by its other fields."""
    details = {key: value for key, value in source.items() if key != "name" and (key, value) != ("weight", 1.0)}
    rest = ", ".join(f"{key} {value}" for key, value in details.items())
    return f"{source['name']} ({rest})" if rest else str(source["name"])


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _settings(recipe_path: Path) -> list[tuple[str, str]]:
    """List the values of the recipe that differ from the defaults, flattened, in its order."""
    recipe = Recipe.load(recipe_path)
    unchanged = Recipe(recipe.model, recipe.output, prune=recipe.prune).to_dict()
    default = _flat({**unchanged, "prune": PruningConfig().to_dict()})
    chosen = {key: value for key, value in _flat(recipe.to_dict()).items() if not key.startswith("card.")}
    return [(key, _inline(value)) for key, value in chosen.items() if default.get(key, ...) != value]


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _training_data(recipe_path: Path, log: Mapping[str, Any] | None) -> list[str]:
    """List the Hub ids of the recovery's training data, as named in the recipe or else in the log."""
    recover = Recipe.load(recipe_path).recover if recipe_path.exists() else None
    sources = recover.data if recover else [source["name"] for source in (log or {}).get("data", [])]
    known = (_DATASETS.get(source, (source, None))[0] for source in sources)
    return [name.partition(":")[0] for name in known if is_hub_id(name.partition(":")[0])]


def _passes(known: Mapping[str, Any]) -> str:
    """Say what the natural-gradient passes did: their number and the held-out divergence; empty without any."""
    passes = known.get("passes", ())
    kept = [each for each in passes if each["kept"]]
    if not kept:
        return f"none of {len(passes)} passes lowered the held-out divergence" if passes else ""
    return (
        f"{len(kept)} of {len(passes)} passes kept, KL(dense, pruned) on held-out windows {kept[0]['before']:.4f} -> "
        f"{kept[-1]['after']:.4f} nats per token"
    )


def _ridges(known: Mapping[str, Any]) -> str:
    """Count the ridges that the refit chose: `0.001 (12 matrices), 0.1 (3 matrices)`; empty without a refit."""
    counts = Counter(known.get("ridges", {}).values())
    return ", ".join(f"{ridge:g} ({count} matri{'x' if count == 1 else 'ces'})" for ridge, count in sorted(counts.items()))


def _fingerprints(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), str(value)) for key, value in known.items() if "fingerprint" in key and value]
