"""Losses: the divergence by hand, its lower bound, and gradients computed a slice of the logits at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.costs import full_divergence
from support.tiny import token_ids

from hf_gqaprune.models import loss_gradient, top_kl_divergence, top_log_probs


def test_the_divergence_by_hand() -> None:
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    student = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log()
    # kept: 0.5 against 0.25; the other three together: 0.5 against 0.75
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(top_kl_divergence(student, top_log_probs(teacher, 1))) == pytest.approx(expected, rel=1e-6)


@given(st.integers(2, 40), st.integers(1, 60), st.floats(0.5, 4.0), st.integers(0, 1000))
def test_the_divergence_is_a_lower_bound_and_exact_when_all_is_kept(
    vocabulary: int, k: int, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(5, vocabulary, generator=generator) * 4 for _ in range(2))
    full = full_divergence(student, teacher, temperature)
    found = top_kl_divergence(student, top_log_probs(teacher, k, temperature), temperature)
    assert (found >= -1e-4).all() and (found <= full + 1e-4).all()
    if k >= vocabulary:
        torch.testing.assert_close(found, full, atol=1e-4, rtol=1e-4)
    itself = top_kl_divergence(teacher, top_log_probs(teacher, k, temperature), temperature)
    torch.testing.assert_close(itself, torch.zeros(5), atol=1e-4, rtol=0)


def test_the_gradient_is_that_of_the_full_divergence_when_all_is_kept() -> None:
    student = torch.randn(7, 30, requires_grad=True)
    teacher = torch.randn(7, 30)
    (ours,) = torch.autograd.grad(top_kl_divergence(student, top_log_probs(teacher, 30, 2.0), 2.0).sum(), student)
    (full,) = torch.autograd.grad(full_divergence(student, teacher, 2.0).sum(), student)
    torch.testing.assert_close(ours, full)
    (cut,) = torch.autograd.grad(top_kl_divergence(student, top_log_probs(teacher, 3), 1.0).sum(), student)
    assert cut.isfinite().all()


def test_a_teacher_that_is_certain_gives_finite_gradients() -> None:
    student = torch.randn(2, 9, requires_grad=True)
    teacher = torch.zeros(2, 9)
    teacher[:, 4] = 1e4
    loss = top_kl_divergence(student, top_log_probs(teacher, 2)).sum()
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_the_loss_gradient_does_not_depend_on_the_slices_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(3, 12)
    hidden = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    head = torch.nn.Linear(5, 48, bias=False)
    loss = torch.nn.functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(loss, hidden)
    assert torch.allclose(loss_gradient(hidden, head, ids, 48), expected, atol=1e-6)
    for tokens in (1, 7, 36):
        monkeypatch.setattr("hf_gqaprune.models.losses.LOGITS_AT_ONCE", tokens * 48)
        assert torch.allclose(loss_gradient(hidden, head, ids, 48), expected, atol=1e-6)
