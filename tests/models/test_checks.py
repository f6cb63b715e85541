"""What the checks and contexts of `models.checks` leave behind."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_gqaprune.models.checks import eval_without_grad


def test_modes_and_gradients_come_back_module_by_module(llama: PreTrainedModel) -> None:
    llama.train()
    llama.model.layers[0].eval()
    llama.model.embed_tokens.weight.requires_grad_(False)
    modes = {name: module.training for name, module in llama.named_modules()}
    with eval_without_grad(llama):
        assert not any(module.training for module in llama.modules())
        assert not any(parameter.requires_grad for parameter in llama.parameters())
    assert {name: module.training for name, module in llama.named_modules()} == modes
    assert [name for name, p in llama.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
