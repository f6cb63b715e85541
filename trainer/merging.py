"""Merge a LoRA adapter into the checkpoint it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import (
    IDENTITY_FILE,
    ModelFolder,
    fingerprint,
    read_identity,
    resolve_model,
    write_checkpoint,
    write_identity,
)
from ..errors import UsageError
from ..utils import new_folder, refuse_existing, refuse_overwriting_inputs, write_json
from .silence import silenced_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: file beside an adapter that says where its base is on this machine; never published
BASE_FILE = "local_base.json"
ADAPTER_CONFIG = "adapter_config.json"
#: folder of the adapter in a recovered checkpoint
ADAPTER = "adapter"


def merge(adapter: str | Path, output: str | Path, *, base: str | Path | None = None, overwrite: bool = False) -> Path:
    """Merge a LoRA adapter into the checkpoint it was trained on.

    The sum is computed in float32 and stored in the dtype of the base. Tokenizer, generation config, plan, recipe and
    licence files of the base are copied.

    Args:
        adapter: folder written by `recover`.
        output: folder of the new checkpoint.
        base: folder or Hub id of the base, if it has moved since the adapter was trained.
        overwrite: replace `output`.

    Returns:
        `output`.

    Raises:
        UsageError: there is no adapter or no base, the base has other weights than those the adapter was trained on, or
            `output` exists or contains adapter or base.
    """
    target = refuse_existing(output, overwrite)
    adapter = Path(adapter)
    model = base_of(adapter, base)
    refuse_overwriting_inputs(target, [adapter, model])
    with silenced_libraries(), new_folder(target, overwrite) as scratch:
        write_checkpoint(merged(adapter, model), model.path, scratch)
    return target


def base_of(adapter: Path, base: str | Path | None = None) -> ModelFolder:
    """Return the checkpoint that `adapter` was trained on; raise [`UsageError`] as `merge` does."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        inner = adapter / ADAPTER
        wanted = str(inner) if (inner / ADAPTER_CONFIG).is_file() else f"a folder with {ADAPTER_CONFIG}"
        raise UsageError(f"no adapter in {adapter}: give {wanted}")
    known = read_identity(adapter)
    if known is None:
        raise UsageError(f"{adapter} has no {IDENTITY_FILE}, which names the weights it was trained on: train it again")
    if base is None:
        base = _recorded_base(adapter)
    model = resolve_model(base)
    found = fingerprint(model)
    if found != known.get("base_fingerprint"):
        raise UsageError(
            f"{adapter} was trained on weights {known.get('base_fingerprint')}, {model} holds {found}: "
            "pass the checkpoint it was trained on as --base"
        )
    return model


def merged(adapter: Path, base: ModelFolder) -> PreTrainedModel:
    """Load `base`, add the weights of `adapter` in float32, and cast to the dtype on disk."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = PeftModel.from_pretrained(base.load(base.dtype), adapter)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # one matrix in float32 at a time: all of them may exceed the memory
            weight = module.get_base_layer().weight
            weight.data = weight.data.float()
            module.merge(safe_merge=True)
            weight.data = weight.data.to(base.dtype)
    return model.unload()


def write_adapter_identity(adapter: Path, base: str | Path, folder: Path, base_fingerprint: str) -> None:
    """Record beside an adapter which weights it was trained on (those in `folder`) and where to find them (`base`)."""
    plan = (read_identity(folder) or {}).get("plan_hash")
    write_identity(adapter, base_fingerprint=base_fingerprint, plan_hash=plan)
    local = Path(base).exists()
    record_base(adapter, str(folder.resolve()) if local else str(base))
    # peft wrote the local path of the base
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    write_json(adapter / ADAPTER_CONFIG, {**config, "base_model_name_or_path": None if local else str(base)})


def record_base(adapter: Path, base: str) -> None:
    """Record beside an adapter where its base is: an absolute path or a Hub id."""
    write_json(adapter / BASE_FILE, {"base": base})


def _recorded_base(adapter: Path) -> str:
    path = adapter / BASE_FILE
    if not path.is_file():
        raise UsageError(f"{adapter} does not say where its base is: pass --base")
    base = str(json.loads(path.read_text(encoding="utf-8"))["base"])
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UsageError(f"the base of {adapter} is no longer in {base}: pass --base")
    return str(base)
