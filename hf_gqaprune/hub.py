"""Verify a checkpoint folder and push it to the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS

from .checkpoint import CARRIED_FILES
from .errors import UsageError, WorkError, first_line, on_one_line
from .model_cards import (
    UNKNOWN,
    card_metadata,
    head,
    license_of_text,
    llama_terms,
    loads_from,
    names_repository,
    renaming_command,
)
from .models import LayerShape, layer_shapes
from .plan import PruningPlan

#: files that are sent besides the weights and the code that `auto_map` names
_SENT = (*CARRIED_FILES, "config.json", "prune_plan.json", "gqaprune.json", "report.json", "README.md", "*.png")
#: every tokenizer has one of these files
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
#: files that might contain a local path
_CHECKED_FOR_PATHS = ("config.json", "tokenizer_config.json", "gqaprune.json", "report.json", "recipe.yaml")
#: weights of an earlier push that `from_pretrained` would still find
_REMOTE_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
#: names that `utils.files` and download tools give to unfinished files
_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}|.+\.(incomplete|tmp|part|lock)")
_LLAMA_NAME = re.compile(r"(?<![a-z])llama[-_.]?[234]", re.IGNORECASE)


@dataclass(frozen=True)
class Bundle:
    """Files that a push sends.

    Attributes:
        files: `(path in the repository, bytes)`, sorted by path.
        left_out: names of the folder's other entries, which are not sent.
    """

    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]

    @property
    def size(self) -> int:
        """Total size in bytes."""
        return sum(size for _, size in self.files)

    def __str__(self) -> str:
        width = len(f"{self.size:,}")
        lines = [f"  {size:>{width},}  {name}" for name, size in self.files]
        lines.append(f"  {self.size:>{width},}  bytes in {len(self.files)} files")
        return "\n".join(lines + ([f"left out: {', '.join(self.left_out)}"] if self.left_out else []))


def bundle(folder: str | os.PathLike[str]) -> Bundle:
    """List the files of `folder` that make up the checkpoint: weights, config, code, tokenizer, plan, report, card, licence.

    Everything else is left out: optimizer states, training checkpoints, adapters, the base model's local path.

    Raises:
        UsageError: there is no config.
    """
    folder = Path(folder)
    names = {path.relative_to(folder).as_posix() for pattern in _SENT for path in folder.glob(pattern)}
    names |= {WEIGHTS, INDEX, *_shards(folder), *_code_files(folder)}
    # an index may name any path; only files inside the folder are sent
    inside = (name for name in names if ".." not in (path := PurePosixPath(name)).parts and not path.is_absolute())
    files = sorted((name, (folder / name).stat().st_size) for name in inside if (folder / name).is_file())
    kept = {name.partition("/")[0] for name, _ in files}
    left_out = (f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name not in kept)
    return Bundle(tuple(files), tuple(sorted(left_out)))


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """List problems that would keep the checkpoint in `folder` from loading, or from matching its plan; `[]` for none.

    The weights must hold exactly the tensors of the model that `config.json` describes, in their shapes: the model is built
    on the meta device, and only the headers of the weights are read. If a card of our template loads a tokenizer, there must
    be one.
    """
    folder = Path(folder)
    try:
        config = _read_config(folder)
    except UsageError as error:
        return [str(error)]
    unfinished = sorted(path.name for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name))
    problems = [f"{name} is left from an unfinished write" for name in unfinished]
    missing = [name for name in _auto_map(config) if not (folder / name).is_file()]
    problems += [f"auto_map names {name}, which is missing" for name in missing]
    if _loads_from(folder) and not any((folder / name).is_file() for name in _TOKENIZERS):
        problems.append("README.md loads a tokenizer, but there is none: save it beside the weights")
    stored, damaged = _stored_shapes(folder)
    problems += damaged
    return problems or _model_problems(folder, config, stored)


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Verify the checkpoint in `folder` and send its [`bundle`] to the Hub in one commit.

    Weights of an earlier push that the new checkpoint does not have are deleted in the same commit.

    Args:
        repo_id: `ORG/NAME` or `NAME`, created if it does not exist.
        private: create a private repository; refused if the repository exists and is public.
        dry_run: contact no server and send nothing.
        token: None: the token of `hf auth login` or `HF_TOKEN`.
        revision: branch, created if it does not exist; None: main.

    Returns:
        The address of the repository; with `dry_run` the list of files and bytes that would be sent.

    Raises:
        UsageError: the folder does not exist, is not a complete checkpoint, has no card, has a card of our template that
            loads from another id or has a file with a local path, the id is invalid, the terms of a Llama licence are not
            met, or there is no token with write access.
        WorkError: the Hub could not be reached or failed; nothing was published.
    """
    folder = Path(folder)
    _check_request(folder, repo_id)
    sent = bundle(folder)
    if dry_run:
        return f"would send {folder} to {repo_id}{' (private)' if private else ''}:\n{sent}"

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    token = token or get_token()
    if token is None:
        raise UsageError("no Hub token: run `hf auth login` or set HF_TOKEN")
    api = HfApi(token=token, library_name="hf_gqaprune")
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(address.repo_id).private:
            raise UsageError(f"{address.repo_id} exists and is public: make it private, or push without --private")
        if revision is not None:
            api.create_branch(address.repo_id, branch=revision, exist_ok=True)
        names = {name for name, _ in sent.files}
        remote = api.list_repo_files(address.repo_id, revision=revision)
        stale = [name for name in remote if name not in names and any(fnmatch(name, p) for p in _REMOTE_WEIGHTS)]
        # not `upload_folder`, which commits a large folder in several parts
        api.create_commit(
            address.repo_id,
            [*(CommitOperationAdd(name, folder / name) for name, _ in sent.files), *map(CommitOperationDelete, stale)],
            commit_message=commit_message or f"Upload {folder.resolve().name}",
            revision=revision,
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UsageError(f"the token has no write access to {repo_id}: use one that has (`hf auth login`)") from error
        raise _interrupted(folder, repo_id, private, error) from error
    except (HTTPError, OSError) as error:
        raise _interrupted(folder, repo_id, private, error) from error
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the Hub refuses README.md: {error}") from error
    return f"{address}/tree/{revision}" if revision else str(address)


def _interrupted(folder: Path, repo_id: str, private: bool, error: Exception) -> WorkError:
    reason = first_line(error)
    return WorkError(
        f"push to {repo_id} failed ({reason}); nothing was published: run `gqaprune push {folder} {repo_id}"
        f"{' --private' if private else ''}` again, uploaded files are not sent twice"
    )


# --- checks before anything is sent


def _check_request(folder: Path, repo_id: str) -> None:
    """Raise [`UsageError`] unless `folder` may be published as `repo_id`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not folder.is_dir():
        raise UsageError(f"no folder {folder}: give a checkpoint")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is not a repository id: write ORG/NAME ({error})") from None
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is not a checkpoint: it has no config.json")
    _check_license(folder, repo_id)
    if problems := verify(folder):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(f"{folder} is not a complete checkpoint: {problems[0]}{more}")
    for name in _CHECKED_FOR_PATHS:
        if (folder / name).is_file():
            read = yaml.safe_load if name.endswith(".yaml") else json.loads
            for key, value in _strings(read((folder / name).read_text(encoding="utf-8"))):
                if _is_local_path(value):
                    raise UsageError(f"{folder / name} holds the local path {value!r} ({key}): remove it first")
    loaded = _loads_from(folder)
    if loaded is not None and not names_repository(loaded, repo_id):
        command = renaming_command(folder, card_metadata(folder), repo_id)
        raise UsageError(f"{folder / 'README.md'} loads the model from {loaded!r}, not from {repo_id}: run `{command}`")


def _loads_from(folder: Path) -> str | None:
    """Return the id that the card in `folder` loads from, None for a card that is not of our template."""
    card = folder / "README.md"
    return loads_from(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None


def _check_license(folder: Path, repo_id: str) -> None:
    """Raise [`UsageError`] unless there is a card and it meets the terms of a Llama licence."""
    if not (folder / "README.md").is_file():
        raise UsageError(f"{folder} has no README.md: write it with `gqaprune card {folder} --base-model ID`")
    metadata = card_metadata(folder)
    if metadata.get("license", UNKNOWN) == UNKNOWN:
        metadata["license"] = license_of_text(folder) or UNKNOWN
        bases = metadata.get("base_model") or folder.resolve().name
        if metadata["license"] == UNKNOWN and _LLAMA_NAME.search(str(bases)):
            raise UsageError(f"the licence of {bases} is not known: pass it to `gqaprune card --license`")
    terms = llama_terms(metadata)
    if terms is None:
        return
    objection = terms.objection(repo_id)
    violations = [objection] if objection else []
    missing = [f for f in ("LICENSE", "USE_POLICY", "NOTICE") if not any(p.is_file() for p in folder.glob(f"{f}*"))]
    if missing:
        violations.append(f"{folder} needs {', '.join(missing)} (from the base model; `gqaprune card` writes NOTICE)")
    if violations:
        raise UsageError(f"{terms.title}: {'; '.join(violations)}")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield `(dotted key, string)` for every string in nested mappings and lists."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)


def _is_local_path(text: str) -> bool:
    if text.startswith("~/") or PureWindowsPath(text).is_absolute():
        return "\n" not in text
    # a single component, such as "/b", could be a token
    return text.startswith("/") and len(PurePosixPath(text).parts) > 2 and "\n" not in text


# --- contents of the folder


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no config.json") from None
    except ValueError as error:
        raise UsageError(f"config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UsageError("config.json is not a JSON object")
    return config


def _shards(folder: Path) -> dict[str, list[str]]:
    """Map each shard to the tensors that the index places in it; empty without an index."""
    if not (folder / INDEX).is_file():
        return {}
    try:
        weight_map = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        return {}
    shards: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        shards.setdefault(str(file), []).append(tensor)
    return shards


def _stored_shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the shape of every stored tensor, from the headers, and the problems of the files."""
    from safetensors import SafetensorError, safe_open

    single, shards = (folder / WEIGHTS).is_file(), _shards(folder)
    if single and (folder / INDEX).exists():
        return {}, [f"both {WEIGHTS} and {INDEX} exist: one is left from another checkpoint"]
    if not single and not shards:
        if (folder / INDEX).exists():
            return {}, [f"{INDEX} holds no weight_map"]
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            return {}, ["the weights are pickles: save them as safetensors"]
        return {}, [f"no weights: neither {WEIGHTS} nor {INDEX}"]
    shapes: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    for file, tensors in sorted((shards or {WEIGHTS: []}).items()):
        if not (folder / file).is_file():
            problems.append(f"{INDEX} names {file}, which is missing")
            continue
        try:
            with safe_open(folder / file, framework="pt") as header:
                found = {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}
        except (SafetensorError, OSError) as error:
            problems.append(f"{file} is damaged: {error}")
            continue
        problems += [f"{INDEX} places {name} in {file}, which lacks it" for name in sorted(set(tensors) - found.keys())]
        shapes |= found
    return shapes, problems


def _auto_map(config: Mapping[str, Any]) -> list[str]:
    """List the code files that `auto_map` names in this folder (classes in other repositories have `--` in their name)."""
    references = (config.get("auto_map") or {}).values()
    return sorted({f"{reference.partition('.')[0]}.py" for reference in references if "--" not in reference})


def _code_files(folder: Path) -> set[str]:
    """Return the code files that `auto_map` names and the files they import from the folder."""
    from transformers.dynamic_module_utils import get_relative_import_files

    files = {folder / name for name in _auto_map(_read_config(folder))}
    files |= {Path(path) for file in sorted(files) if file.is_file() for path in get_relative_import_files(file)}
    return {path.relative_to(folder).as_posix() for path in files}


def _model_problems(folder: Path, config_data: Mapping[str, Any], stored: dict[str, tuple[int, ...]]) -> list[str]:
    """List how the stored tensors differ from the model of the config, and the config from the plan."""
    import torch
    import transformers

    import hf_gqaprune  # noqa: F401  registers the architecture

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            auto_class = getattr(transformers, head(config_data)[1])
            model = auto_class.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises, the cause is this config
        return [f"config.json does not describe a model: {on_one_line(error)}"]
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = expected.keys() - stored.keys() - model.all_tied_weights_keys.keys()
    problems = [f"the weights lack {name}" for name in sorted(missing)]
    problems += [f"the weights contain {name}, which the model does not have" for name in sorted(stored.keys() - expected)]
    problems += [
        f"{name} has shape {stored[name]}, in the model of config.json {expected[name]}"
        for name in sorted(stored.keys() & expected.keys())
        if stored[name] != expected[name]
    ]
    return problems + _plan_problems(folder, config)


def _plan_problems(folder: Path, config: Any) -> list[str]:
    """List layers whose sizes in the config differ from those in the plan."""
    if not (folder / "prune_plan.json").is_file():
        return ["no prune_plan.json"] if config.model_type == "pruned_llama" else []
    try:
        planned = PruningPlan.load(folder / "prune_plan.json").target.layers
    except UsageError as error:
        return [str(error)]
    actual = layer_shapes(config)
    if len(planned) != len(actual):
        return [f"prune_plan.json has {len(planned)} layers, config.json has {len(actual)}"]

    def sizes(shape: LayerShape) -> str:
        return f"{shape.query_heads} query heads, {shape.kv_heads} KV heads and FFN {shape.ffn}"

    return [
        f"layer {index}: prune_plan.json leaves {sizes(want)}; config.json has {sizes(have)}"
        for index, (want, have) in enumerate(zip(planned, actual, strict=True))
        if want != have
    ]
