"""Second moments of the inputs of linear nodes: H = sum of x x^T over tokens, for chosen experts.

Legend: T tokens (rows sorted by expert where a node is grouped), K inputs, E experts.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from aqtx.formats.grouped_linear import group_bounds
from aqtx.machine.ranks import Ranks
from aqtx.numerics.products import add_product

PANEL = 128  # rows of H computed at once; the part below the diagonal is mirrored at the end
STEP = 128  # tokens that are added are a multiple of it


@dataclass
class Moments:
    """H [len(experts), K, K], tokens and channel ranges of some experts of one input."""

    experts: list[int]
    H: Tensor
    tokens: Tensor  # [E] float32: effective tokens where rows are weighted
    squares: Tensor  # [E] sum of squared row weights
    largest: Tensor  # [K] largest magnitude of each channel over all rows seen
    place: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        """Position of each expert in the batch."""
        self.place = {expert: index for index, expert in enumerate(self.experts)}

    @classmethod
    def empty(cls, experts: list[int], num_inputs: int, device: torch.device) -> "Moments":
        """Nothing seen yet."""
        zeros = torch.zeros(len(experts), device=device)
        H = torch.zeros(len(experts), num_inputs, num_inputs, device=device)
        return cls(experts, H, zeros, zeros.clone(), torch.zeros(num_inputs, device=device))

    def add(self, x: Tensor, offsets: Tensor | None, weights: Tensor | None = None) -> None:
        """Rows x [T, K], of one matrix or grouped by `offsets` [E]; `weights` [T] multiply their outer products."""
        bounds = [(0, 0, len(x))] if offsets is None else group_bounds(offsets)
        for expert, low, high in bounds:
            if expert not in self.place:
                continue
            rows = x[low:high].to(torch.float32)
            index = self.place[expert]
            self.largest = torch.maximum(self.largest, rows.abs().amax(0))
            if weights is None:
                self.tokens[index] += high - low
            else:
                weight = weights[low:high].to(torch.float32)
                rows = rows * weight.sqrt().unsqueeze(1)
                self.tokens[index] += weight.sum()
                self.squares[index] += weight.square().sum()
            add_outer(self.H[index], rows)

    def add_ranks(self, ranks: Ranks) -> None:
        """Add what other ranks saw of their share of the text."""
        ranks.add_up(self.H, self.tokens, self.squares)
        ranks.take_largest(self.largest)

    def finish(self) -> None:
        """Mirror H; weighted rows count as T = (sum w)^2 / sum w^2 equal ones, and H is T times their mean."""
        for H in self.H:
            mirror(H)
        if bool((self.squares > 0).any()):
            scale = self.tokens / self.squares.clamp_min(1e-30)
            self.H *= scale[:, None, None]
            self.tokens = self.tokens * scale


def add_outer(H: Tensor, rows: Tensor) -> None:
    """H += rows^T rows, on and above the diagonal in panels only."""
    columns = (
        pad(rows, (0, 0, 0, -len(rows) % STEP)).t().contiguous()
    )  # zeros: products of few shapes are compiled once
    for low in range(0, len(H), PANEL):
        panel = slice(low, low + PANEL)
        add_product(H[panel, low:], columns[panel], columns[low:].t())


def mirror(H: Tensor) -> None:
    """Fill in below the diagonal panels what `add_outer` left out."""
    for low in range(0, len(H), PANEL):
        high = low + PANEL
        H[high:, low:high] = H[low:high, high:].t()
