"""`aqtx generate`: text from a model, as it comes."""

import argparse
import sys
import time

from aqtx.commands import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the prompt."""
    parser.add_argument("model", metavar="MODEL", help="a folder that `aqtx apply` wrote, or any model that aqtx reads")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the prompt, then each piece of text as soon as its tokens are there."""
    import torch

    from aqtx.checkpoint.huggingface.generate import generator_of
    from aqtx.checkpoint.open import open_program
    from aqtx.errors import InputError
    from aqtx.machine.devices import device_of
    from aqtx.program.generate import Sampling
    from aqtx.text.tokens import load_tokenizer, prompt_ids

    if arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p)
    program = open_program(arguments.model, None).to(device_of(arguments.device))
    if program.folder is None:
        raise InputError(f"{arguments.model} has no folder with a tokenizer")
    tokenizer = load_tokenizer(program.folder)
    prompt = prompt_ids(tokenizer, arguments.prompt, chat=arguments.chat)
    generator, written = generator_of(program), ""
    if not arguments.chat:
        print(arguments.prompt, end="", flush=True)
    ends = program.config.get("eos_token_id")
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def stop(made: list[int]) -> bool:
        nonlocal written
        if made[-1] in stops:
            return True
        text = tokenizer.decode(made)
        if not text.endswith("\ufffd"):  # half of a character: wait for its other token
            sys.stdout.write(text[len(written) :])
            sys.stdout.flush()
            written = text
        return False

    random, started = torch.Generator().manual_seed(arguments.seed), time.perf_counter()
    [made] = generator.continue_prompts(
        [prompt], max_new_tokens=arguments.max_new_tokens, stop=stop, sampling=sampling, random=random
    )
    print()
    rate = len(made) / (time.perf_counter() - started)
    print(f"{len(made)} tokens behind a prompt of {len(prompt)}, {rate:.1f} tokens/s", file=sys.stderr)
    return 0


COMMAND = Command(
    name="generate",
    summary="continue a prompt with a model, quantized or not",
    example='aqtx generate out/quickstart --prompt "The history of" --max-new-tokens 32',
    add_arguments=add_arguments,
    run=run,
)
