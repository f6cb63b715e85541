"""TODO."""

from __future__ import annotations

import torch

from ..linalg import cholesky_, solve_
from ..statistics import Moments

#: columns of a second moment that are converted to float64 at once
_COLUMNS = 2048


def refit_columns(weight: torch.Tensor, moments: Moments, columns: torch.Tensor) -> torch.Tensor:
    """The `columns` of `weight` that reproduce its output best on the calibration inputs.

    Minimises tr((W - W') (H + ridge I) (W - W')^T) over W' that are zero outside `columns`, whose solution is
    W'_S = W_S + W_R H_RS (H_SS + ridge I)^-1, R the columns that go (ridge regression towards W_S).

    Args:
        weight: `(d, n)`, any float dtype; the solve runs in float64.
        moments: of the projection's inputs, on any device.
        columns: int64 `(k,)`, sorted.

    Returns:
        `(d, k)` in the dtype and on the device of `weight`.
    """
    moments, columns = moments.to(weight.device), columns.to(weight.device)
    stays = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill_(0, columns, True)
    gone = weight.detach()[:, ~stays].double()
    # H in float64 would be twice what is there in float32: columns come a few at a time, then the square that stays
    parts = [gone @ moments.inputs[:, some][~stays].double() for some in columns.split(_COLUMNS)]
    rows = torch.cat(parts, 1)  # (d, k)
    del gone, parts
    square = moments.inputs[columns][:, columns].double()
    square.diagonal().add_(moments.added())
    solved = solve_(cholesky_(square), rows)
    return solved.add_(weight.detach()[:, columns]).to(weight.dtype).contiguous()
