"""Refit the kept columns of an output projection from second moments."""

from __future__ import annotations

import torch

from ..linalg import cholesky_, ridge_term, solve_
from ..statistics import RIDGE, Moments

#: columns of a second moment converted to float64 at once
_COLUMNS = 2048


def refit_columns(weight: torch.Tensor, moments: Moments, columns: torch.Tensor) -> torch.Tensor:
    """Refit the `columns` of `weight` to reproduce its output on the calibration inputs.

    Minimises tr((W - W') (H + ridge I) (W - W')^T) over W' that are zero outside `columns`. The solution is
    W'_S = W_S + W_R H_RS (H_SS + ridge I)^-1, with R the removed columns (ridge regression towards W_S).

    Args:
        weight: `(d, n)`, any float dtype; the solve runs in float64.
        moments: of the projection's inputs, on any device.
        columns: int64 `(k,)`, sorted.

    Returns:
        `(d, k)` in the dtype and on the device of `weight`.
    """
    moments, columns = moments.to(weight.device), columns.to(weight.device)
    kept = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill_(0, columns, True)
    removed = weight.detach()[:, ~kept].double()
    # all of H in float64 would take twice its memory in float32: convert some columns at a time, then the kept square
    parts = [removed @ moments.inputs[:, some][~kept].double() for some in columns.split(_COLUMNS)]
    rows = torch.cat(parts, 1)  # (d, k)
    del removed, parts
    square = moments.inputs[columns][:, columns].double()
    square.diagonal().add_(ridge_term(moments.inputs, RIDGE))
    solved = solve_(cholesky_(square), rows)
    return solved.add_(weight.detach()[:, columns]).to(weight.dtype).contiguous()
