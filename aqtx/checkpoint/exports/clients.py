"""The programs that run an export, a row each: what they fuse, and what they cannot run though it can be written.

Found by running them: vLLM 0.32 on a CPU, transformers 5.24 with compressed-tensors 0.20, llama.cpp of October 2026.
"""

import re

from gguf import GGML_QUANT_SIZES

from aqtx.checkpoint.exports.gguf_families import FAMILIES
from aqtx.checkpoint.exports.gguf_rules import parts_of
from aqtx.checkpoint.exports.gguf_types import kind_of
from aqtx.checkpoint.exports.target import Client, Matrix
from aqtx.formats.table import E8M0, NVFP4_SCALE, Format

_QKV = r"(.*)\.[qkv]_proj$"
_GATE_UP = r"(.*)\.(?:gate_proj|up_proj|w1|w3)$"
_LATENT = r"(.*)\.(?:q_a_proj|kv_a_proj_with_mqa)$"
_DELTA = r"(.*)\.in_proj_(?:qkv|z)$"
_DELTA_GATES = r"(.*)\.in_proj_[ab]$"
_EXPERTS = r"(.*)\.experts\.\d+\."
_ALL_EXPERTS = r"()\.experts\.\d+\."
_STACKS = r"(.*\.experts)\.\d+\.(.*)"
_FUSED_BY_VLLM = {
    _QKV: "it fuses q, k and v",
    _GATE_UP: "it fuses gate and up",
    _LATENT: "it fuses the latent projections of queries and keys",
    _DELTA: "it fuses the input projections of linear attention",
    _DELTA_GATES: "it fuses the input projections of linear attention",
}


def _is_expert(site: str) -> bool:
    return ".experts." in site


def _short_rows(client: str, fmt: Format, matrix: Matrix) -> str | None:
    """Experts whose row is no whole group: told as one scale a row, unlike the longer rows beside them."""
    if fmt.block is not None and matrix.columns < fmt.block and _is_expert(matrix.site):
        return f"{client} reads all matrices of an expert in groups of one size, longer than its shortest row"
    return None


def _vllm(fmt: Format, matrix: Matrix) -> str | None:
    if fmt.scale is E8M0 and fmt.element.bits == 6:
        return "vLLM runs no MXFP6"
    return _short_rows("vLLM", fmt, matrix)


def _transformers(fmt: Format, matrix: Matrix) -> str | None:
    if fmt.scale is NVFP4_SCALE and _is_expert(matrix.site):
        return "transformers computes NVFP4 experts wrongly, without a word"
    if fmt.scale is E8M0 and fmt.element.bits == 8 and _is_expert(matrix.site):
        return "transformers reads the scales of MXFP8 experts in a wrong shape"
    if fmt.asymmetric:
        return "transformers reads the zero points of asymmetric codes in a wrong shape"
    return _short_rows("transformers", fmt, matrix)


def _transformers_inputs(site: str, activation: str) -> str | None:
    if _is_expert(site) and activation.startswith("int8"):
        return "transformers loads no W8A8 experts"
    return None


def _llama_cpp(fmt: Format, matrix: Matrix) -> str | None:
    """What its code for the family does not read, and blocks that lie across columns that it wants apart."""
    family = FAMILIES.get(str(matrix.config.get("model_type")))
    if fmt.scale is NVFP4_SCALE and _is_expert(matrix.site):
        return "llama.cpp loads no outer scale of NVFP4 experts and computes NaN"
    if family is None:
        return None
    if fmt.scale is NVFP4_SCALE and not re.search(family.outer_scales, matrix.site):
        return f"llama.cpp's {family.arch} loads no outer scale of NVFP4 there"
    kind = kind_of(fmt, matrix.columns)
    for part in parts_of(family.rules, matrix.config, f"{matrix.site}.weight"):
        run = matrix.columns // part.columns.runs if part.columns is not None else 0
        if kind is not None and run % GGML_QUANT_SIZES[kind][0]:
            return f"llama.cpp wants its columns in another order, in runs of {run}, across which blocks lie"
    return None


CLIENTS: dict[str, Client] = {
    client.name: client
    for client in (
        Client(
            name="vllm",
            target="compressed-tensors",
            alike=(*_FUSED_BY_VLLM, _EXPERTS),
            why=(*_FUSED_BY_VLLM.values(), "the experts of a layer share one format"),
            refuses=_vllm,
            shared_scale=tuple(_FUSED_BY_VLLM),
        ),
        Client(
            name="transformers",
            target="compressed-tensors",
            alike=(_ALL_EXPERTS,),
            why=("all experts of the model share one format",),
            refuses=_transformers,
            coded=_ALL_EXPERTS,
            refuses_inputs=_transformers_inputs,
        ),
        Client(
            name="llama.cpp",
            target="gguf",
            alike=(_STACKS,),
            why=("the experts of a layer and projection are one tensor",),
            refuses=_llama_cpp,
        ),
    )
}
