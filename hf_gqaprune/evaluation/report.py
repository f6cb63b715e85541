"""Report results of the dense, pruned and recovered model as JSON, table and picture."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import format_sources, refuse_overlap
from ..errors import UsageError, unknown
from ..utils import refuse_existing, write_json
from ..version import __version__
from .perplexity import PerplexityResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERSION = 1
STAGES = ("dense", "pruned", "recovered")
_KEYS = ("version", "model", "stages", "plan", "versions", "seed", "calibration")
_COLOURS = {"dense": "#9aa5b1", "pruned": "#d1495b", "recovered": "#2a7f9e"}
#: fields that must agree for two perplexities to be comparable: the same tokens in the same windows
_CONDITIONS = ("split", "seq_len", "stride", "bos", "tokens", "text_sha256")
_PACKAGES = (
    "torch transformers accelerate peft trl torch-pruning datasets evaluate huggingface-hub safetensors lm-eval"
).split()


@dataclass(frozen=True)
class Stage:
    """Results of one model of the comparison.

    Attributes:
        name: `dense`, `pruned` or `recovered`.
        parameters: number of parameters; tied weights count once.
        trainable: number of trained parameters (of the adapter for LoRA); None without training.
        perplexity: results by dataset name.
        tasks: lm-eval results as `evaluate_tasks` returns them; None if none were requested.
    """

    name: str
    parameters: int
    trainable: int | None
    perplexity: dict[str, PerplexityResult]
    tasks: dict[str, dict[str, float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form: perplexities by dataset, and `tasks` only if there are any."""
        results = {
            name: {k: v for k, v in r.to_dict().items() if k != "dataset"} for name, r in self.perplexity.items()
        }
        data = {"name": self.name, "parameters": self.parameters, "trainable": self.trainable, "perplexity": results}
        return data if self.tasks is None else {**data, "tasks": self.tasks}


