"""Choose dtype, quantization and LoRA target modules for training a model."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint import ModelFolder
from ..configuration import RecoveryConfig
from ..errors import UsageError, unknown
from ..utils import compute_dtype, select_device

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

#: number of parameters from which activations are recomputed instead of kept
_LARGE = 1_000_000_000


def training_dtype(model: ModelFolder, config: RecoveryConfig) -> torch.dtype:
    """Return the dtype of the weights during training.

    Full training needs float32: an update is smaller than the resolution of a half-precision weight. A frozen base keeps
    its dtype, except for float16, whose activations overflow without loss scaling.
    """
    return torch.float32 if config.method == "full" else computable_dtype(model)


def computable_dtype(model: ModelFolder) -> torch.dtype:
    """Return the dtype to compute in: as stored, float32 for float16 and where that is faster."""
    dtype = compute_dtype(model.dtype, select_device(None))
    return torch.float32 if dtype == torch.float16 else dtype


def autocast_bf16() -> bool:
    """Return whether the accelerator computes in bfloat16; a CPU stays in float32, which is faster there."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def quantization(config: RecoveryConfig) -> Any:
    """Return the `BitsAndBytesConfig` for `quantize`, None without it; [`UsageError`] if bitsandbytes is missing."""
    if config.quantize is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("quantize=4bit needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_trackers(config: RecoveryConfig) -> None:
    """Raise [`UsageError`] for a tracker in `report_to` that is unknown to transformers or not installed."""
    if not config.report_to:
        return
    from transformers.integrations import integration_utils

    for name in config.report_to:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            raise unknown("tracker in report_to:", name, integration_utils.INTEGRATION_TO_CALLBACK)
        if name not in integration_utils.get_available_reporting_integrations():
            raise UsageError(f"report_to={name} needs {name}: pip install {name}")


def lora_targets(model: PreTrainedModel) -> list[str]:
    """List the linear modules of the decoder layers by their names within a layer: `["mlp.down_proj", ...]`, sorted.

    Raises:
        UsageError: the layers have no linear module.
    """
    layers = model.get_decoder().layers
    names = {name for layer in layers for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    if not names:
        raise UsageError(f"{type(model).__name__} has no linear module in its decoder layers for LoRA to adapt")
    return sorted(names)


def lora_config(model: PreTrainedModel, config: RecoveryConfig) -> LoraConfig:
    """Return peft's configuration for `model`."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=lora_targets(model),
    )


def recompute_activations(model: PreTrainedModel, config: RecoveryConfig) -> bool:
    """Return whether to recompute activations, which takes more time and less memory."""
    if config.activation_checkpointing is not None:
        return config.activation_checkpointing
    return bool(model.num_parameters() >= _LARGE)
