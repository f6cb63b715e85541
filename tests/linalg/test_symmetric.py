"""Factors, inverses and solutions in place: block by block what LAPACK gives whole."""

from __future__ import annotations

import pytest
import torch

from hf_gqaprune.linalg import symmetric as factors
from hf_gqaprune.linalg.symmetric import (
    add_gram_,
    cholesky_,
    exact_products,
    fill_,
    invert_,
    mirror_,
    solve_,
    weighted_gram,
)


def positive(n: int) -> torch.Tensor:
    x = torch.randn(n + 8, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    h = x.T @ x / n
    return h.tril() + h.tril(-1).T + 0.1 * torch.eye(n, dtype=torch.float64)


@pytest.fixture(params=[5, 7, 15, 64])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks that divide 15 rows, that do not, that are all of them, and more."""
    monkeypatch.setattr(factors, "_BLOCK", request.param)
    return int(request.param)


def test_a_factor_takes_the_lower_triangle_and_leaves_the_upper_one(block: int) -> None:
    given = positive(15)
    matrix = given.clone()
    assert cholesky_(matrix) is matrix
    assert torch.allclose(matrix.tril(), torch.linalg.cholesky(given), rtol=1e-12, atol=1e-14)
    assert torch.equal(matrix.triu(1), given.triu(1))
    # which is how the matrix comes back
    matrix.diagonal().copy_(given.diagonal())
    assert torch.equal(mirror_(matrix, from_upper=True), given)


def test_only_the_lower_triangle_is_read(block: int) -> None:
    given = positive(15)
    broken = given.tril() + torch.full_like(given, torch.nan).triu(1)
    assert torch.equal(cholesky_(broken.clone()).tril(), cholesky_(given.clone()).tril())
    assert torch.equal(invert_(broken.clone()).tril(), invert_(given.clone()).tril())
    assert torch.equal(mirror_(broken), given)


def test_inverse_and_solutions(block: int) -> None:
    given = positive(15)
    inverse = invert_(given.clone())
    assert torch.allclose(fill_(inverse), torch.linalg.inv(given), rtol=1e-10, atol=1e-12)
    wanted = torch.randn(4, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solved = solve_(cholesky_(given.clone()), wanted @ given)
    assert torch.allclose(solved, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strip", [4, 5, 15, 64])
def test_a_gram_is_summed_in_its_lower_triangle(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_STRIP", strip)
    x, start = torch.randn(9, 15, generator=torch.Generator().manual_seed(0)), positive(15).float()
    total = start.clone()
    add_gram_(total, x)
    assert torch.allclose(total.tril(), (start + x.T @ x).tril(), rtol=1e-5, atol=1e-5)
    above = torch.ones(15, 15).triu(strip).bool()  # beyond every square along the diagonal
    assert torch.equal(total[above], start[above])


@pytest.mark.parametrize(
    ("dtype", "cuda", "cpu"), [(torch.bfloat16, "tf32", "bf16"), (torch.float16, "tf32", None), (torch.float32, None, None)]
)
def test_products_of_halves_take_their_units_where_those_are_exact(dtype: torch.dtype, cuda: str, cpu: str) -> None:
    units = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [unit.fp32_precision for unit in units]
    with pytest.raises(ZeroDivisionError), exact_products(dtype, dtype):
        assert [unit.fp32_precision for unit in units] == [cuda or "ieee", cpu or "ieee"]
        raise ZeroDivisionError
    with exact_products(dtype, torch.float32):
        assert [unit.fp32_precision for unit in units] == ["ieee", "ieee"]
    assert [unit.fp32_precision for unit in units] == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_halves_are_multiplied_and_summed_in_float32(dtype: torch.dtype) -> None:
    # 8 bits each, as bfloat16 has: a float32 holds every sum, a half few of them
    x = torch.randint(-255, 256, (250, 200), generator=torch.Generator().manual_seed(0)).to(dtype)
    total = torch.zeros(200, 200)
    add_gram_(total, x)
    add_gram_(total, x)
    assert torch.equal(total.tril(), 2 * (x.double().T @ x.double()).float().tril())


def test_a_weighted_gram_is_the_product_in_its_lower_triangle(block: int) -> None:
    weight, metric = torch.randn(3, 15, generator=torch.Generator().manual_seed(0)).bfloat16(), positive(3)
    gram = weighted_gram(weight, metric)
    assert torch.allclose(fill_(gram), weight.double().T @ metric @ weight.double(), rtol=1e-12, atol=1e-12)


def test_what_fits_in_a_block_is_lapacks_to_the_bit() -> None:
    given, rows = positive(15), positive(15)[:4]
    factor = torch.linalg.cholesky(given)
    assert torch.equal(cholesky_(given.clone()).tril(), factor)
    assert torch.equal(invert_(given.clone()), torch.cholesky_inverse(factor))
    assert torch.equal(solve_(factor, rows.clone()), torch.cholesky_solve(rows.T, factor).T)


def test_what_is_not_positive_definite_is_told(block: int) -> None:
    matrix = positive(15)
    matrix[12, 12] = -1
    for work in (cholesky_, invert_):
        with pytest.raises(torch.linalg.LinAlgError):
            work(matrix.clone())


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_factors_are_not_rounded_whatever_the_precision_of_the_model(precision: str) -> None:
    x = torch.randn(256, 96, generator=torch.Generator().manual_seed(0))
    expected, found = torch.zeros(96, 96), torch.zeros(96, 96)
    add_gram_(expected, x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        settings = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        assert settings != ("ieee", "ieee")
        with exact_products(torch.float32):
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert settings == (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        add_gram_(found, x)
        assert torch.equal(found, expected)
    finally:
        torch.set_float32_matmul_precision(before)
