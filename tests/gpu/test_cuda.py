"""What must hold on a CUDA device as it does on a CPU: codes, products, GPTQ, generation and a whole run."""

import pytest
import torch

import aqtx
from aqtx.evaluate.perplexity import evaluate_perplexity
from aqtx.formats import MixedExperts, names, quantize
from aqtx.numerics import alpha_hill, gptq, hadamard
from aqtx.program.generate import Generator
from aqtx.text.tokens import evaluation, load_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DEVICE = "cuda"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inner(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Codes, scales and zero points."""
    return [getattr(tensor, name).cpu() for name in tensor.__tensor_flatten__()[0]]


@pytest.mark.parametrize("name", names())
def test_codes_made_there_equal_those_made_here(name):
    W = normal(2, 64, 256, dtype=torch.bfloat16)
    here, there = quantize(W, name), quantize(W.to(DEVICE), name)
    assert all(torch.equal(a, b) for a, b in zip(inner(here), inner(there), strict=True))
    assert torch.equal(here.dequantize(), there.dequantize().cpu())


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "int4", "nvfp4"])
@pytest.mark.parametrize("rows", [1, 64])
def test_a_compiled_linear_multiplies_by_the_dequantized_weight(name, rows):
    W = quantize(normal(256, 512, dtype=torch.bfloat16).to(DEVICE), name)
    x = normal(rows, 512, dtype=torch.bfloat16, seed=1).to(DEVICE)
    found = torch.compile(torch.nn.functional.linear, fullgraph=True)(x, W)
    expected = x.double() @ W.dequantize(torch.float64).T
    # bf16 keeps 8 bits; sums are taken in float32.
    assert (found.double() - expected).norm() < 2**-7 * expected.norm()


def test_experts_of_mixed_formats_agree_with_the_cpu():
    W = normal(4, 128, 256)
    experts = MixedExperts.from_experts(
        [quantize(W[0], "mxfp4"), quantize(W[1], "int4"), W[2], quantize(W[3], "mxfp8")], torch.float32
    )
    x, offsets = normal(40, 256, seed=1), torch.tensor([10, 10, 25, 40], dtype=torch.int32)
    here = torch.ops.aqtx.grouped_linear(x, experts, offsets)
    there = torch.ops.aqtx.grouped_linear(x.to(DEVICE), experts.to(DEVICE), offsets.to(DEVICE))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-3)


def test_numerics_agree_with_the_cpu():
    W, X = normal(64, 256), normal(512, 256, seed=1) * torch.linspace(3, 0.1, 256)
    H = X.T @ X
    assert alpha_hill(W.to(DEVICE)) == pytest.approx(alpha_hill(W), rel=1e-4)
    torch.testing.assert_close(hadamard(W.to(DEVICE)).cpu(), hadamard(W), rtol=1e-5, atol=1e-5)
    errors = [
        float((((gptq(W.to(at), H.to(at), "int4").dequantize().cpu() - W) @ X.T) ** 2).sum()) for at in ("cpu", DEVICE)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)  # a sum in another order may tip single roundings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    return aqtx.apply("quickstart", output=str(folder), device=DEVICE, calibration__num_sequences=8, evaluate=None)


def test_a_whole_run_counts_every_weight(run):
    weights = run.data["weights"]
    assert weights["quantized"] + weights["kept"] + weights["refused"] == weights["total"]
    assert weights["quantized"] > 0


def test_its_perplexity_there_is_that_of_the_cpu(run):
    scores = []
    for device in ("cpu", DEVICE):
        program = aqtx.load(run.directory).to(device)
        documents = evaluation("builtin", load_tokenizer(program.folder), max_tokens=2000)
        scores.append(evaluate_perplexity(program.scorer(), documents, window=512).perplexity)
    assert scores[1] == pytest.approx(scores[0], rel=0.01)  # computed in bf16


def test_it_generates_what_the_cpu_does():
    programs = [aqtx.trace("tinymoe", torch.float32).to(device) for device in ("cpu", DEVICE)]
    here, there = (Generator(p).continue_greedily([[11, 22, 33], [44]], max_new_tokens=8) for p in programs)
    assert there == here
