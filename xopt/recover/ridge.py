"""Closed-form least squares: the linear map that does best with the inputs that are left.

    given    targets Y [rows, D] and inputs X [rows, K] of a linear layer, of which the columns ``keep`` stay
    find     W, b   that minimize  |X[:, keep] W + b - Y|^2 + penalty |W|^2
    so       W = (S[keep, keep] + penalty I)^-1 C[keep],  S = X'X, C = X'Y (both about the means),  b = mean(Y - X W)

Everything comes from S, C and the means, so rows are read once, in pieces, and any set ``keep`` can be tried after.
This is the affine generalization of the mask tuning of Kwon et al. (NeurIPS 2022, "A Fast Post-Training Pruning
Framework for Transformers"); without labels, gradients or steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from xopt.errors import InternalError

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """``y = x @ weight + bias``: weight [K', D], bias [D] (zeros when none was asked for), both float64."""

    weight: Array
    bias: Array


class Moments:
    """Sums of products of the inputs and targets of a linear layer, in float64.

    Args:
        inputs: K.
        outputs: D.
        intercept: whether a bias is fitted: then all products are about the means.
    """

    def __init__(self, inputs: int, outputs: int, *, intercept: bool = True) -> None:
        self.intercept = intercept
        self.rows = 0
        self._xx = np.zeros((inputs, inputs))
        self._xy = np.zeros((inputs, outputs))
        self._yy = 0.0
        self._x = np.zeros(inputs)
        self._y = np.zeros(outputs)

    def add(self, x: Floats, y: Floats) -> None:
        """Take in rows: x [n, K], y [n, D]."""
        x, y = x.astype(np.float64), y.astype(np.float64)
        self.rows += len(x)
        self._xx += x.T @ x
        self._xy += x.T @ y
        self._yy += float(np.vdot(y, y))
        self._x += x.sum(axis=0)
        self._y += y.sum(axis=0)

    @property
    def mean_x(self) -> Array:
        """Mean input [K]; zeros without an intercept."""
        return self._x / self.rows if self.intercept else np.zeros_like(self._x)

    @property
    def mean_y(self) -> Array:
        """Mean target [D]; zeros without an intercept."""
        return self._y / self.rows if self.intercept else np.zeros_like(self._y)

    @property
    def gram(self) -> Array:
        """X'X [K, K], about the mean."""
        return self._xx - self.rows * np.outer(self.mean_x, self.mean_x)

    @property
    def cross(self) -> Array:
        """X'Y [K, D], about the means."""
        return self._xy - self.rows * np.outer(self.mean_x, self.mean_y)

    def penalty(self, ridge: float) -> float:
        """``ridge`` times the mean square of the inputs (summed over rows): the same strength at every scale.

        Never below the rounding error of the products; inputs that never vary get no weight by any penalty.
        """
        rounding = float(np.finfo(np.float64).eps * np.trace(self._xx))
        return max(ridge * float(np.trace(self.gram)) / len(self._x), rounding) or 1.0

    def precision(self, ridge: float) -> Array:
        """Inverse of X'X plus the penalty: [K, K]."""
        gram = self.gram
        gram[np.diag_indices_from(gram)] += self.penalty(ridge)
        inverse: Array = scipy.linalg.inv(gram)
        return inverse

    def freedom(self, precision: Array, ridge: float) -> float:
        """Degrees of freedom of the fit: how many of the inputs the penalty leaves free, 0 to K."""
        return len(precision) - self.penalty(ridge) * float(np.trace(precision))

    def solve(self, keep: npt.NDArray[np.int64], ridge: float) -> Solution:
        """The best weight and bias for the inputs ``keep``.

        Args:
            keep: indices of inputs [K'].
            ridge: penalty as a share of the mean square of all inputs; above 0.

        Raises:
            InternalError: no rows were added.
        """
        if not self.rows:
            raise InternalError("E-DATA", "least squares without a single row")
        gram, cross = self.gram[np.ix_(keep, keep)], self.cross[keep]
        gram[np.diag_indices(len(keep))] += self.penalty(ridge)
        weight = scipy.linalg.solve(gram, cross, assume_a="pos")
        return Solution(weight, self.mean_y - self.mean_x[keep] @ weight if self.intercept else self.mean_y)

    def error(self, keep: npt.NDArray[np.int64], solution: Solution) -> float:
        """Mean squared error per row of ``x[:, keep] @ weight + bias`` against the targets, summed over outputs."""
        weight = solution.weight
        # With r = x W + b - y: the products about the means, plus the square of the mean residual.
        yy = self._yy - self.rows * float(np.vdot(self.mean_y, self.mean_y))
        gram = self.gram[np.ix_(keep, keep)]
        spread = yy - 2 * float(np.vdot(weight, self.cross[keep])) + float(np.vdot(weight, gram @ weight))
        offset = self.mean_x[keep] @ weight + solution.bias - self.mean_y
        if not self.intercept:
            offset = solution.bias
        return spread / self.rows + float(np.vdot(offset, offset))
