"""GPTQ against independent references: a textbook implementation, brute force over codes, round-to-nearest."""

from dataclasses import replace

import pytest
import torch

from aqtx.errors import InputError
from aqtx.formats import kernel, names, parse, quantize
from aqtx.formats.codec import packed
from aqtx.numerics.cholesky import factor
from aqtx.numerics.gptq import Options, gptq, solve
from aqtx.numerics.gptq_rows import Contest, Left, bound_basis, row_errors
from aqtx.numerics.gptq_sweeps import Descent, RowGrid
from tests.marks import slow, slow_but

EXTRA = [
    "int4_asym",
    "int2_asym",
    "int8_row",
    "int4_g32",
    "int4_row_asym",
    "mxfp4@search",
    "mxfp4@even",
    "nvfp4@search",
]
FORMATS = [*names(), *EXTRA]
PLAIN = Options(search_scales=False, sweeps=0)  # the algorithm as published, at the scales of the format's rule


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def moment(num_tokens: int, num_inputs: int, *batch: int, seed: int = 1) -> torch.Tensor:
    """Sum of x x^T of Gaussian tokens whose channels fall off from 3 to 0.01 after a rotation."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(num_inputs, num_inputs, generator=generator))[0]
    x = torch.randn(*batch, num_tokens, num_inputs, generator=generator) * torch.linspace(3, 0.01, num_inputs)
    x = x @ turn
    return x.transpose(-1, -2) @ x


def exact_errors(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    D = W.double() - Q.double()
    return torch.einsum("...nk,...kl,...nl->...n", D, H.double(), D)


def assert_same_codes(one: torch.Tensor, other: torch.Tensor) -> None:
    for part in ("qdata", "scale", "zero_point", "per_tensor_scale", "super_scale"):
        left, right = getattr(one, part), getattr(other, part)
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right), part


def textbook(W: torch.Tensor, H: torch.Tensor, scale: torch.Tensor, damp_fraction: float) -> torch.Tensor:
    """Symmetric INT4 as in the paper: the inverse's Cholesky factor, one column at a time, in float64."""
    W, H = W.double().clone(), H.double().clone()
    H.diagonal().add_(damp_fraction * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    Q = torch.zeros_like(W)
    for column in range(W.shape[1]):
        step = scale[:, column // 128].double()
        Q[:, column] = (W[:, column] / step).round().clamp(-8, 7) * step
        error = (W[:, column] - Q[:, column]) / U[column, column]
        W[:, column:] -= error.unsqueeze(1) * U[column, column:]
    return Q


@pytest.mark.parametrize("num_inputs", [256, 200])  # 200: a ragged last block
@pytest.mark.parametrize("name", slow_but(FORMATS[::3], FORMATS))
def test_every_format(name: str, num_inputs: int) -> None:
    W, eye = weights(2, 24, num_inputs), 7.0 * torch.eye(num_inputs).expand(2, -1, -1)
    nearest = quantize(W, name)
    H = moment(400, num_inputs, 2)
    before = exact_errors(W, nearest.dequantize(), H)
    for order in ("none", "activation"):
        plain = replace(PLAIN, order=order)
        assert_same_codes(solve(W, eye, parse(name), options=plain).tensor, nearest)
        assert_same_codes(gptq(W, 0 * eye, name, order=order), nearest)
        once, found = solve(W, H, parse(name), options=plain).tensor, gptq(W, H, name, order=order)
        at_once, after = (exact_errors(W, tensor.dequantize(), H) for tensor in (once, found))
        assert_same_codes(quantize_at(found), found)
        assert (at_once <= before * (1 + 1e-6)).all()
        assert (after <= at_once * (1 + 1e-6)).all()
        assert name == "bf16" or (at_once.sum() < 0.9 * before.sum() and after.sum() < 0.97 * at_once.sum())
    zero = torch.zeros(2)
    assert_same_codes(gptq(W, 0 * eye, name, num_tokens=zero), nearest)
    assert_same_codes(gptq(W, 0 * eye, name, num_tokens=zero, prior=moment(99, num_inputs)), nearest)


def quantize_at(found: torch.Tensor) -> torch.Tensor:
    """The values of `found` encoded afresh at its own scales: the same codes if all lie in the declared format."""
    from aqtx.formats.codec import encode

    return found if found.scale is None else encode(found.dequantize(), found.format_name, found.scales)


def test_scales_of_the_plain_algorithm_are_those_of_round_to_nearest() -> None:
    W, H = weights(1, 32, 256), moment(400, 256, 1)
    for name in ("mxfp4", "int4_asym", "nvfp4"):
        found = solve(W, H, parse(name), options=replace(PLAIN, order="activation")).tensor
        assert torch.equal(found.scale, quantize(W, name).scale)


@pytest.mark.parametrize("tokens", [3.0, 60.0])
@pytest.mark.parametrize("prior", [None, "pooled"])
@pytest.mark.parametrize("name", ["int3_g64", "int4_asym", "mxfp4", "nvfp4", "int4_row"])
def test_never_worse_than_plain_where_tokens_are_few(name: str, prior: str | None, tokens: float) -> None:
    """Whatever the target is drawn to, each row is judged on the H given."""
    W, H = weights(3, 40, 192), moment(int(tokens), 192, 3)
    known = {"num_tokens": torch.full((3,), tokens), "prior": None if prior is None else moment(500, 192) / 500}
    plain = solve(W, H, parse(name), options=replace(PLAIN, order="activation"), **known)
    found = solve(W, H, parse(name), options=Options(order="activation"), **known)
    at_plain, after = (exact_errors(W, one.tensor.dequantize(), H) for one in (plain, found))
    power = exact_errors(W, torch.zeros_like(W), H)
    # rows are compared in float32: an error far below the row's own power is known up to roundings of that only
    assert (after <= at_plain * (1 + 1e-5) + 1e-9 * power).all()
    assert_same_codes(quantize_at(found.tensor), found.tensor)


@pytest.mark.parametrize(
    "name", ["int3_g64", "int4_asym", "int4_row", "mxfp4", "mxfp6", "nvfp4", "fp4_g32", "q3_k", "q4_k"]
)
def test_each_sweep_lowers_every_rows_objective_and_ends_at_what_the_codes_say(name: str) -> None:
    W, H, fmt = weights(1, 24, 160), moment(400, 160), parse(name)
    start = quantize(W, name)
    codes, grid = start.codes().contiguous(), RowGrid.of(start.scales, fmt, 160)
    objectives = [exact_errors(W[0], start.dequantize()[0], H)]
    for _ in range(3):
        descent = Descent.of(W, codes, grid=grid.of_expert(0), H=H[None])
        told = descent.run(1, refit=True)[0]
        codes, grid = descent.codes, descent.grid
        values = packed(codes, fmt, grid.scales(), torch.float32).dequantize()
        assert torch.allclose(descent.errors, W - values, rtol=0, atol=1e-8)  # a minimum is added to W first
        objectives.append(exact_errors(W[0], values[0], H))
        # the gradient is kept up to date by 160 updates a sweep, each rounded in float32
        assert torch.allclose(told.double(), objectives[-1], rtol=1e-3)
        assert (objectives[-1] <= objectives[-2] * (1 + 1e-5)).all()
    assert objectives[1].sum() < 0.8 * objectives[0].sum()


def test_two_columns_by_brute_force_after_sweeps() -> None:
    """With the scale held and two columns, descent ends where no other code of either column is better."""
    H, W = torch.tensor([[2.0, 1.5], [1.5, 2.0]]), torch.tensor([[0.7, 0.31], [-0.2, 0.66], [0.7, -0.05]])
    options = Options(damp_fraction=0.0, search_scales=False, refit_scales=False, sweeps=20)
    found = solve(W[None], H[None], parse("int4"), options=options).tensor[0]
    grid = torch.arange(-8, 8.0)
    for w, q, step in zip(W, found.dequantize(), found.scale.float(), strict=True):
        least = exact_errors(w[None], q[None], H)
        for column in (0, 1):
            others = q.expand(16, 2).clone()
            others[:, column] = grid * step
            assert (exact_errors(w.expand(16, 2), others, H) >= least * (1 - 1e-6)).all()


def test_agrees_with_the_textbook() -> None:
    W, H = weights(40, 256), moment(600, 256)
    found = solve(W[None], H[None], parse("int4"), options=replace(PLAIN, damp_fraction=0.01)).tensor[0]
    reference = textbook(W, H, quantize(W, "int4").scale, 0.01)
    same = (found.dequantize().double() - reference).abs() < 1e-6
    # float32 and float64 part where a value lies within rounding of a tie, and the row differs from there on
    assert same.all(1).float().mean() > 0.9
    ratio = exact_errors(W, found.dequantize(), H).sum() / exact_errors(W, reference, H).sum()
    assert abs(float(ratio) - 1) < 0.01


def test_two_columns_by_brute_force() -> None:
    """Of all codes for two columns GPTQ finds the best second one given its first."""
    H, W = torch.tensor([[2.0, 1.5], [1.5, 2.0]]), torch.tensor([[0.7, 0.31], [-0.2, 0.66], [0.7, -0.05]])
    scale = quantize(W, "int4").scale.float()
    Q = solve(W[None], H[None], parse("int4"), options=replace(PLAIN, damp_fraction=0.0)).tensor[0].dequantize()
    grid = torch.arange(-8, 8.0)
    for w, q, step in zip(W, Q, scale, strict=True):
        candidates = torch.stack([q[0].expand(16), grid * step], dim=1)
        errors = exact_errors(w.expand(16, 2), candidates, H)
        nearest = (w / step).round() * step
        assert torch.allclose(candidates[errors.argmin()], q) or torch.allclose(nearest, q)


def test_block_size_and_batch_do_not_matter() -> None:
    W, H = weights(3, 16, 192), moment(400, 192, 3)
    whole = solve(W, H, parse("mxfp4")).tensor
    for block_size in (1, 7, 32, 500):
        other = solve(W, H, parse("mxfp4"), options=Options(block_size=block_size)).tensor
        assert (whole.dequantize() == other.dequantize()).float().mean() > 0.99
    for expert in range(3):
        alone = gptq(W[expert], H[expert], "mxfp4")
        assert_same_codes(alone, whole[expert])


def test_act_order_helps_where_channels_differ() -> None:
    W = weights(64, 256)
    H = moment(2000, 256) * torch.outer(*[torch.logspace(0, -2, 256)[torch.randperm(256)]] * 2)
    plain, ordered = (
        exact_errors(W, gptq(W, H, "int4", order=o).dequantize(), H).sum() for o in ("none", "activation")
    )
    assert ordered < plain


def test_damping_is_raised_on_the_schedule_and_told() -> None:
    low_rank = moment(5, 64, 2)
    low_rank[1] += 50 * torch.eye(64)
    found = factor(low_rank, 0.0)
    assert found.damping[0] >= 1e-4 and found.damping[1] == 0
    told = solve(weights(2, 8, 64), low_rank, parse("int4"), options=Options(damp_fraction=0.0)).damping
    assert torch.equal(told, found.damping)


def test_input_is_refused_in_sentences() -> None:
    W, H = weights(8, 64), moment(100, 64)
    with pytest.raises(InputError, match="not positive semi-definite"):
        gptq(W, -H, "int4")
    with pytest.raises(InputError, match=r"must be \[1, 64, 64\], not \[1, 32, 32\]"):
        gptq(W, H[:32, :32], "int4")
    with pytest.raises(InputError, match="NaN"):
        gptq(W, H * float("nan"), "int4")
    with pytest.raises(InputError) as raised:
        gptq(W, H, "int4", order="random", damp_fraction=-1.0)  # type: ignore[arg-type]
    assert len(raised.value.problems) == 2


def test_row_errors_use_symmetry_rightly() -> None:
    D, H = weights(2, 5, 300), moment(50, 300, 2)
    found = row_errors(D, H, panel=128)
    assert torch.allclose(found.double(), exact_errors(D, torch.zeros_like(D), H), rtol=1e-4)


def test_bounds_decide_as_the_errors_do() -> None:
    """Whether a row's errors are proven to be larger, or evaluated, the choice is the same."""
    H, share = moment(90, 256), 50.0
    target = H + share * torch.eye(256)
    D = [scale * weights(40, 256, seed=seed) for seed, scale in ((0, 0.9), (5, 1.0), (6, 0.8), (6, 0.8))]
    exact = torch.stack([row_errors(d, H) for d in D]).argmin(0)
    assert {0, 1, 2} == set(exact.tolist())  # of the last two, which are equal, the first one
    [basis] = bound_basis(H[None])
    below = (D[0] @ basis.t()).square().sum(1)
    assert (below <= row_errors(D[0], H)).all() and below.sum() > 0.3 * row_errors(D[0], H).sum()
    objectives = [row_errors(d, target) for d in D]
    nothing = torch.full((40,), torch.nan)
    for known in ([True] * 4, [False] * 4, [False, True, True, True], [True, False, False, False]):
        candidates = [Left(d, one if told else None) for d, one, told in zip(D, objectives, known, strict=True)]
        for tight in (share, None):
            assert torch.equal(Contest(candidates, H, basis=basis, share=tight).best(), exact)
    assert torch.equal(Contest([Left(d, nothing) for d in D], H, basis=basis, share=share).best(), exact)


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("name", ["int3_g32", "mxfp4", *slow("int4", "int4_asym", "mxfp6_e2m3", "mxfp8_e4m3", "nvfp4")])
def test_compiled_columns_give_the_same_bits(name: str, order: str, monkeypatch) -> None:
    if not kernel.available():
        pytest.skip("no compiler")
    W, H = weights(2, 70, 200), moment(300, 200, 2)
    compiled = solve(W, H, parse(name), options=Options(order=order))
    monkeypatch.setattr(kernel, "serves", lambda device: False)
    plain = solve(W, H, parse(name), options=Options(order=order))
    assert_same_codes(compiled.tensor, plain.tensor)
    assert torch.equal(compiled.error, plain.error)


@pytest.mark.parametrize("name", ["int8", "int6_g32", "mxfp8", "nvfp4", "int4_asym"])
def test_never_worse_where_the_stored_value_is_rounded_once_more(name: str) -> None:
    """bf16 has fewer digits than codes times scale: rows are judged by the values that dequantizing gives."""
    W, H = weights(4, 64, 128).bfloat16(), moment(300, 128, 4)
    nearest = exact_errors(W, quantize(W, name).dequantize(), H)
    plain = exact_errors(W, solve(W, H, parse(name), options=PLAIN).tensor.dequantize(), H)
    found = exact_errors(W, gptq(W, H, name).dequantize(), H)
    assert (plain <= nearest * (1 + 1e-5)).all() and (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < 0.9 * nearest.sum()


def test_bf16_weights_stay_bf16() -> None:
    W = weights(16, 128).bfloat16()
    found = gptq(W, moment(300, 128), "int8")
    assert found.dtype == torch.bfloat16 and found.dequantize().dtype == torch.bfloat16


def op_arguments(name: str) -> list:
    """What an op of GPTQ takes for two matrices [24, 64] of int4_g32_asym: all tensors, then numbers."""
    E, N, K, G = 2, 24, 64, 2
    spec, rows = kernel.spec_of(parse("int4_g32_asym"), K), torch.zeros(E, N, K)
    codes, square, line = rows.byte(), torch.zeros(E, K, K), torch.zeros(E, K)
    columns, grid = rows.mT.contiguous(), [torch.ones(E, N, G), torch.zeros(E, N, G)]
    if name == "round_columns":
        grid = [part.mT.contiguous() for part in grid]
        tensors = [columns, columns.clone(), columns.clone(), codes.mT.contiguous(), square, *grid]
        return [*tensors, torch.zeros(E, K, dtype=torch.long), line, torch.zeros(E, N), spec, 7.0, 0, 32]
    if name == "descend":
        return [rows, rows.clone(), rows.clone(), codes, square, line, *grid, torch.zeros(E, N), spec, 7.0, 2, 1e-3]
    if name == "left_by":
        return [rows, codes, *grid, spec, 7.0]
    return [torch.zeros(6, 32), torch.ones(2, 32), torch.ones(3, 6), torch.zeros(3, 6), spec, 7.0, False, False]


@pytest.mark.parametrize("name", ["round_columns", "descend", "left_by", "best_scales"])
def test_ops_refuse_parts_that_do_not_fit(name: str) -> None:
    """One part at a time: too short, of another dtype, with gaps; nothing is read as raw memory before."""
    if not kernel.available():
        pytest.skip("no compiler")
    op, good = getattr(torch.ops.aqtx_cpu, name), op_arguments(name)
    op(*good)
    for place, part in enumerate(good):
        if not isinstance(part, torch.Tensor):
            continue
        # a row of runs and of importance is as long as the other's; their number alone is free
        for bad in (part[..., :-1].contiguous(), part[..., ::2], part.double(), part[None]):
            with pytest.raises(RuntimeError, match="aqtx: "):
                op(*good[:place], bad, *good[place + 1 :])
    if name == "round_columns":
        for low, high in ((-1, 32), (32, 16), (0, 65)):
            with pytest.raises(RuntimeError, match="no columns"):
                op(*good[:-2], low, high)
        with pytest.raises(RuntimeError, match="no block 7"):
            op(*good[:7], good[7] + 7, *good[8:])