@dataclass(frozen=True)
class Report:
    """Results of a dense model and the models made from it, measured on the same tokens.

    Attributes:
        model: name of the dense model, as the user gave it.
        stages: `dense`, then `pruned` and/or `recovered`.
        plan: `PruningPlan.summary()`.
        versions: package versions, see [`versions`].
        seed: seed of the run; None if the pruned checkpoint does not record it.
        calibration: `Calibration.record()`: name, split and sha256 of every calibration text.

    Raises:
        UsageError: the stages were not measured on the same tokens, are out of order or repeated, or a text was used for
            both calibration and evaluation.
    """

    model: str
    stages: tuple[Stage, ...]
    plan: dict[str, Any]
    versions: dict[str, str]
    seed: int | None
    calibration: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        # lists are accepted and stored as tuples
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "calibration", tuple(self.calibration))
        _check_stages(self.stages)
        measured = [result for stage in self.stages for result in stage.perplexity.values()]
        refuse_overlap(
            self.calibration, ({"name": r.dataset, "split": r.split, "sha256": r.text_sha256} for r in measured)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        stages = [stage.to_dict() for stage in self.stages]
        return {"version": VERSION, **data, "stages": stages, "calibration": list(self.calibration)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Report:
        """Invert `to_dict`; raise [`UsageError`] for another version, or a missing or unknown key."""
        if not isinstance(data, Mapping):
            raise UsageError("a report must be a JSON object")
        if data.get("version") != VERSION:
            raise UsageError(f"report version {data.get('version')!r} cannot be read, only {VERSION}: evaluate again")
        for key in data:
            if key not in _KEYS:
                raise unknown("key of a report", key, _KEYS)
        try:
            stages = tuple(
                Stage(
                    name=stage["name"],
                    parameters=stage["parameters"],
                    trainable=stage["trainable"],
                    perplexity={
                        name: PerplexityResult(dataset=name, **result) for name, result in stage["perplexity"].items()
                    },
                    tasks=stage.get("tasks"),
                )
                for stage in data["stages"]
            )
            calibration = tuple(data.get("calibration", ()))
            return Report(data["model"], stages, data["plan"], data["versions"], data["seed"], calibration)
        except KeyError as error:
            raise UsageError(f"the report lacks {error}") from error
        except (TypeError, AttributeError) as error:
            raise UsageError(f"malformed report: {error}") from error

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the report as JSON; raise [`UsageError`] for an existing file unless `overwrite`."""
        write_json(refuse_existing(path, overwrite, file=True), self.to_dict())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Report:
        """Read a saved report; raise [`UsageError`] if the file is absent or malformed."""
        try:
            return Report.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise UsageError(f"cannot read report {path}: {error.strerror}") from error
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {error}") from error

    def table(self) -> str:
        """Format one column per stage, with ratios to the first, followed by texts, calibration and plan."""
        stages = self.stages
        rows = [["", *(stage.name for stage in stages)]]
        rows.append(["parameters", *_with_ratios([stage.parameters for stage in stages], ",", "{:.4f}x")])
        rows.append(["trainable", *("-" if s.trainable is None else f"{s.trainable:,}" for s in stages)])
        for dataset in stages[0].perplexity:
            values = [stage.perplexity[dataset].value for stage in stages]
            rows.append([f"{dataset} perplexity", *_with_ratios(values, ",.2f", "{:.3f}x")])
        measured = [{(t, m): v for t, ms in (s.tasks or {}).items() for m, v in ms.items()} for s in stages]
        for key in dict.fromkeys(key for values in measured for key in values):
            if "stderr" not in key[1]:
                rows.append([" ".join(key), *(f"{v[key]:.4f}" if key in v else "-" for v in measured)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            ).rstrip()
            for row in rows
        ]
        conditions = [result.conditions() for result in stages[0].perplexity.values()]
        choice = f"{_removed(self.plan)}; criterion {self.plan['criterion']}, allocation {self.plan['allocation']}"
        seen = [f"calibrated on {format_sources(self.calibration)}"] if self.calibration else []
        return "\n".join([*lines, "", *conditions, *seen, choice])

    def plot(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Plot kept KV groups and FFN width per layer beside the perplexities, as a PNG of 1650 x 750 pixels."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        target = refuse_existing(path, overwrite, file=True)
        # without pyplot, which keeps figures alive and chooses a window system
        figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 2, width_ratios=(1.2, 1))
        groups = figure.add_subplot(grid[0, 0])
        widths = figure.add_subplot(grid[1, 0], sharex=groups)
        _draw_layers(groups, self.plan, "kv_heads", "KV groups")
        _draw_layers(widths, self.plan, "ffn", "FFN channels")
        groups.tick_params(labelbottom=False)
        groups.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        widths.set_xlabel("layer")
        _draw_perplexities(figure.add_subplot(grid[:, 1]), self.stages)
        figure.suptitle(f"{Path(self.model).name}: {_removed(self.plan)}")
        handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".png", dir=target.parent)
        os.close(handle)
        try:
            figure.savefig(scratch)
            os.chmod(scratch, 0o644)
            os.replace(scratch, target)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise


def versions() -> dict[str, str]:
    """Return the installed versions of Python, this package and the packages that results depend on."""
    installed = {"python": platform.python_version(), "hf_gqaprune": __version__}
    for name in _PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # lm-eval is optional
    return installed


def _check_stages(stages: tuple[Stage, ...]) -> None:
    names = [stage.name for stage in stages]
    for name in names:
        if name not in STAGES:
            raise unknown("stage", name, STAGES)
    if not names or names != sorted(set(names), key=STAGES.index):
        raise UsageError(f"a report takes the stages {', '.join(STAGES)}, each at most once, in order; got {names}")
    first = stages[0]
    for stage in stages[1:]:
        if stage.perplexity.keys() != first.perplexity.keys():
            raise UsageError(
                f"{first.name} was measured on {', '.join(first.perplexity)} but {stage.name} on "
                f"{', '.join(stage.perplexity) or 'nothing'}: measure every stage on the same texts"
            )
        for dataset, result in stage.perplexity.items():
            for key in _CONDITIONS:
                ours, theirs = getattr(result, key), getattr(first.perplexity[dataset], key)
                if ours != theirs:
                    raise UsageError(
                        f"{dataset} has {key}={theirs} for {first.name} but {key}={ours} for {stage.name}, which "
                        f"cannot be compared: measure every stage on the same tokens"
                    )


def _with_ratios(values: list[Any], spec: str, ratio: str) -> list[str]:
    """Format each number, from the second on with its ratio to the first."""
    cells = [format(values[0], spec)]
    return cells + [f"{format(value, spec)} ({ratio.format(value / values[0])})" for value in values[1:]]


def _removed(plan: Mapping[str, Any]) -> str:
    return f"{plan['ratio']:.2%} of all parameters removed, {plan['backbone_ratio']:.2%} of the backbone"


def _draw_layers(axes: Axes, plan: Mapping[str, Any], key: str, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = range(len(plan["layers"]))
    axes.bar(layers, [layer[key] for layer in plan["layers_before"]], color="#e4e7eb", label="dense")
    axes.bar(layers, [layer[key] for layer in plan["layers"]], color="#3e4c59", label="kept")
    axes.set_ylabel(label)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_perplexities(axes: Axes, stages: tuple[Stage, ...]) -> None:
    """Draw bars by dataset and stage with ratios to the first stage; the axis is logarithmic if they differ tenfold."""
    datasets = list(stages[0].perplexity)
    width = 0.8 / len(stages)
    for index, stage in enumerate(stages):
        values = [stage.perplexity[dataset].value for dataset in datasets]
        positions = [i + (index - (len(stages) - 1) / 2) * width for i in range(len(datasets))]
        bars = axes.bar(positions, values, width * 0.94, color=_COLOURS[stage.name], label=stage.name)
        labels = [_figure(value) for value in values]
        if index:
            first = [stages[0].perplexity[dataset].value for dataset in datasets]
            ratios = [value / base for value, base in zip(values, first, strict=True)]
            labels = [f"{label}\n{_figure(ratio)}x" for label, ratio in zip(labels, ratios, strict=True)]
        axes.bar_label(bars, labels, fontsize=8, padding=2)
    axes.set_xticks(range(len(datasets)), datasets)
    # the bars of a single dataset would fill the picture
    margin = 1.0 if len(datasets) < 2 else 0.5
    axes.set_xlim(-margin, len(datasets) - 1 + margin)
    axes.set_ylabel("perplexity, lower is better")
    everything = [result.value for stage in stages for result in stage.perplexity.values()]
    if everything and max(everything) > 10 * min(everything):
        axes.set_yscale("log")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(stages), frameon=False)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"
