"""How far a quantized matrix is from the original."""

import math

from torch import Tensor


def energy(W: Tensor) -> float:
    """The squared Frobenius norm."""
    return float(W.double().square().sum())


def squared_error(W: Tensor, Q: Tensor) -> float:
    """||W - Q||_F^2."""
    return energy(W.float() - Q.float())


def qsnr(error: float, signal: float) -> float:
    """The signal-to-noise ratio of quantization in dB; infinite where the error is zero."""
    return 10 * math.log10(signal / error) if error > 0 else math.inf
