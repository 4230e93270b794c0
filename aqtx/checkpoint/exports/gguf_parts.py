"""What of a parameter lies in which tensor of a GGUF file: in another order, in several tensors, with other values.

    parameter [N, K] -> runs of rows -> runs of columns -> changed values -> a matrix for each head, turned or not

`laid_out` goes this way, and `put_back` the other. Codes go it too, as rows of bytes: whole rows move freely, runs of
columns only where they are whole blocks, and a turned matrix has no codes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Pick(NamedTuple):
    """Which of `runs` equal runs of an axis are taken, in order."""

    order: NDArray[np.intp]
    runs: int

    def take(self, values: Array, axis: int) -> Array:
        """The runs, one behind the other."""
        size = values.shape[axis] // self.runs
        apart = values.reshape(*values.shape[:axis], self.runs, size, *values.shape[axis + 1 :])
        taken = apart.take(self.order, axis)
        return taken.reshape(*values.shape[:axis], -1, *values.shape[axis + 1 :])

    def where(self, length: int) -> NDArray[np.intp]:
        """The places of what is taken on an axis of this length."""
        return np.arange(length).reshape(self.runs, -1)[self.order].reshape(-1)


class Change(NamedTuple):
    """Values that the file holds instead, and the way back."""

    forward: Callable[[Array], Array]
    back: Callable[[Array], Array]


def _decays(logarithms: Array) -> Array:
    return (-np.exp(logarithms.astype(np.float64))).astype(np.float32)


def _logarithms(decays: Array) -> Array:
    return np.log(-decays.astype(np.float64)).astype(np.float32)


PLUS_ONE = Change(lambda gain: gain + np.float32(1), lambda gain: gain - np.float32(1))  # gains stored less one
DECAY = Change(_decays, _logarithms)  # of a state: the rate for its logarithm


class Part(NamedTuple):
    """A tensor that holds a parameter or some of it.

    Fields:
        asked: the name that `gguf` has a name for.
        suffix: behind the latter.
        heads: rows become so many matrices of a tensor with three dimensions; 0 leaves them.
        turned: each of these matrices is transposed.
    """

    asked: str
    suffix: str = ".weight"
    rows: Pick | None = None
    columns: Pick | None = None
    change: Change | None = None
    heads: int = 0
    turned: bool = False

    def laid_out(self, values: Array) -> Array:
        """Rows of values or of codes in bytes [N, ...] as the tensor has them."""
        if self.rows is not None:
            values = self.rows.take(values, 0)
        if self.columns is not None:
            values = self.columns.take(values, values.ndim - 1)
        if self.change is not None:
            values = self.change.forward(values)
        if self.heads:
            values = values.reshape(self.heads, -1, values.shape[-1])
        return values.swapaxes(1, 2) if self.turned else values

    def put_back(self, stored: Array, whole: Array) -> None:
        """Write the tensor's values to their places in the parameter."""
        values = stored.swapaxes(1, 2) if self.turned else stored
        values = values.reshape(-1, values.shape[-1]) if self.heads else values
        if self.change is not None:
            values = self.change.back(values)
        rows = np.arange(whole.shape[0]) if self.rows is None else self.rows.where(whole.shape[0])
        if whole.ndim == 1:
            whole[rows] = values
            return
        columns = np.arange(whole.shape[1]) if self.columns is None else self.columns.where(whole.shape[1])
        whole[np.ix_(rows, columns)] = values.reshape(len(rows), len(columns))

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's, of a parameter of this shape."""
        if self.rows is self.columns is None and not self.heads:
            return whole
        return self.laid_out(np.broadcast_to(np.float32(0), whole)).shape


def split_name(parameter: str) -> tuple[str, str]:
    """A parameter's name without its suffix, and the suffix; names without one are weights."""
    leaf = parameter.rpartition(".")[2]
    return (parameter.removesuffix(f".{leaf}"), f".{leaf}") if leaf in ("weight", "bias") else (parameter, ".weight")


def flat(shape: tuple[int, ...], stacked: bool) -> tuple[int, ...]:
    """The shape without the axis of one that vectors and kernels have in checkpoints, [1, K] and [C, 1, K]."""
    if stacked or len(shape) < 2:
        return shape
    axis = len(shape) - 2
    return shape[:axis] + shape[axis + 1 :] if shape[axis] == 1 else shape
