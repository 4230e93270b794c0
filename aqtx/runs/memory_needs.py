"""What each stage of a recipe will take at most: memory, disk, and what streams. Told before anything is read.

All of it follows from shapes. A stage holds what the process holds already, and beside that

    matrices   some copies of the largest matrix that it works on
    forward    a block's weights and, on the way, what its linears read and write for one batch
    backward   the same, with what autograd keeps, a gradient for each of it, and errors of one matrix
    trials     forward, with a changed stream for each trial
    rounding   forward, with moments of as many experts as the limit has room for
    text       the whole model, or as many of its blocks as fit into a half of the room, and caches of what is written
    training   the whole model with what all its blocks keep of a step, or backward one block at a time; either way what
               trains in float32 with its gradient and moments, and what flows into the original's last block

What waits between two blocks is in memory where it is a small part of the room, else on disk.
"""

from dataclasses import dataclass, field

import torch

from aqtx.blockwise.block_scores import RESIDENT_SHARE
from aqtx.blockwise.block_steps import staying
from aqtx.blockwise.block_writer import CACHE_SHARE, HELD_SHARE
from aqtx.blockwise.gptq_block import solver_bytes
from aqtx.blockwise.work_size import (
    activation_bytes,
    block_bytes,
    cache_bytes,
    copied_bytes,
    parameter_bytes,
    sequences_at_once,
    stream_bytes,
    tokens_at_once,
)
from aqtx.finetune.chain import WAITING
from aqtx.finetune.student import MASTER_COPIES, logit_bytes, rows_of, training_bytes
from aqtx.finetune.targets import SHARE, waiting_bytes
from aqtx.machine.half_products import SLOW
from aqtx.machine.memory import resident_bytes, room_for_work
from aqtx.planning.options import divide
from aqtx.planning.settings import Settings
from aqtx.program.blocks import split_blocks
from aqtx.program.program import Program
from aqtx.registry import Pass, Walks
from aqtx.runs.recipe import Recipe
from aqtx.sensitivity.text_gradients import TOKENS_PER_BATCH
from aqtx.text.calibration_spec import WRITTEN, CalibrationSpec
from aqtx.text.own_text import BATCH
from aqtx.text.self_sampling import BEAMS, PARALLEL

FORWARD_COPIES = 1.2  # of what linears read and write: norms, products, copies in another order
BACKWARD_COPIES = 5.0  # what autograd keeps of a batch, the gradients, the rows laid aside
TRAINING_COPIES = 2.5  # the same without rows
COMPILER = 400_000_000  # Inductor, what it imports and what it makes
# libraries, once they compute: the tokenizer's, and kernels that oneDNN compiles for bf16 where the processor has it
KERNELS = 60_000_000 if torch.bfloat16 in SLOW else 300_000_000
EBSS_ROWS = PARALLEL * BEAMS**2
EBSS_COPIES = 1.5  # of its caches: those of the beams, of their candidates, and of what is chosen
READ_BYTES = 1_000_000_000  # a second, from a disk
FEW_KERNELS = min(KERNELS, 100_000_000)  # the same where batches are of one shape
EVALUATED_TOKENS = 200_000  # where a recipe does not say how many
BY_BLOCKS = "one block at a time"


@dataclass(frozen=True)
class Need:
    """One stage's row of the table, in bytes."""

    stage: str
    peak: int  # of RssAnon + RssShmem, all that the process holds
    disk: int
    streams: str


@dataclass
class Sizes:
    """A program's sizes, what the process holds, and the room there is beside it."""

    program: Program
    held: int
    room: int
    block: int = field(init=False)  # a block's weights while they are loaded
    model: int = field(init=False)  # all weights

    def __post_init__(self) -> None:
        """Of a stack all experts are read, then copied: that of the largest counts twice."""
        program, specs = self.program, self.program.weights.specs
        self.blocks = split_blocks(program.graph, specs)
        largest = max((spec.numel * spec.dtype.itemsize for spec in specs.values()), default=0)
        self.block = largest + max(block_bytes(program, block) for block in self.blocks)
        self.model = parameter_bytes(program, specs)
        self.tokens = tokens_at_once(program, self.blocks)

    def need(self, stage: str, peak: int, disk: int = 0, streams: str = "no", *, kernels: int = KERNELS) -> Need:
        """A row; the peak is given beside what is held and what libraries take."""
        return Need(stage, self.held + kernels + peak, disk, streams)

    def batch(self, tokens: int, copies: float) -> int:
        """What a block computes on the way for so many tokens."""
        return int(copies * tokens * activation_bytes(self.program, self.blocks))

    def waiting(self, num_bytes: int, share: int) -> tuple[int, int]:
        """Memory and disk of what waits, which goes to disk where it takes more than a share of the room."""
        return (0, num_bytes) if num_bytes > self.room // share else (num_bytes, 0)


