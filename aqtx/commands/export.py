"""`aqtx export`: a quantized checkpoint in a form that other tools load."""

import argparse
from pathlib import Path

from aqtx.commands import Command
from aqtx.commands.tables import format_bytes

FORMS = ("dequantized",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the form and the place."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="a folder that `aqtx apply` wrote")
    parser.add_argument("--to", required=True, choices=FORMS, help="dequantized: plain weights without any codes")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to (default: DIR-dequantized)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the plain weights"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and tell its size."""
    import torch

    from aqtx.checkpoint.export import export_dequantized

    source: Path = arguments.directory
    output = arguments.output or source.with_name(f"{source.name}-{arguments.to}")
    made = export_dequantized(source, output, dtype=getattr(torch, arguments.dtype))
    print(f"{made.directory}: {format_bytes(made.bytes)} of {arguments.dtype} weights")
    if made.activations:
        print(
            f"activations of {made.activations} weights were quantized as the model ran; plain weights leave that out"
        )
    return 0


COMMAND = Command(
    name="export",
    summary="write a quantized checkpoint in a form that other tools load",
    example="aqtx export out/quickstart --to dequantized",
    add_arguments=add_arguments,
    run=run,
)
