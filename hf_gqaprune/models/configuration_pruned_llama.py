"""Configure a Llama whose layers have sizes of their own.

Shipped with every checkpoint: imports nothing of ours.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig

#: Auto class -> `file.Class`, as config.json says it
AUTO_MAP = {
    "AutoConfig": "configuration_pruned_llama.PrunedLlamaConfig",
    "AutoModel": "modeling_pruned_llama.PrunedLlamaModel",
    "AutoModelForCausalLM": "modeling_pruned_llama.PrunedLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_pruned_llama.PrunedLlamaForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_pruned_llama.PrunedLlamaForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_pruned_llama.PrunedLlamaForQuestionAnswering",
}
_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
_BLOCKS = ("attention", "mlp")


@strict
class PrunedLlamaConfig(LlamaConfig):
    r"""
    A [`LlamaConfig`] whose layers may differ in heads and FFN width, and may lack attention, FFN or both.

    Global values are those of the dense model; `per_layer_config` lists, sparsely, the layers that differ:

    ```python
    PrunedLlamaConfig(
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        per_layer_config={
            "3": {"num_attention_heads": 24, "num_key_value_heads": 6, "intermediate_size": 11520},
            "30": {"skip": ["attention"]},
        },
    )
    ```

    Read as an attribute, `per_layer_config[i]` is the complete config of layer `i`. `layer_types` follows from it and
    is never given. Every query head of a layer belongs to a KV group of `num_attention_heads / num_key_value_heads`.

    Args:
        per_layer_config (`dict[int | str, dict]`, *optional*):
            `{layer: {"num_attention_heads": int, "num_key_value_heads": int, "intermediate_size": int, "skip": list}}`.
            `skip` holds `"attention"`, `"mlp"` or both; a skipped block has neither weights nor a norm.

    Raises:
        ValueError: for layers out of range or named twice, unknown keys, sizes that are not positive integers, query
            heads that are not a multiple of the KV heads, attention skipped in every layer, `layer_types` that say
            something else, and a `hidden_size` that the heads do not divide where `head_dim` is not given.
    """

    model_type = "pruned_llama"

    # the one that @dataclass adds reads every field, and reading a per-layer field from the global config raises
    __eq__ = PreTrainedConfig.__eq__

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            _check_size("the model", name, getattr(self, name))
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): set head_dim"
            )
        layer_types = kwargs.pop("layer_types", None)
        super().__post_init__(**kwargs)
        # here too, because errors of validation proper are wrapped in a class that is no ValueError
        self.validate_architecture()
        if layer_types is not None:
            _check_layer_types(layer_types, self._derived_layer_types())

    @property
    def per_layer_config(self) -> Sequence["PrunedLlamaConfig"]:
        """The complete config of each layer; assigning a sparse dict of the layers that differ checks it."""
        layers: Sequence[PrunedLlamaConfig] = super().per_layer_config
        return layers

    @per_layer_config.setter
    def per_layer_config(self, layers: Mapping[int | str, Mapping[str, Any]] | None) -> None:
        checked = None if layers is None else _checked_layers(layers, self.num_hidden_layers)
        LlamaConfig.per_layer_config.fset(self, checked)
        # caches take their length from the first layer of type "full_attention"; without types it is layer 0's, which
        # stays 0 where that layer has no attention
        self.__dict__.pop("layer_types", None)
        layer_types = self._derived_layer_types()
        if "moe" in layer_types:
            self.layer_types = layer_types
        self.validate_architecture()

    def _derived_layer_types(self) -> list[str]:
        # "moe" is transformers' name for a layer without attention
        return ["moe" if "attention" in _skip(layer) else "full_attention" for layer in self.per_layer_config]

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: the sizes of every layer."""
        without_attention = 0
        for index, layer in enumerate(self.per_layer_config):
            where, skip = f"layer {index}", _skip(layer)
            if "attention" in skip:
                without_attention += 1
            else:
                heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
                _check_size(where, "num_attention_heads", heads)
                _check_size(where, "num_key_value_heads", kv_heads)
                if heads % kv_heads:
                    raise ValueError(
                        f"{where}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
                    )
            if "mlp" not in skip:
                _check_size(where, "intermediate_size", layer.intermediate_size)
        if without_attention == self.num_hidden_layers:
            raise ValueError(f"attention is skipped in all {without_attention} layers, which no cache can run: keep one")

    def validate_rope(self) -> None:
        """Part of `@strict`-powered validation: the rope parameters, which no layer has of its own."""
        # transformers computes a fallback for head_dim from the heads even where head_dim is set
        LlamaConfig.validate_rope(self.per_layer_config[0])


def _skip(layer: PrunedLlamaConfig) -> Sequence[str]:
    return getattr(layer, "skip", ())


def _checked_layers(layers: Any, num_layers: int) -> dict[int, dict[str, Any]]:
    """Return `layers` with integer keys; raise a ValueError that says what is wrong before transformers reads them."""
    if not isinstance(layers, Mapping):
        size = f" of {len(layers)} entries" if hasattr(layers, "__len__") else ""
        raise ValueError(
            f"per_layer_config must map layer indices to sizes, got a {type(layers).__name__}{size} for {num_layers} layers"
        )
    checked: dict[int, dict[str, Any]] = {}
    for key, sizes in layers.items():
        index = _checked_index(key, num_layers)
        if index in checked:
            raise ValueError(f"per_layer_config names layer {index} twice, the second time as {key!r}")
        if not isinstance(sizes, Mapping):
            raise ValueError(f"layer {index}: per_layer_config must hold a mapping of sizes, got {sizes!r}")
        for name, value in sizes.items():
            if name == "skip":
                _check_skip(index, value)
            elif name in _SIZES:
                _check_size(f"layer {index}", name, value)
            else:
                raise ValueError(f"layer {index}: unknown key {name!r}{_near(name, (*_SIZES, 'skip'))}")
        checked[index] = dict(sizes)
    return checked


def _checked_index(key: Any, num_layers: int) -> int:
    # transformers pads keys with zeros ("03"), so that they sort
    text = str(key)
    if isinstance(key, bool) or not (text.isascii() and text.isdigit()) or int(text) >= num_layers:
        raise ValueError(f"per_layer_config names layer {key!r}, the model has layers 0 to {num_layers - 1}")
    return int(text)


def _check_skip(index: int, value: Any) -> None:
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError(f"layer {index}: skip must be a list out of {', '.join(_BLOCKS)}, got {value!r}")
    for block in value:
        if block not in _BLOCKS:
            raise ValueError(f"layer {index}: skip names {block!r}{_near(block, _BLOCKS)}")


def _check_size(where: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        block = "mlp" if name == "intermediate_size" else "attention"
        hint = f'; to leave the block out use "skip": ["{block}"]' if where.startswith("layer") else ""
        raise ValueError(f"{where}: {name} must be a positive integer, got {value!r}{hint}")


def _check_layer_types(given: Any, derived: Sequence[str]) -> None:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"layer_types follows from per_layer_config, got {given!r}: leave it out")
    given = list(given)
    if len(given) != len(derived):
        raise ValueError(f"layer_types has {len(given)} entries for {len(derived)} layers: leave it out")
    for index, (named, actual) in enumerate(zip(given, derived, strict=True)):
        if named != actual:
            raise ValueError(
                f"layer {index}: layer_types says {named!r}, per_layer_config makes it {actual!r}: leave layer_types out"
            )


def _near(name: Any, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{hint}; allowed: {', '.join(allowed)}"


__all__ = ["PrunedLlamaConfig"]

# save_pretrained then ships this file
PrunedLlamaConfig.register_for_auto_class()
