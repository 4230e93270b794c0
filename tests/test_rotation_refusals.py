"""What cannot be proven is refused by name, and the function stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aqtx
from aqtx.errors import InputError
from aqtx.program.program import Program
from tests.rotation_cases import FUSED, rotated, rotations, tiny


class PostNorm(nn.Module):
    """A block whose output is normed before it joins the stream, as in Gemma 3."""

    def __init__(self, *, post: bool = True, layer_norm: bool = False, scale_stream: bool = False) -> None:
        super().__init__()
        self.hf_config = {"vocab_size": 32, "hidden_size": 32}
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.pre, self.post, self.last = (nn.Parameter(1 + torch.rand(32)) for _ in range(3))
        self.channels = nn.Parameter(torch.rand(32))
        self.lm_head = nn.Linear(32, 32, bias=False)
        self.has_post, self.layer_norm, self.scale_stream = post, layer_norm, scale_stream

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * 32**0.5
        if self.scale_stream:
            x = x * self.channels
        y = F.layer_norm(x, (32,), self.pre) if self.layer_norm else F.rms_norm(x, (32,), self.pre, 1e-6)
        y = self.down(F.silu(self.gate(y)) * self.up(y))
        x = x + (F.rms_norm(y, (32,), self.post, 1e-6) if self.has_post else y)
        return self.lm_head(F.rms_norm(x, (32,), self.last, 1e-6))


R1 = FUSED[:2] + FUSED[4:]


def refusals(program: Program, steps) -> dict[str, str]:
    run = rotated(program, steps)
    return {refusal.site: refusal.why for row in run.rows for refusal in row.changes.refused}


def test_post_norm_is_not_folded_and_the_stream_is_refused():
    program = aqtx.trace(PostNorm())
    found = refusals(program, FUSED[:1])
    assert found == {"post": "its gain cannot be folded: aten.add.Tensor (add) reads it, which is no linear"}
    with pytest.raises(InputError, match=r"residual.*rms_norm.* takes part in what is added to the residual stream"):
        rotated(program, R1[1:])
    assert refusals(program, [("insert_hadamard", {"before": ["down"], "block": 32})]) == {}


def test_layer_norm_is_not_folded():
    found = refusals(aqtx.trace(PostNorm(post=False, layer_norm=True)), FUSED[:1])
    assert list(found.values()) == ["its gain cannot be folded: it is a LayerNorm, which subtracts the mean"]


def test_stream_that_is_scaled_channel_by_channel_is_refused():
    with pytest.raises(InputError, match=r"aten.mul.Tensor"):
        rotated(aqtx.trace(PostNorm(post=False, scale_stream=True)), R1[:2])


def test_stream_scaled_as_a_whole_with_biased_writers_is_fused():
    program = aqtx.trace(PostNorm(post=False).double())
    assert refusals(program, R1) == {} and rotations(program) == []


def test_q_and_k_norms_are_not_folded_and_say_why():
    found = refusals(tiny(), FUSED[:1])
    assert sorted(name.split(".")[-2] for name in found) == ["k_norm", "k_norm", "q_norm", "q_norm"]
    assert all("reads it, which is no linear" in why for why in found.values())


def test_rotation_without_folded_norms_stays_online():
    program = tiny()
    found = refusals(program, R1[1:])
    assert all("is a gain between the stream and the rotation: run `fold_norms` first" in why for why in found.values())
    assert len(found) == 2 * 6 + 1 and rotations(program)


def test_rotation_of_some_readers_stays_online():
    steps = [FUSED[0], ("insert_hadamard", {"before": ["attn_q"], "block": "full"}), FUSED[4]]
    found = refusals(tiny(), steps)
    stays = [why for name, why in found.items() if name.startswith("hadamard before")]
    assert len(stays) == 2 and all("reads the residual stream without the same rotation" in why for why in stays)


def test_clipped_values_and_products_stay_online():
    program = tiny(clip_qkv=0.3, num_key_value_heads=4)
    found = refusals(program, FUSED[2:])
    assert "aten.clamp.default" in found["hadamard before model.layers.0.self_attn.o_proj.weight"]
    assert "aten.mul.Tensor" in found["hadamard before model.layers.1.mlp.experts.down_proj"]


def test_block_wider_than_a_head_stays_online():
    found = refusals(tiny(), [("insert_hadamard", {"before": ["attn_o"], "block": 32}), FUSED[4]])
    assert all("a block of 32 does not lie in the 16 columns before aten.flatten" in why for why in found.values())
    assert len(found) == 2


def test_widths_that_do_not_fit_name_what_would():
    program = tiny(intermediate_size=48)
    assert set(refusals(program, [("insert_hadamard", {"before": ["mlp_down"]})]).values()) == {
        "a block of 32 does not divide 48 inputs; of 16 to 128 [16] does"
    }
    assert refusals(program, [("insert_hadamard", {"before": ["mlp_down"], "block": "full"})]) == {}


def test_a_second_rotation_of_one_input_is_refused():
    program = tiny()
    steps = [("insert_hadamard", {"before": ["mlp_down"]})] * 2
    assert set(refusals(program, steps).values()) == {"its input is rotated already"}


def test_single_experts_cannot_be_rotated_alone():
    found = refusals(tiny(), [("insert_hadamard", {"before": ["*.experts.1.down_proj"]})])
    assert len(found) == 2 and all("select all of them or none" in why for why in found.values())


def test_quantized_weights_are_not_rotated():
    program = tiny()
    site = next(site for site in program.sites() if site.category == "mlp_down")
    program.codes[site.name] = aqtx.formats.quantize(program.read(site), "mxfp4")
    with pytest.raises(InputError, match=f"{site.name} is quantized already"):
        rotated(program, FUSED[3:4])


def test_tied_head_is_left_alone_when_asked():
    program = tiny("llama")
    found = refusals(program, [("fold_norms", {"untie": False})])
    why = "its gain cannot be folded: its reader shares the embedding's weights and `untie` is off"
    assert found == {"model.norm.weight": why}
    assert program.weights.shared() == {"lm_head.weight": "model.embed_tokens.weight"}


def test_gains_are_not_folded_through_a_rotation_that_stands_before_their_linears():
    program = aqtx.trace(PostNorm(post=False))
    found = refusals(program, [("insert_hadamard", {"before": ["residual"], "block": 32}), *FUSED[:1]])
    assert found["pre"] == (
        "its gain cannot be folded: a rotation runs before gate.weight; `fold_norms` goes before `insert_hadamard`"
    )
    assert "last" in found and program.weights.written() == {}
    other = aqtx.trace(PostNorm(post=False))
    assert refusals(other, [("insert_hadamard", {"before": ["down"], "block": 32}), *FUSED[:1]]) == {}
