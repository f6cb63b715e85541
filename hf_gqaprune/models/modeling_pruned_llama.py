"""Build a Llama whose layers have sizes of their own from stock Llama modules, each with the config of its layer.

Shipped with every checkpoint: imports nothing of ours but `configuration_pruned_llama`, the file beside it.
"""

import json
import os
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, cached_file

from .configuration_pruned_llama import AUTO_MAP, PrunedLlamaConfig

PLAN_FILE = "prune_plan.json"


class PrunedLlamaDecoderLayer(GradientCheckpointingLayer):
    """A Llama layer with the sizes of layer `layer_idx`; a skipped block is None and has no norm."""

    def __init__(self, config: PrunedLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        sizes = config.per_layer_config[layer_idx]
        skip = getattr(sizes, "skip", ())
        self.hidden_size = config.hidden_size
        self.self_attn = self.mlp = None
        if "attention" not in skip:
            self.self_attn = LlamaAttention(sizes, layer_idx)
            # attention reads its implementation from its config at run time, and only the shared one is updated
            self.self_attn.config = config
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if "mlp" not in skip:
            self.mlp = LlamaMLP(sizes)
            self.mlp.config = config
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        # the cache is among kwargs, under the name that the installed transformers gives it
        if self.self_attn is not None:
            attended, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs
            )
            hidden_states = hidden_states + attended
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class PrunedLlamaPreTrainedModel(LlamaPreTrainedModel):
    """Adds to Llama's base class that the pruning plan travels with the weights."""

    config: PrunedLlamaConfig
    config_class = PrunedLlamaConfig
    _no_split_modules = ["PrunedLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": PrunedLlamaDecoderLayer, "attentions": LlamaAttention}
    #: content of prune_plan.json, None for a model that was built without one
    prune_plan: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in transformers; `prune_plan` is read from the file beside the weights, if there is one."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        # with output_loading_info=True a tuple comes back
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            keys = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
            path = cached_file(
                # the base model where the folder of an adapter was named
                model.config.name_or_path,
                PLAN_FILE,
                **{key: kwargs[key] for key in keys if key in kwargs},
                # a checkpoint may have none
                _raise_exceptions_for_missing_entries=False,
            )
            if path is not None:
                with open(path, encoding="utf-8") as stream:
                    model.prune_plan = json.load(stream)
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers; ships the two model files, names every Auto class, and writes `prune_plan`."""
        # a class would add only its own entry; servers look for AutoModel whatever was saved
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        # after the weights: a plan on disk means a complete checkpoint
        if is_main_process:
            self._save_plan(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        # save_pretrained(push_to_hub=True) uploads before it comes back
        self._save_plan(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _save_plan(self, folder: str | os.PathLike[str]) -> None:
        path = os.path.join(folder, PLAN_FILE)
        if self.prune_plan is not None:
            with open(path, "w", encoding="utf-8") as stream:
                json.dump(self.prune_plan, stream, indent=2)
                stream.write("\n")
        elif os.path.exists(path):
            # it belongs to the weights that were overwritten
            os.remove(path)


class PrunedLlamaModel(PrunedLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config: PrunedLlamaConfig) -> None:
        # Llama's own __init__ would build the dense layers
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [PrunedLlamaDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # some rope types read the number of heads, which only a layer's config has; the result depends on head_dim alone
        self.rotary_emb = LlamaRotaryEmbedding(config=config.per_layer_config[0])
        self.gradient_checkpointing = False
        self.post_init()

    @wraps(LlamaModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        for cache in (*args, *kwargs.values()):
            if isinstance(cache, DynamicCache) and not cache.layers:
                # made without a config, it would take its length from layer 0, which may have no attention
                cache.layers = DynamicCache(config=self.config).layers
        return super().forward(*args, **kwargs)


class PrunedLlamaForCausalLM(PrunedLlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: PrunedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# The generic heads ask AutoModel for the backbone, which knows it only where hf_gqaprune is imported: not where this
# file came with a checkpoint. Hence an __init__ each; the heads are Llama's.


class PrunedLlamaForSequenceClassification(GenericForSequenceClassification, PrunedLlamaPreTrainedModel):
    def __init__(self, config: PrunedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PrunedLlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class PrunedLlamaForTokenClassification(GenericForTokenClassification, PrunedLlamaPreTrainedModel):
    def __init__(self, config: PrunedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PrunedLlamaModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class PrunedLlamaForQuestionAnswering(GenericForQuestionAnswering, PrunedLlamaPreTrainedModel):
    # not Llama's "transformer", with which it would not find the backbone in a causal LM's checkpoint

    def __init__(self, config: PrunedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = PrunedLlamaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "PrunedLlamaForCausalLM",
    "PrunedLlamaForQuestionAnswering",
    "PrunedLlamaForSequenceClassification",
    "PrunedLlamaForTokenClassification",
    "PrunedLlamaModel",
    "PrunedLlamaPreTrainedModel",
]

for _auto_class, _path in AUTO_MAP.items():
    if _auto_class != "AutoConfig":
        # save_pretrained then ships this file and the configuration's
        globals()[_path.rpartition(".")[2]].register_for_auto_class(_auto_class)
