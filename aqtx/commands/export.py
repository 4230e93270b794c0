"""`aqtx export`: a quantized checkpoint in a form that other tools load."""

import argparse
from pathlib import Path

from aqtx.commands import Command
from aqtx.commands.tables import format_bytes

FORMS = (
    "dequantized",
    "compressed-tensors",
    "gguf",
    "torchao",
)  # of aqtx/checkpoint/exports/table.py, which imports torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the form and the place."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="a folder that `aqtx apply` wrote")
    parser.add_argument(
        "--to",
        required=True,
        choices=FORMS,
        help="compressed-tensors: for vLLM and transformers; gguf: for llama.cpp; torchao: its own tensors; "
        "dequantized: plain weights",
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="where to (default: beside DIR, named for the form)"
    )
    parser.add_argument(
        "--template",
        type=Path,
        metavar="FILE",
        help="GGUF file of the same model: its metadata and tokenizer are taken",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not decode and compare what was written")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of dequantized weights"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write it and tell what it is good for."""
    import torch

    from aqtx.checkpoint.exports.run import export

    made = export(
        arguments.directory,
        arguments.to,
        arguments.output,
        template=arguments.template,
        verify=not arguments.no_verify,
        dtype=getattr(torch, arguments.dtype),
    )
    print(f"{made.path}: {format_bytes(made.bytes)}{' for ' + ', '.join(made.clients) if made.clients else ''}")
    for note in made.notes:
        print(note)
    if made.checked is not None:
        exact = made.checked.values - made.checked.allowed
        told = f"{exact:,} of {made.checked.values:,} values read back equal" if made.checked.values else ""
        print(f"{told}{f', the others within {made.checked.worst:.1e}' if made.checked.allowed else ''}")
    return 0


COMMAND = Command(
    name="export",
    summary="write a quantized checkpoint in a form that other tools load",
    example="aqtx export out/quickstart --to gguf",
    add_arguments=add_arguments,
    run=run,
)
