"""Hadamard matrices and rotations by them: orthogonal, of entries ±1 / sqrt(n), cheap to apply.

A Hadamard matrix of order n has entries ±1 and H H^T = n I. They are built from 1 and 2, from
Paley's constructions over prime fields (I: order p + 1 for p = 3 mod 4, such as 12, 20, 44; II: order
2 (p + 1) for p = 1 mod 4, such as 28, 36, 76), and from Kronecker products of smaller ones. That covers
1408 = 32 x 44, 5632 = 64 x 88, 10944 = 76 x 144 and 14336 = 112 x 128.

A rotation acts on the last dimension, block by block, as one small GEMM; a wide block is a pair of
GEMMs, H = A kron B. A butterfly would need log2(n) passes over the data where these need one or two.
"""

import math
from functools import cache

import torch
from torch import Tensor

from aqtx.errors import InputError

ONE_GEMM = 128  # widest block that one dense matrix serves better than a pair

LARGEST = 1 << 20  # order of a matrix


def hadamard(x: Tensor, block: int | None = 32, *, seed: int | None = None, inverse: bool = False) -> Tensor:
    """Rotate the last dimension of `x` by an orthonormal Hadamard matrix, block by block.

    Args:
        x: [..., K], any floating dtype; the arithmetic is in that dtype.
        block: width of a block, which must divide K; None is the whole width.
        seed: of random signs in front of the matrix; None leaves them out.
        inverse: apply the transpose, which undoes the rotation.

    Raises:
        InputError: the block does not divide K, or no Hadamard matrix of that order is known here.
    """
    if x.dim() == 0 or not x.dtype.is_floating_point:
        raise InputError(f"cannot rotate a {x.dtype} tensor of shape {list(x.shape)}: it takes floats [.., K]")
    return rotate(x, factors(x.shape[-1] if block is None else block, seed), inverse=inverse)


def rotate(x: Tensor, signs: tuple[Tensor, ...], *, inverse: bool = False) -> Tensor:
    """`x` [..., K] times the block-diagonal matrix of the Kronecker product of `signs` (±1), made orthonormal."""
    block = math.prod(factor.shape[0] for factor in signs)
    if x.shape[-1] % block:
        raise InputError(f"a block of {block} does not divide a width of {x.shape[-1]}")
    parts = [(factor.T if inverse else factor).to(x.device, x.dtype) for factor in signs]
    y = (x * block**-0.5).unflatten(-1, (-1, *(factor.shape[0] for factor in signs)))
    y = y @ parts[-1]
    if len(parts) == 2:
        y = (y.transpose(-1, -2) @ parts[0]).transpose(-1, -2)
    rotated: Tensor = y.reshape(x.shape)
    return rotated


@cache
def factors(block: int, seed: int | None = None) -> tuple[Tensor, ...]:
    """One or two matrices of ±1, float64, whose Kronecker product is a Hadamard matrix of order `block`.

    With a seed each matrix has its rows multiplied by random signs.

    Raises:
        InputError: no matrix of this order is known here.
    """
    if not is_order(block):
        raise InputError(f"no Hadamard matrix of order {block} is known here")
    sizes = (block,) if block <= ONE_GEMM else best_pair(block) or (block,)
    generator = torch.Generator().manual_seed(seed or 0)
    matrices = []
    for size in sizes:
        signs = 1.0 - 2.0 * torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.float64)
        matrices.append(matrix(size) * (1.0 if seed is None else signs))
    return tuple(matrices)


def best_pair(block: int) -> tuple[int, int] | None:
    """The split into two orders that costs the fewest multiplications, None where there is none."""
    pairs = [(a, block // a) for a in range(2, math.isqrt(block) + 1) if block % a == 0]
    known = [pair for pair in pairs if is_order(pair[0]) and is_order(pair[1])]
    return min(known, key=sum, default=None)


@cache
def is_order(n: int) -> bool:
    """Whether `matrix(n)` is known; none is beyond what any matrix has columns."""
    if n > LARGEST:
        return False
    if n in (1, 2) or _paley_one(n) or _paley_two(n):
        return True
    return n > 0 and n % 4 == 0 and _split(n) is not None


@cache
def matrix(n: int) -> Tensor:
    """A Hadamard matrix of order `n`: entries ±1, float64, rows orthogonal; symmetric where n is a power of 2.

    Raises:
        InputError: no matrix of this order is known here.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    split = _split(n)
    if split is not None:
        return torch.kron(matrix(split[0]), matrix(split[1]))
    if _paley_one(n):
        return paley_one(n - 1)
    if _paley_two(n):
        return paley_two(n // 2 - 1)
    raise InputError(f"no Hadamard matrix of order {n} is known here")


def paley_one(p: int) -> Tensor:
    """Paley's first construction, order p + 1: I + S with the skew matrix S of the quadratic residues."""
    skew = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1.0, -1.0, _jacobsthal(p)
    return torch.eye(p + 1, dtype=torch.float64) + skew


def paley_two(p: int) -> Tensor:
    """Paley's second construction, order 2 (p + 1): each entry of the symmetric conference matrix becomes 2 x 2."""
    conference = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1.0, 1.0, _jacobsthal(p)
    entry = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, entry) + torch.kron(torch.eye(p + 1, dtype=torch.float64), diagonal)


def _jacobsthal(p: int) -> Tensor:
    """[p, p]: +1 where i - j is a square modulo p, -1 where it is not, 0 on the diagonal."""
    character = torch.full((p,), -1.0, dtype=torch.float64)
    character[[i * i % p for i in range(1, p)]] = 1.0
    character[0] = 0.0
    index = torch.arange(p)
    return character[(index.unsqueeze(1) - index) % p]


def _split(n: int) -> tuple[int, int] | None:
    """Orders whose product is n, the first as small as can be, so that powers of 2 come out symmetric."""
    divisors = (a for a in range(2, math.isqrt(n) + 1) if n % a == 0)
    return next(((a, n // a) for a in divisors if is_order(a) and is_order(n // a)), None)


def _paley_one(n: int) -> bool:
    return n % 4 == 0 and _prime(n - 1)


def _paley_two(n: int) -> bool:
    return n % 4 == 0 and n // 2 % 2 == 0 and (n // 2 - 1) % 4 == 1 and _prime(n // 2 - 1)


def _prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
