"""How much memory parts of a model take, from shapes alone: what decides whether something streams."""

from collections.abc import Iterable, Sequence

from torch import fx

from aqtx.formats import parse
from aqtx.program.accounting import chosen_experts
from aqtx.program.blocks import Block
from aqtx.program.program import Program
from aqtx.program.site import LINEAR, weight_node

ACTIVATION_BYTES = 256 << 20  # of one batch in one block, roughly: enough for full speed
MAX_TOKENS = 8192
BACKWARD_SHARE = 4  # autograd keeps what a forward pass lets go, and each of it gets a gradient


def block_bytes(program: Program, block: Block) -> int:
    """What a block's parameters take as they stand: packed where codes are packed."""
    return parameter_bytes(program, {str(node.target) for node in block.parameters})


def parameter_bytes(program: Program, names: Iterable[str]) -> int:
    """What parameters take as they stand, buffers left out."""
    sites = program.sites_by_weight() if program.emitted or program.weights.formats else {}
    total = 0
    for name in names:
        spec = program.weights.specs.get(name)
        for site in sites.get(name, []):
            codes = program.codes.format_of(site.name) if program.emitted else None
            told = codes or program.weights.packed_as(name, site.name)
            bits = parse(told).bits(site.shape) if told is not None else 8 * program.dtype.itemsize
            total += int(site.numel * bits / 8)
        if spec is not None and name not in sites:
            total += spec.numel * spec.dtype.itemsize
    return total


def copied_bytes(program: Program, names: Iterable[str]) -> int:
    """The same of those that are copied to be loaded; others lie mapped in files, which the system drops at need."""
    weights, mapped = program.weights, program.device.type == "cpu"
    return parameter_bytes(
        program, [name for name in names if name in weights.specs and not (mapped and weights.is_mapped(name))]
    )


def row_bytes(program: Program, node: fx.Node) -> int:
    """What the inputs and outputs of a linear take for one token."""
    weight = weight_node(node)
    if weight is None or str(weight.target) not in program.weights.specs:
        return 0
    shape = program.weights.specs[str(weight.target)].shape
    share = 1 if node.target is LINEAR else (chosen_experts(program) or 1)
    return share * (shape[-1] + shape[-2]) * program.dtype.itemsize


def activation_bytes(program: Program, blocks: Sequence[Block]) -> int:
    """What the linears of the widest block read and write for one token."""
    return max((sum(row_bytes(program, node) for node in block.nodes) for block in blocks), default=0)


def tokens_at_once(program: Program, blocks: Sequence[Block]) -> int:
    """Tokens of one batch, a power of two by shapes alone: the same batches on every machine."""
    fitting = max(ACTIVATION_BYTES // max(activation_bytes(program, blocks), 1), 1)
    return min(1 << (fitting.bit_length() - 1), MAX_TOKENS)


def sequences_at_once(program: Program, blocks: Sequence[Block], length: int, most: int) -> int:
    """Sequences of a batch that goes backward too, at most so many, at least one."""
    return max(min(tokens_at_once(program, blocks) // BACKWARD_SHARE // length, most), 1)


def stream_bytes(program: Program, num_tokens: int) -> int:
    """What flows between two blocks for so many tokens."""
    return num_tokens * int(program.config.get("hidden_size", 0)) * program.dtype.itemsize


def cache_bytes(program: Program, num_tokens: int) -> int:
    """What a cache of keys and values takes for so many tokens; states of linear attention are left out."""
    kept = [site.shape[0] for site in program.sites() if site.category in ("attn_k", "attn_v", "attn_latent")]
    return num_tokens * sum(kept) * program.dtype.itemsize
