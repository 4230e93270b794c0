"""The model that trains: in memory where it fits with all that training keeps, else one block at a time."""

from aqtx.blockwise.work_size import parameter_bytes, row_bytes, sequences_at_once
from aqtx.finetune.chain import Chain
from aqtx.finetune.routed import Routed, routed
from aqtx.program.blocks import split_blocks
from aqtx.program.program import Program

KEPT_COPIES = 1.2  # of what linears read and write, while all blocks' activations wait for the way back
MASTER_COPIES = 6  # float32: what trains, its gradient, its two moments, where it started, its best
LOGIT_COPIES = 5  # in float32: logarithms and exponentials of the student and of the teacher, gradients


def student_of(program: Program, batch: tuple[int, int], room: int) -> Routed | Chain:
    """The student for batches of sequences [B, S], in so many bytes."""
    if training_bytes(program, batch[0] * batch[1]) <= room:
        return routed(program, rounded=True)
    return Chain.of(program, rows_of(program, batch))


def training_bytes(program: Program, num_tokens: int) -> int:
    """Memory of the whole model in training on so many tokens at a time."""
    work = sum(row_bytes(program, node) for node in program.graph.nodes)
    kept = int(KEPT_COPIES * num_tokens * work) + logit_bytes(program, num_tokens)
    return parameter_bytes(program, program.weights.specs) + kept


def logit_bytes(program: Program, num_tokens: int) -> int:
    """What a loss takes at the head."""
    [logits] = program.graph.output_node().all_input_nodes
    return 4 * LOGIT_COPIES * num_tokens * int(logits.meta["val"].shape[-1])


def rows_of(program: Program, batch: tuple[int, int]) -> int:
    """How many of the sequences [B, S] go through a block together, by shapes alone."""
    blocks = split_blocks(program.graph, program.weights.specs)
    return sequences_at_once(program, blocks, batch[1], batch[0])