def needs(recipe: Recipe, program: Program) -> list[Need]:
    """The table's rows, in the order of the run."""
    sizes = Sizes(program, resident_bytes(), room_for_work(program.device, recipe.memory_limit))
    passes = [pass_need(sizes, step, recipe) for step in recipe.passes]
    if any(step.walks()[0] != "matrices" for step in recipe.passes):
        passes = [*text_needs(sizes, recipe), *passes]
    if recipe.evaluate is None:
        return passes
    before, after = (evaluation_need(sizes, recipe, when) for when in ("before", "after"))
    return [before, *passes, after]


def problems(recipe: Recipe, program: Program) -> list[str]:
    """A sentence where a limit does not even hold a block; its nearest setting is the largest stage's."""
    if recipe.memory_limit is None and program.device.type != "cpu":
        return []
    largest = max(needs(recipe, program), key=lambda need: need.peak, default=None)
    limit = recipe.memory_limit or resident_bytes() + room_for_work(program.device)
    if largest is None or largest.peak <= limit:
        return []
    nearest = -(-largest.peak // 10**8) * 100
    return [
        f"max_memory: {largest.stage} needs about {largest.peak / 1e9:.2f} GB with all that can wait on disk there, "
        f"and {limit / 1e9:.2f} GB may be taken; the nearest setting that does is max_memory={nearest}MB"
    ]


def evaluation_need(sizes: Sizes, recipe: Recipe, when: str) -> Need:
    """Scoring the model as it is, or with what is planned packed. What lies mapped in files is not held."""
    assert recipe.evaluate is not None
    program, specs = sizes.program, sizes.program.weights.specs
    planned, packed = _planned_bytes(program, recipe) if when == "after" else (0, 0)
    model, held = sizes.model - planned + packed, max(copied_bytes(program, specs) - planned, 0) + packed
    tokens = min(sizes.tokens, recipe.evaluate.max_tokens or sizes.tokens)
    stage, work = f"evaluate {when}", sizes.batch(tokens, FORWARD_COPIES)
    if model <= sizes.room // RESIDENT_SHARE:
        return sizes.need(stage, held + work)
    num_bytes = stream_bytes(program, recipe.evaluate.max_tokens or EVALUATED_TOKENS)
    memory, disk = sizes.waiting(num_bytes, 8)
    block = max(copied_bytes(program, (str(node.target) for node in part.parameters)) for part in sizes.blocks)
    return sizes.need(stage, block * held // max(held - packed + planned, 1) + work + memory, disk, BY_BLOCKS)


def _planned_bytes(program: Program, recipe: Recipe) -> tuple[int, int]:
    """What the planned matrices take as the program computes with them, and packed."""
    plans = [step for step in recipe.passes if isinstance(step, Settings)]
    if not plans:
        return 0, 0
    numel = sum(site.numel for site in divide(program, plans[-1], measured=False).planned)
    widest = max((fmt.bits((4096, 4096)) for fmt in plans[-1].formats), default=16.0)
    return numel * program.dtype.itemsize, int(numel * (plans[-1].average_bits or widest) / 8)


def text_needs(sizes: Sizes, recipe: Recipe) -> list[Need]:
    """Calibration text that the model writes itself, at the first pass that reads it: a row for each such source."""
    parts = recipe.calibration.parts().items()
    return [_written_need(sizes, part) for source, part in parts if source in WRITTEN]


def _written_need(sizes: Sizes, part: CalibrationSpec) -> Need:
    """Every token is a walk over the model; `ebss` grows groups of sequences one by one, with caches in memory."""
    program, own = sizes.program, part.source == "self"
    stage = "own text" if own else "ebss text"
    streams = sizes.model > sizes.room // HELD_SHARE
    rows = (part.num_sequences if streams else min(part.num_sequences, BATCH)) if own else EBSS_ROWS
    cache = cache_bytes(program, rows * part.sequence_length)
    if not streams:
        return sizes.need(stage, sizes.model + int(cache * (1 if own else EBSS_COPIES)), kernels=FEW_KERNELS)
    memory, disk = sizes.waiting(cache, CACHE_SHARE) if own else (int(EBSS_COPIES * cache), 0)
    walks = part.sequence_length * (1 if own else -(-part.num_sequences // PARALLEL))
    held = sum(staying(program, sizes.blocks, sizes.room // HELD_SHARE).values()) if own else 0
    hours = walks * (sizes.model - held) / READ_BYTES / 3600
    told = f"one block at a time: {walks:,} walks over {sizes.model / 1e9:.1f} GB, {hours:.1f} h at 1 GB/s"
    return sizes.need(stage, held + sizes.block + memory, disk, told, kernels=FEW_KERNELS)


def pass_need(sizes: Sizes, step: Pass, recipe: Recipe) -> Need:
    """One pass's row."""
    walks, count = step.walks()
    sequences = min(count or recipe.calibration.num_sequences, recipe.calibration.num_sequences)
    tokens = sequences * recipe.calibration.sequence_length
    matrix = _matrix_bytes(sizes.program, step, recipe)
    if walks == "matrices":
        return sizes.need(step.name, matrix, streams="one matrix at a time")
    if walks == "training":
        return _training_need(sizes, step, recipe)
    batch, kept, share = _walk(sizes, walks, tokens, recipe.calibration.sequence_length)
    memory, disk = sizes.waiting(kept, share)
    peak = sizes.block + batch + memory + matrix
    if walks == "rounding":
        peak, disk = peak + _moments(sizes, peak), disk + sizes.model // 2
    return sizes.need(step.name, peak, disk, BY_BLOCKS)


def _matrix_bytes(program: Program, step: Pass, recipe: Recipe) -> int:
    """What a pass takes at most for one matrix: of those that are planned, once there is a plan, else of its own."""
    plans = [other for other in recipe.passes[: recipe.passes.index(step) + 1] if isinstance(other, Settings)]
    sites = divide(program, plans[-1], measured=False).planned if plans else step.find(program)
    shapes = {site.shape for site in sites or program.sites()}
    if step.walks()[0] == "rounding":
        return max((solver_bytes(*shape) for shape in shapes), default=0)
    return max((4 * step.matrix_copies * rows * columns for rows, columns in shapes), default=0)


def _training_need(sizes: Sizes, step: Pass, recipe: Recipe) -> Need:
    """What trains is what the passes marked that this one requires."""
    program, length, (_, count) = sizes.program, recipe.calibration.sequence_length, step.walks()
    marked = [site for other in recipe.passes if other.name in step.requires for site in other.find(program)]
    trained = 4 * MASTER_COPIES * sum(site.numel for site in marked)
    batch = min(count or 1, recipe.calibration.num_sequences), length
    memory, disk = sizes.waiting(waiting_bytes(program, recipe.calibration.num_tokens), SHARE)
    whole = training_bytes(program, batch[0] * length)
    if whole + trained <= sizes.room - memory:
        compiler = COMPILER if step.compiles(recipe.calibration.num_tokens) else 0
        return sizes.need(step.name, max(whole, sizes.block) + trained + memory + compiler, disk)
    rows = rows_of(program, batch) * length
    flowing = max(len(sizes.blocks) * stream_bytes(program, batch[0] * length), WAITING)
    work = sizes.batch(rows, TRAINING_COPIES) + logit_bytes(program, rows) + flowing
    return sizes.need(step.name, sizes.block + work + trained + memory, disk, BY_BLOCKS)


def _walk(sizes: Sizes, walks: Walks, tokens: int, length: int) -> tuple[int, int, int]:
    """What a batch takes, what waits between blocks, and the share of the room that may wait in memory."""
    stream = stream_bytes(sizes.program, tokens)
    if walks == "backward":
        sequences = sequences_at_once(sizes.program, sizes.blocks, length, TOKENS_PER_BATCH // length)
        kept = len(sizes.blocks) * stream + sizes.batch(tokens, 1)
        return sizes.batch(min(sequences * length, tokens), BACKWARD_COPIES), kept, 4
    if walks == "trials":
        return sizes.batch(tokens, FORWARD_COPIES), stream * len(sizes.program.sites()), 4
    rows = min(sizes.tokens, TOKENS_PER_BATCH, tokens)
    return sizes.batch(rows, FORWARD_COPIES), stream, 4


def _moments(sizes: Sizes, taken: int) -> int:
    """Moments [K, K] of a stage's experts, or of as many as fit."""
    by_node: dict[object, int] = {}
    for site in sizes.program.sites():
        by_node[site.node] = by_node.get(site.node, 0) + 4 * site.shape[1] ** 2
    return min(max(by_node.values(), default=0), max(sizes.room - taken, 0))
