"""Say which units each block keeps, at what cost: a pruning plan, as data that is saved and compared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .models import Cost, LayerShape, ModelShape
from .utils import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VERSION = 1
_MOST_UNITS = 1 << 24  # above any width there is: a damaged file must not fill the memory


@dataclass(frozen=True)
class LayerPlan:
    """Units that one layer keeps: sorted indices in the plan's input model, empty where the whole block goes."""

    kv_groups: tuple[int, ...]
    query_heads: tuple[int, ...]
    ffn_channels: tuple[int, ...]

    @staticmethod
    def of_groups(shape: LayerShape, kv_groups: Iterable[int], ffn_channels: Iterable[int]) -> LayerPlan:
        """Keep whole KV groups: every query head of every kept group."""
        groups = tuple(sorted(kv_groups))
        heads = tuple(group * shape.n_rep + head for group in groups for head in range(shape.n_rep))
        return LayerPlan(groups, heads, tuple(sorted(ffn_channels)))


@dataclass(frozen=True)
class PruningPlan:
    """Which units each block keeps. Data only: equal plans are equal bytes.

    Attributes:
        source: sizes of the model that the plan applies to.
        layers: what each layer keeps.
        criterion, allocation: how it was chosen (names).
        attention_bias, mlp_bias: whether the pruned model has biases (also where compensation adds them).
    """

    source: ModelShape
    layers: tuple[LayerPlan, ...]
    criterion: str = "none"
    allocation: str = "none"
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.source.layers):
            raise UsageError(f"the plan has {len(self.layers)} layers, its model has {len(self.source.layers)}")
        for index, (shape, layer) in enumerate(zip(self.source.layers, self.layers, strict=True)):
            _check_layer(index, shape, layer)
        if not any(layer.kv_groups for layer in self.layers):
            raise UsageError("the plan removes attention from every layer, which no cache can run: keep one KV group")

    @staticmethod
    def keep_all(config: PreTrainedConfig) -> PruningPlan:
        """Make the plan that removes nothing."""
        source = ModelShape.from_config(config)
        layers = tuple(LayerPlan.of_groups(s, range(s.kv_heads), range(s.ffn)) for s in source.layers)
        return PruningPlan(source, layers, attention_bias=source.attention_bias, mlp_bias=source.mlp_bias)

    @property
    def target(self) -> ModelShape:
        """Sizes of the pruned model."""
        layers = tuple(
            LayerShape(len(kept.query_heads), len(kept.kv_groups), len(kept.ffn_channels), shape.head_dim)
            for shape, kept in zip(self.source.layers, self.layers, strict=True)
        )
        return replace(self.source, layers=layers, attention_bias=self.attention_bias, mlp_bias=self.mlp_bias)

    @property
    def before(self) -> Cost:
        """Cost of the input model."""
        return self.source.cost

    @property
    def after(self) -> Cost:
        """Cost of the pruned model."""
        return self.target.cost

    @property
    def ratio(self) -> float:
        """Fraction of all parameters that the plan removes."""
        return 1 - self.after.parameters / self.before.parameters

    @property
    def backbone_ratio(self) -> float:
        """Fraction of the decoder layers' parameters that the plan removes."""
        return 1 - self.after.backbone_parameters / self.before.backbone_parameters

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise [`UsageError`], naming the first difference, unless the plan was made for a model of these sizes."""
        actual = ModelShape.from_config(config)
        if len(actual.layers) != len(self.source.layers):
            raise UsageError(
                f"the plan is for a model of {len(self.source.layers)} layers, this one has {len(actual.layers)}"
            )
        for index, (want, have) in enumerate(zip(self.source.layers, actual.layers, strict=True)):
            if want != have:
                raise UsageError(f"layer {index}: the plan is for {_describe(want)}, the model has {_describe(have)}")
        for field in ("hidden_size", "vocab_size", "attention_bias", "mlp_bias"):
            if getattr(self.source, field) != getattr(actual, field):
                raise UsageError(
                    f"the plan is for {field}={getattr(self.source, field)}, the model has {getattr(actual, field)}"
                )

    def for_model(self, config: PreTrainedConfig) -> PruningPlan:
        """Return the plan as it counts on this model, whose embeddings may be tied or not; raises as [`check_model`]."""
        self.check_model(config)
        return replace(self, source=replace(self.source, tie_word_embeddings=bool(config.tie_word_embeddings)))

    def compose(self, following: PruningPlan) -> PruningPlan:
        """Join this plan and `following`, made for its result, into one plan for this plan's model."""
        if following.source.layers != self.target.layers:
            raise UsageError("the second plan was not made for the model that the first one leaves")
        layers = tuple(
            LayerPlan(
                tuple(a.kv_groups[i] for i in b.kv_groups),
                tuple(a.query_heads[i] for i in b.query_heads),
                tuple(a.ffn_channels[i] for i in b.ffn_channels),
            )
            for a, b in zip(self.layers, following.layers, strict=True)
        )
        return replace(following, source=self.source, layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; unit indices as ranges such as `"0-5,7"`."""
        source = asdict(self.source)
        source["layers"] = [asdict(layer) for layer in self.source.layers]
        # asdict would copy every index
        layers = [{field.name: _ranges(getattr(layer, field.name)) for field in fields(layer)} for layer in self.layers]
        names = ("criterion", "allocation", "attention_bias", "mlp_bias")
        return {"version": VERSION, "source": source, **{n: getattr(self, n) for n in names}, "layers": layers}

    @staticmethod
    def from_dict(data: Any) -> PruningPlan:
        """Inverse of `to_dict`; raises [`UsageError`] naming what is missing or malformed."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise UsageError(f"not a pruning plan of version {VERSION} (found {found!r})")
        try:
            source = dict(data["source"])
            source["layers"] = tuple(LayerShape(**layer) for layer in source["layers"])
            layers = tuple(LayerPlan(**{n: _indices(r) for n, r in layer.items()}) for layer in data["layers"])
            rest = {key: _typed(data, key, str) for key in ("criterion", "allocation")}
            rest |= {key: _typed(data, key, bool) for key in ("attention_bias", "mlp_bias")}
            shape = ModelShape(**source)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"malformed pruning plan: {error}") from error
        _check_source(shape)
        return PruningPlan(shape, layers, **rest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON: one line per layer, so that two plans diff well."""
        write_text(path, self.to_json())

    def to_json(self) -> str:
        """Return the content of the file as text."""
        data = self.to_dict()
        rows = {"source": data["source"].pop("layers"), "layers": data.pop("layers")}
        data["source"]["layers"], data["layers"] = "@source", "@layers"
        text = json.dumps(data, indent=2)
        for key, entries in rows.items():
            indent = "      " if key == "source" else "    "
            lines = f",\n{indent}".join(json.dumps(entry) for entry in entries)
            text = text.replace(f'"@{key}"', f"[\n{indent}{lines}\n{indent[2:]}]")
        return text + "\n"

    @staticmethod
    def load(path: str | os.PathLike[str]) -> PruningPlan:
        """Read a saved plan; raises [`UsageError`] naming the file when it is absent or malformed."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read plan {path}: {error.strerror}") from error
        except json.JSONDecodeError as error:
            raise UsageError(f"{path} is not a pruning plan: {error}") from error
        try:
            return PruningPlan.from_dict(data)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error

    def hash(self) -> str:
        """sha256 of the plan's bytes, as hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """Summarise sizes before and after for reports and cards; see `to_dict` for the indices."""
        before, after = self.before, self.after
        costs = {f"{k}_{when}": v for when, c in (("before", before), ("after", after)) for k, v in asdict(c).items()}
        layers = [
            {"query_heads": s.query_heads, "kv_heads": s.kv_heads, "ffn": s.ffn, "skip": s.skip}
            for s in self.target.layers
        ]
        dense = [{"query_heads": s.query_heads, "kv_heads": s.kv_heads, "ffn": s.ffn} for s in self.source.layers]
        return {
            "ratio": self.ratio,
            "backbone_ratio": self.backbone_ratio,
            "criterion": self.criterion,
            "allocation": self.allocation,
            **costs,
            "layers": layers,
            "layers_before": dense,
            "hash": self.hash(),
        }

    def __str__(self) -> str:
        return plan_table(self)


def plan_table(plan: PruningPlan) -> str:
    """Format a plan: one row per layer, then totals before and after."""
    rows: list[tuple[str, ...]] = [("layer", "Q heads", "KV heads", "FFN", "parameters", "kept")]
    source, target = plan.source, plan.target
    for index, (old, new) in enumerate(zip(source.layers, target.layers, strict=True)):
        was = source.attention_parameters(old) + source.mlp_parameters(old)
        now = target.attention_parameters(new) + target.mlp_parameters(new)
        pairs = ((old.query_heads, new.query_heads), (old.kv_heads, new.kv_heads), (old.ffn, new.ffn))
        cells = [f"{a}" if a == b else f"{a} -> {b}" for a, b in pairs]
        rows.append((str(index), *cells, f"{now:,}", f"{now / was:.1%}" if was else "-"))
    before, after = plan.before, plan.after
    totals = [
        f"parameters        {before.parameters:,} -> {after.parameters:,}",
        f"ratio             {plan.ratio:.4%} of all parameters = {plan.backbone_ratio:.4%} of the backbone",
        f"KV cache / token  {before.kv_bytes_per_token:,} -> {after.kv_bytes_per_token:,} bytes",
        f"FLOPs / token     {before.flops_per_token:,} -> {after.flops_per_token:,}",
        f"chosen by         criterion {plan.criterion}, allocation {plan.allocation}",
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    body = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*body, "", *totals])


def _typed(data: Mapping[str, Any], key: str, kind: type) -> Any:
    if type(data[key]) is not kind:
        raise UsageError(f"malformed pruning plan: {key} must be a {kind.__name__}, got {data[key]!r}")
    return data[key]


def _check_source(source: ModelShape) -> None:
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        _typed(asdict(source), name, bool)
    _typed(asdict(source), "dtype", str)
    sizes: dict[str, Any] = {"hidden_size": source.hidden_size, "vocab_size": source.vocab_size}
    if 0 in sizes.values() or not source.layers:
        raise UsageError(f"malformed pruning plan: a model of {sizes} and {len(source.layers)} layers has no parameters")
    for index, shape in enumerate(source.layers):
        sizes |= {f"layer {index}: {name}": size for name, size in asdict(shape).items()}
    for name, size in sizes.items():
        if type(size) is not int or size < 0:
            raise UsageError(f"malformed pruning plan: {name} must be an integer of at least 0, got {size!r}")
    for index, shape in enumerate(source.layers):
        if shape.query_heads != shape.n_rep * shape.kv_heads:
            raise UsageError(f"layer {index}: {shape.query_heads} query heads cannot share {shape.kv_heads} KV heads")


def _check_layer(index: int, shape: LayerShape, layer: LayerPlan) -> None:
    limits = (("kv_groups", shape.kv_heads), ("query_heads", shape.query_heads), ("ffn_channels", shape.ffn))
    for name, limit in limits:
        units = getattr(layer, name)
        if list(units) != sorted(set(units)) or any(not 0 <= unit < limit for unit in units):
            raise UsageError(f"layer {index}: {name} must be sorted, distinct and below {limit}, got {_ranges(units)}")
    per_group = dict.fromkeys(layer.kv_groups, 0)
    for head in layer.query_heads:
        group = head // shape.n_rep
        if group not in per_group:
            raise UsageError(f"layer {index}: query head {head} is kept but its KV group {group} is not")
        per_group[group] += 1
    if len(set(per_group.values())) > 1 or 0 in per_group.values():
        raise UsageError(f"layer {index}: kept KV groups must keep equal numbers of query heads, got {per_group}")


def _describe(shape: LayerShape) -> str:
    return f"{shape.query_heads} query / {shape.kv_heads} KV heads of {shape.head_dim} and FFN {shape.ffn}"


def _ranges(units: Sequence[int]) -> str:
    """Write indices as ranges: `(0, 1, 2, 5)` -> `"0-2,5"`."""
    spans: list[list[int]] = []
    for unit in units:
        if spans and unit == spans[-1][1] + 1:
            spans[-1][1] = unit
        else:
            spans.append([unit, unit])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _indices(text: str) -> tuple[int, ...]:
    """Inverse of `_ranges`."""
    units: list[int] = []
    for span in filter(None, text.split(",")):
        first, _, last = span.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) > _MOST_UNITS:
            raise UsageError(f"malformed pruning plan: {span!r} is not an index range")
        units.extend(range(int(first), int(last or first) + 1))
    return tuple(units)
