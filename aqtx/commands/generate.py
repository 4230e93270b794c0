"""`aqtx generate`: greedy text from a model, as it comes."""

import argparse
import sys

from aqtx.commands import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the prompt."""
    parser.add_argument("model", metavar="MODEL", help="a folder that `aqtx apply` wrote, or any model that aqtx reads")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (default: 64)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the prompt, then each piece of text as soon as its tokens are there."""
    from aqtx.checkpoint.open import open_program
    from aqtx.errors import InputError
    from aqtx.machine.devices import device_of
    from aqtx.program.generate import Generator
    from aqtx.text.tokens import load_tokenizer

    if arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    program = open_program(arguments.model, None).to(device_of(arguments.device))
    if program.folder is None:
        raise InputError(f"{arguments.model} has no folder with a tokenizer")
    tokenizer = load_tokenizer(program.folder)
    prompt = tokenizer.encode(arguments.prompt)
    if not prompt:
        raise InputError("the prompt holds no token")
    written = ""
    print(arguments.prompt, end="", flush=True)

    def stop(made: list[int]) -> bool:
        nonlocal written
        if made[-1] == tokenizer.eos_token_id:
            return True
        text = tokenizer.decode(made)
        if not text.endswith("\ufffd"):  # half of a character: wait for its other token
            sys.stdout.write(text[len(written) :])
            sys.stdout.flush()
            written = text
        return False

    Generator(program).continue_greedily([prompt], max_new_tokens=arguments.max_new_tokens, stop=stop)
    print()
    return 0


COMMAND = Command(
    name="generate",
    summary="continue a prompt greedily with a model, quantized or not",
    example='aqtx generate out/quickstart --prompt "The history of" --max-new-tokens 32',
    add_arguments=add_arguments,
    run=run,
)
