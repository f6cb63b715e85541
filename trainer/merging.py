"""An adapter and its base go in; one checkpoint with the adapter's weights folded in comes out."""

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
from .quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: beside an adapter: where its base lies on this machine; never published
BASE_FILE = "local_base.json"
ADAPTER_CONFIG = "adapter_config.json"
#: in a recovered checkpoint: the adapter, which `merge` folds in again
ADAPTER = "adapter"


def merge(adapter: str | Path, output: str | Path, *, base: str | Path | None = None, overwrite: bool = False) -> Path:
    """Fold a LoRA adapter into the checkpoint it was trained on.

    The sum is computed in float32 and stored in the dtype of the base, whose tokenizer, generation config, plan,
    recipe and licence files come along.

    Args:
        adapter: folder written by `recover`.
        output: folder of the new checkpoint.
        base: folder or Hub id of the base, where it is no longer where the adapter was trained.
        overwrite: replace `output`.

    Returns:
        `output`.

    Raises:
        UsageError: no adapter there, no base, a base with other weights than the adapter was trained on, or an
            `output` that exists, or holds adapter or base.
    """
    target = refuse_existing(output, overwrite)
    adapter = Path(adapter)
    folder = base_of(adapter, base)
    refuse_overwriting_inputs(target, [adapter, folder])
    with quiet(), new_folder(target, overwrite) as scratch:
        write_checkpoint(merged(adapter, folder), folder, scratch)
    return target


def base_of(adapter: Path, base: str | Path | None = None) -> ModelFolder:
    """Folder of the checkpoint that `adapter` was trained on. Raises [`UsageError`] as `merge`."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        inner = adapter / ADAPTER
        wanted = str(inner) if (inner / ADAPTER_CONFIG).is_file() else f"a folder with {ADAPTER_CONFIG}"
        raise UsageError(f"no adapter in {adapter}: give {wanted}")
    known = read_identity(adapter)
    if known is None:
        raise UsageError(f"{adapter} has no {IDENTITY_FILE}, which says what weights it was trained on")
    if base is None:
        base = _recorded_base(adapter)
    folder = resolve_model(base)
    found = fingerprint(folder)
    if found != known.get("base_fingerprint"):
        raise UsageError(
            f"{adapter} was trained on weights {known.get('base_fingerprint')}, {folder} holds {found}: "
            "name the checkpoint it was trained on"
        )
    return folder


def merged(adapter: Path, folder: ModelFolder) -> PreTrainedModel:
    """The model in `folder` with the weights of `adapter` added in float32, cast to the dtype `folder` has on disk."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    dtype = folder.dtype
    model = PeftModel.from_pretrained(folder.load(dtype), adapter)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # one matrix in float32 at a time, where all of them may be more than there is memory
            weight = module.get_base_layer().weight
            weight.data = weight.data.float()
            module.merge(safe_merge=True)
            weight.data = weight.data.to(dtype)
    return model.unload()


def write_adapter_identity(adapter: Path, base: str | Path, folder: ModelFolder, base_fingerprint: str) -> None:
    """Write beside an adapter what weights it was trained on (`folder`), and where they are found (`base`)."""
    plan = (read_identity(folder) or {}).get("plan_hash")
    write_identity(adapter, base_fingerprint=base_fingerprint, plan_hash=plan)
    local = Path(base).exists()
    write_json(adapter / BASE_FILE, {"base": str(folder.path.resolve()) if local else str(base)})
    # peft wrote where the base lay
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    write_json(adapter / ADAPTER_CONFIG, {**config, "base_model_name_or_path": None if local else str(base)})


def _recorded_base(adapter: Path) -> str:
    path = adapter / BASE_FILE
    if not path.is_file():
        raise UsageError(f"{adapter} does not say where its base is: name it with --base")
    base = json.loads(path.read_text(encoding="utf-8"))["base"]
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UsageError(f"the base of {adapter} is no longer in {base}: name it with --base")
    return str(base)
