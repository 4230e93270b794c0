"""`aqtx generate`: text from a model, as it comes."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqtx.commands import Command, seed
from aqtx.commands.tables import format_bytes

if TYPE_CHECKING:
    import torch

    from aqtx.program.generate import Continues

_MOST_TOKENS = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the prompt."""
    parser.add_argument("model", metavar="MODEL", help="a folder that `aqtx apply` wrote, or any model that aqtx reads")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens only")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the model first, once, and keep that in the user's cache; without either option a compiled model "
        "is taken where one is kept",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the prompt, then each piece of text as soon as its tokens are there."""
    started = time.perf_counter()
    import torch

    from aqtx.errors import InputError
    from aqtx.machine.devices import device_of
    from aqtx.program.generate import Sampling
    from aqtx.text.tokens import load_tokenizer, prompt_ids

    if not 1 <= arguments.max_new_tokens <= _MOST_TOKENS:
        raise InputError(f"--max-new-tokens must be 1 to {_MOST_TOKENS:,}, got {arguments.max_new_tokens}")
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p)
    generator, folder, config = _open(arguments.model, device_of(arguments.device), arguments.compile)
    tokenizer = load_tokenizer(folder)
    prompt = prompt_ids(tokenizer, arguments.prompt, chat=arguments.chat)
    if not arguments.chat:
        print(arguments.prompt, end="", flush=True)
    ends = config.get("eos_token_id")
    text = _Text(tokenizer, {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])})
    random = torch.Generator().manual_seed(arguments.seed)
    [made] = generator.continue_prompts(
        [prompt], max_new_tokens=arguments.max_new_tokens, stop=text.add, sampling=sampling, random=random
    )
    print()
    print(f"{len(made)} tokens behind a prompt of {len(prompt)}{text.told(started)}", file=sys.stderr)
    return 0


class _Text:
    """What was made so far, on standard output as it comes."""

    def __init__(self, tokenizer: Any, ends: set[int | None]) -> None:
        self._tokenizer, self._ends, self._written = tokenizer, ends, ""
        self._times: list[float] = []

    def add(self, made: list[int]) -> bool:
        """Write what the newest token adds; whether the text ends with it."""
        self._times.append(time.perf_counter())
        if made[-1] in self._ends:
            return True
        text = self._tokenizer.decode(made)
        if not text.endswith("\ufffd"):  # half of a character: wait for its other token
            sys.stdout.write(text[len(self._written) :])
            sys.stdout.flush()
            self._written = text
        return False

    def told(self, started: float) -> str:
        """When the first token came, and how fast the others followed."""
        first, last = self._times[0], self._times[-1]
        rate = f", {(len(self._times) - 1) / (last - first):.1f} tokens/s after it" if last > first else ""
        return f": the first after {first - started:.2f} s{rate}"


def _open(model: str, device: "torch.device", compiled: bool | None) -> tuple["Continues", Path, dict[str, Any]]:
    """A generator, compiled where one is kept or asked for; the folder of its tokenizer; its config."""
    from aqtx.checkpoint import package_cache
    from aqtx.checkpoint.huggingface.generate import generator_of
    from aqtx.checkpoint.locate import locate
    from aqtx.checkpoint.open import open_program
    from aqtx.errors import InputError
    from aqtx.models import load_config
    from aqtx.program.generate import Generator

    folder = None if Path(model).suffix == ".gguf" else locate(model)
    package = None
    if folder is not None and compiled is not False:
        package = package_cache.find(folder, device)
    if folder is not None and package is not None:
        return Generator.over(package), folder, load_config(folder)
    program = open_program(model, None).to(device)
    if program.folder is None:
        raise InputError(f"{model} has no folder with a tokenizer")
    if not compiled:
        return generator_of(program), program.folder, program.config
    if folder is None:
        raise InputError(f"{model} is a file, and only folders are compiled; leave --compile out")
    print(f"aqtx: compiling {model}, once; this may take minutes", file=sys.stderr)
    began = time.perf_counter()
    package, file = package_cache.make(folder, program)
    took, size = time.perf_counter() - began, format_bytes(file.stat().st_size)
    print(f"aqtx: compiled in {took:.0f} s and kept as {file} ({size})", file=sys.stderr)
    return Generator.over(package), folder, program.config


COMMAND = Command(
    name="generate",
    summary="continue a prompt with a model, quantized or not",
    example='aqtx generate out/quickstart --prompt "The history of" --max-new-tokens 32',
    add_arguments=add_arguments,
    run=run,
)
