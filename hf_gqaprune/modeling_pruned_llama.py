"""Llama whose layers have sizes of their own: stock Llama modules, each built from the config of its layer."""

import json
import os

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
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

from .configuration_pruned_llama import PrunedLlamaConfig

PLAN_FILE = "prune_plan.json"
AUTO_MAP = {
    "AutoConfig": "configuration_pruned_llama.PrunedLlamaConfig",
    "AutoModel": "modeling_pruned_llama.PrunedLlamaModel",
    "AutoModelForCausalLM": "modeling_pruned_llama.PrunedLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_pruned_llama.PrunedLlamaForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_pruned_llama.PrunedLlamaForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_pruned_llama.PrunedLlamaForQuestionAnswering",
}


class PrunedLlamaDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: PrunedLlamaConfig, layer_idx: int):
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
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        if self.self_attn is not None:
            residual = hidden_states
            hidden_states, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            hidden_states = residual + hidden_states
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
    prune_plan = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if pretrained_model_name_or_path is None:
            return loaded
        # with output_loading_info=True a tuple comes back
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        where = {k: kwargs[k] for k in ("cache_dir", "revision", "subfolder", "token", "local_files_only") if k in kwargs}
        path = cached_file(
            pretrained_model_name_or_path, PLAN_FILE, _raise_exceptions_for_missing_entries=False, **where
        )
        if path is not None:
            with open(path, encoding="utf-8") as stream:
                model.prune_plan = json.load(stream)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        # each class alone would add only its own entry; servers look for AutoModel whatever was saved
        self.config.auto_map = dict(AUTO_MAP)
        # a plan on disk means a complete checkpoint: it is written after the weights
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.prune_plan is not None and kwargs.get("is_main_process", True):
            with open(os.path.join(save_directory, PLAN_FILE), "w", encoding="utf-8") as stream:
                json.dump(self.prune_plan, stream, indent=2)
                stream.write("\n")


class PrunedLlamaModel(PrunedLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config: PrunedLlamaConfig):
        # Llama's own __init__ would build the dense layers
        PrunedLlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [PrunedLlamaDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PrunedLlamaForCausalLM(PrunedLlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: PrunedLlamaConfig):
        PrunedLlamaPreTrainedModel.__init__(self, config)
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class PrunedLlamaForSequenceClassification(GenericForSequenceClassification, PrunedLlamaPreTrainedModel): ...


class PrunedLlamaForTokenClassification(GenericForTokenClassification, PrunedLlamaPreTrainedModel): ...


class PrunedLlamaForQuestionAnswering(GenericForQuestionAnswering, PrunedLlamaPreTrainedModel):
    base_model_prefix = "transformer"  # as in Llama


__all__ = [
    "PrunedLlamaForCausalLM",
    "PrunedLlamaForQuestionAnswering",
    "PrunedLlamaForSequenceClassification",
    "PrunedLlamaForTokenClassification",
    "PrunedLlamaModel",
    "PrunedLlamaPreTrainedModel",
]


def register():
    """Make the Auto classes know these classes, and `save_pretrained` ship this file and the configuration's."""
    import transformers

    PrunedLlamaConfig.register_for_auto_class()
    transformers.AutoConfig.register(PrunedLlamaConfig.model_type, PrunedLlamaConfig)
    for auto_name, path in AUTO_MAP.items():
        if auto_name != "AutoConfig":
            model_class = globals()[path.rpartition(".")[2]]
            model_class.register_for_auto_class(auto_name)
            getattr(transformers, auto_name).register(PrunedLlamaConfig, model_class)
