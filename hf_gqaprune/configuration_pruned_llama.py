"""Configuration of a Llama whose layers have sizes of their own."""

import difflib
from collections.abc import Mapping

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

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

    Args:
        per_layer_config (`dict[int | str, dict]`, *optional*):
            `{layer: {"num_attention_heads": int, "num_key_value_heads": int, "intermediate_size": int, "skip": list}}`.
            `skip` holds `"attention"`, `"mlp"` or both; a skipped block has neither weights nor a norm.

    Raises:
        ValueError: for layers out of range, unknown keys, sizes that are not positive integers, query heads that are
            not a multiple of the KV heads, and attention skipped in every layer.
    """

    model_type = "pruned_llama"

    def __post_init__(self, **kwargs):
        layers = kwargs.get("per_layer_config")
        if layers is not None:
            _check_layers(layers, self.num_hidden_layers)
            # an attention-free first layer would make the cache report length 0: only layers of type
            # "full_attention" are asked for it
            skips = [_skip(layers, index) for index in range(self.num_hidden_layers)]
            if any("attention" in skip for skip in skips):
                kwargs["layer_types"] = ["moe" if "attention" in skip else "full_attention" for skip in skips]
        super().__post_init__(**kwargs)
        # here too, because errors of validation proper are wrapped in a class that is no ValueError
        self.validate_architecture()

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the sizes of every layer."""
        free = []
        for index, layer in enumerate(self.per_layer_config):
            skip = getattr(layer, "skip", ())
            if "attention" in skip:
                free.append(index)
            else:
                heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
                _check_size(index, "num_attention_heads", heads)
                _check_size(index, "num_key_value_heads", kv_heads)
                if heads % kv_heads:
                    raise ValueError(
                        f"layer {index}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads "
                        f"({kv_heads})"
                    )
            if "mlp" not in skip:
                _check_size(index, "intermediate_size", layer.intermediate_size)
        if len(free) == self.num_hidden_layers:
            raise ValueError(f"attention is skipped in all {len(free)} layers, which no cache can run: keep one")


def _skip(layers, index):
    entry = layers.get(index, layers.get(str(index), {}))
    return {int(k): v for k, v in layers.items()}.get(index, entry).get("skip", ())


def _check_layers(layers, num_layers):
    """Refuse a malformed `per_layer_config` before transformers reads it."""
    if not isinstance(layers, Mapping):
        raise ValueError(
            f"per_layer_config must map layer indices to sizes, got a {type(layers).__name__} of {len(layers)} entries "
            f"for {num_layers} layers"
        )
    for key, sizes in layers.items():
        text = str(key)
        if isinstance(key, bool) or not text.isdigit() or int(text) >= num_layers:
            raise ValueError(f"per_layer_config names layer {key!r}, the model has layers 0 to {num_layers - 1}")
        if not isinstance(sizes, Mapping):
            raise ValueError(f"layer {text}: per_layer_config must hold a mapping of sizes, got {sizes!r}")
        for name, value in sizes.items():
            if name == "skip":
                _check_skip(text, value)
            elif name in _SIZES:
                _check_size(text, name, value)
            else:
                raise ValueError(f"layer {text}: unknown key {name!r}{_near(name, (*_SIZES, 'skip'))}")


def _check_skip(layer, value):
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError(f"layer {layer}: skip must be a list out of {', '.join(_BLOCKS)}, got {value!r}")
    for block in value:
        if block not in _BLOCKS:
            raise ValueError(f"layer {layer}: skip names {block!r}{_near(block, _BLOCKS)}")


def _check_size(layer, name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        block = "mlp" if name == "intermediate_size" else "attention"
        raise ValueError(
            f"layer {layer}: {name} must be a positive integer, got {value!r}; to leave the block out use "
            f'"skip": ["{block}"]'
        )


def _near(name, allowed):
    near = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{hint}; allowed: {', '.join(allowed)}"


__all__ = ["PrunedLlamaConfig"]
