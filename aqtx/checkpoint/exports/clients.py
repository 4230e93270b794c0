"""The programs that run an export, a row each: what they fuse, and what they cannot run though it can be written.

Found by running them: vLLM 0.32 on a CPU, transformers 5.24 with compressed-tensors 0.20, llama.cpp of October 2026.
"""

from aqtx.checkpoint.exports.target import Client
from aqtx.formats.table import E8M0, NVFP4_SCALE, Format

_QKV = r"(.*)\.[qkv]_proj$"
_GATE_UP = r"(.*)\.(?:gate_proj|up_proj|w1|w3)$"
_EXPERTS = r"(.*)\.experts\.\d+\."
_ALL_EXPERTS = r"()\.experts\.\d+\."
_STACKS = r"(.*\.experts)\.\d+\.(.*)"


def _is_expert(site: str) -> bool:
    return ".experts." in site


def _vllm(fmt: Format, site: str) -> str | None:
    if fmt.scale is E8M0 and fmt.element.bits == 6:
        return "vLLM runs no MXFP6"
    return None


def _transformers(fmt: Format, site: str) -> str | None:
    if fmt.scale is NVFP4_SCALE and _is_expert(site):
        return "transformers computes NVFP4 experts wrongly, without a word"
    if fmt.scale is E8M0 and fmt.element.bits == 8 and _is_expert(site):
        return "transformers reads the scales of MXFP8 experts in a wrong shape"
    if fmt.asymmetric:
        return "transformers reads the zero points of asymmetric codes in a wrong shape"
    return None


def _transformers_inputs(site: str, activation: str) -> str | None:
    if _is_expert(site) and activation.startswith("int8"):
        return "transformers loads no W8A8 experts"
    return None


def _llama_cpp(fmt: Format, site: str) -> str | None:
    if fmt.scale is NVFP4_SCALE and _is_expert(site):
        return "llama.cpp loads no outer scale of NVFP4 experts and computes NaN"
    return None


CLIENTS: dict[str, Client] = {
    client.name: client
    for client in (
        Client(
            name="vllm",
            target="compressed-tensors",
            alike=(_QKV, _GATE_UP, _EXPERTS),
            why=("it fuses q, k and v", "it fuses gate and up", "the experts of a layer share one format"),
            refuses=_vllm,
            shared_scale=(_QKV, _GATE_UP),
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
