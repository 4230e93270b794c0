"""`aqtx package`: a checkpoint compiled ahead of time, to run without aqtx."""

import argparse
import sys
from pathlib import Path

from aqtx.commands import Command
from aqtx.commands.tables import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the file and the entry."""
    parser.add_argument(
        "directory", metavar="DIR", help="a folder that `aqtx apply` wrote, or any model that aqtx reads"
    )
    parser.add_argument("file", metavar="FILE.pt2", type=Path, help="a new file")
    parser.add_argument(
        "--entry",
        choices=("step", "score"),
        default="step",
        help="step: text goes on from a cache (default); score: logits of whole sequences",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="to run on (default: cpu)")


def run(arguments: argparse.Namespace) -> int:
    """Compile it and tell how it is loaded."""
    from aqtx.checkpoint.exports.package import package
    from aqtx.machine.devices import device_of

    device = device_of(arguments.device)
    made = package(arguments.directory, arguments.file, entry=arguments.entry, device=device, say=_say)
    print(f"{made.path}: {format_bytes(made.path.stat().st_size)}, entry {arguments.entry}, for {device}")
    print(f"logits differ from the uncompiled model's by {made.difference:.1e} of their size")
    if made.kernel is not None:
        print(f"{made.kernel}: decodes its weights; load it first (torch.ops.load_library, or dlopen in C++)")
    return 0


def _say(words: str) -> None:
    print(f"aqtx: {words}", file=sys.stderr)


COMMAND = Command(
    name="package",
    summary="compile a checkpoint ahead of time, to run in Python or C++ without aqtx",
    example="aqtx package out/quickstart quickstart.pt2",
    add_arguments=add_arguments,
    run=run,
)
