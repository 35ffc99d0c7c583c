"""What the commands share: options from the fields of Config and SamplingParams, the LLM they describe, the prompts."""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nanovllm.config import ATTENTION_BACKENDS, DEVICES, DTYPES, Config
from nanovllm.console import read_lines_from_stdin
from nanovllm.engine.chat import chat_prompts
from nanovllm.sampling_params import SamplingParams
from nanovllm.torchrun_env import read_torchrun_env
from nanovllm.validation import require_unicode

# name of the option -> its text in --help. Type, choices and default come from Config and SamplingParams.
CONFIG_HELP = {
    "dtype": "dtype of weights and KV cache; auto takes the checkpoint's",
    "device": "auto takes cuda if there is an NVIDIA GPU, else cpu",
    "attention_backend": "auto takes the fastest that is installed and fits",
    "max_model_len": "longest sequence, prompt and output together, in tokens; lowered to what the model supports",
    "max_num_seqs": "most sequences that run at a time",
    "max_num_batched_tokens": "most tokens that a step computes",
    "kv_cache_block_size": "tokens in a KV block: a multiple of 256; also a power of two, from 16 for auto and triton, "
    "from 1 for torch (default: 64 for triton without --num-kv-cache-blocks, else 256)",
    "num_kv_cache_blocks": "blocks of the KV cache; without it, as many as memory holds",
    "gpu_memory_utilization": "share of the GPU's memory to use",
    "tensor_parallel_size": "GPUs, or processes on a CPU, that share the model; under torchrun, all of its processes",
    "enforce_eager": "never use CUDA graphs",
    "async_scheduling": "submit a decode step before the tokens of the step before are known, or never do "
    "(default: on a GPU, with several ranks where each has its own)",
}
SAMPLING_HELP = {
    "max_tokens": "most tokens to generate for each prompt",
    "temperature": "below 1 is more predictable, above 1 more surprising; 0 is --greedy",
    "top_k": "sample from the k most likely tokens only",
    "top_p": "sample from the smallest set of tokens with this probability",
    "min_p": "drop tokens less likely than this fraction of the most likely one",
    "seed": "the same seed gives the same text, whatever other requests run",
}
_CHOICES = {"dtype": DTYPES, "device": DEVICES, "attention_backend": ATTENTION_BACKENDS}


def add_command(commands: Any, name: str, run: Any, summary: str, operands: str = "") -> argparse.ArgumentParser:
    description = summary[0].upper() + summary[1:] + "."
    usage = f"nanovllm {name} [options]{operands}"
    command = commands.add_parser(name, usage=usage, help=summary, description=description)
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return command


def add_model_options(command: argparse.ArgumentParser, is_model_required: bool = False) -> None:
    group = command.add_argument_group("model and engine")
    text = "a directory in Hugging Face's format, or a hub id such as Qwen/Qwen3-0.6B"
    text += "" if is_model_required else " (default: the bundled model)"
    group.add_argument("--model", metavar="DIR_OR_ID", required=is_model_required, help=text)
    add_options(group, Config, CONFIG_HELP)


def add_sampling_options(command: argparse.ArgumentParser, **defaults: int) -> None:
    """The options that sampling_params reads. defaults: in place of those of SamplingParams."""
    group = command.add_argument_group("sampling")
    group.add_argument("--greedy", action="store_true", help="take the most likely token at every step")
    add_options(group, SamplingParams, SAMPLING_HELP, **defaults)
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end-of-sequence token")


def add_options(group: Any, owner: Any, helps: dict[str, str], **defaults: int) -> None:
    """One option for each field of the dataclass `owner` that `helps` names; not given means None, or `defaults`."""
    fields = {field.name: field for field in dataclasses.fields(owner)}
    for name, text in helps.items():
        option, default = flag(name), defaults.get(name, fields[name].default)
        if isinstance(default, bool):
            group.add_argument(option, action="store_true", default=None, help=text)
            continue
        if fields[name].type == bool | None:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
            continue
        text += "" if default is None else f" (default: {default})"
        if name in _CHOICES:
            group.add_argument(option, choices=_CHOICES[name], help=text)
        else:
            kind = float if isinstance(default, float) else int
            group.add_argument(option, type=kind, default=defaults.get(name), metavar="N", help=text)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def option_names(arguments: argparse.Namespace) -> dict[str, str]:
    """Field name -> option of the command that runs, for messages about them."""
    return {name: flag(name) for name in vars(arguments) if name not in ("run", "debug", "prompts")}


def given(arguments: argparse.Namespace, names: Any) -> dict[str, Any]:
    """The options that the user gave. The others keep the defaults of Config and SamplingParams."""
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def open_llm(arguments: argparse.Namespace) -> Any:
    """The LLM of these options, on all ranks that torchrun started. Prints a note if it is the bundled model."""
    from nanovllm import LLM, bundled_model_path

    options, launch = given(arguments, CONFIG_HELP), read_torchrun_env()
    if launch is not None:
        options.setdefault("tensor_parallel_size", launch.size)
    model = arguments.model
    if model is None:
        model = str(bundled_model_path())
        if launch is None or launch.rank == 0:
            note = "no --model given: using the bundled one, which knows passages of the King James Bible"
            print(note, file=sys.stderr)
    return LLM(model, **options)


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """SamplingParams of these options. --temperature 0 means --greedy, and a note names the options without effect.

    Raises ValueError for a wrong value, used or not, and for --greedy together with another sampling option.
    """
    options, ends = given(arguments, SAMPLING_HELP), {"stop": arguments.stop, "ignore_eos": arguments.ignore_eos}
    is_zero = options.get("temperature") == 0
    if not arguments.greedy and not is_zero:
        return SamplingParams(**options, **ends)
    unused = [name for name in options if name != "max_tokens" and not (name == "temperature" and is_zero)]
    flags = ", ".join(map(flag, unused))
    if arguments.greedy and unused:
        raise ValueError(f"--greedy takes the most likely token at every step: leave out {flags}")
    SamplingParams(**{**options, "temperature": 1.0}, **ends)
    if not arguments.greedy:
        note = f"; {flags} without effect" if unused else ""
        print(f"--temperature 0: taking the most likely token at every step, as --greedy{note}", file=sys.stderr)
    return SamplingParams.greedy(**given(arguments, ["max_tokens"]), **ends)


# --- prompts ---


def add_generation_options(command: argparse.ArgumentParser) -> None:
    """The prompts, and the options of the model, of sampling and of the chat template."""
    text = 'text to continue; "-" reads prompts from standard input, one a line'
    command.add_argument("prompts", nargs="+", metavar="PROMPT", help=text)
    add_model_options(command)
    add_sampling_options(command)
    command.add_argument("--chat", action="store_true", help="apply the model's chat template to each prompt")


@contextmanager
def open_generation(arguments: argparse.Namespace) -> Iterator[tuple[Any, list[str], list[Any], SamplingParams]]:
    """The LLM of these options, the prompts, what LLM.generate gets for each of them, and the sampling parameters."""
    params, prompts = sampling_params(arguments), _read_prompts(arguments.prompts)
    with open_llm(arguments) as llm:
        yield llm, prompts, _model_inputs(llm, prompts, arguments), params


def _read_prompts(prompts: list[str]) -> list[str]:
    """The prompts of the command line; "-" stands for the lines of standard input, blank ones left out."""
    read = []
    for prompt in prompts:
        if prompt != "-":
            require_unicode("a prompt", prompt)
            read.append(prompt)
        else:
            read.extend(read_lines_from_stdin())
    return read


def _model_inputs(llm: Any, prompts: list[str], arguments: argparse.Namespace) -> list[Any]:
    """With --chat, the token ids of a conversation of one message for each prompt; else the prompts."""
    if llm.tokenizer is None:
        raise ValueError(f"model must have a tokenizer to read prompts, got {arguments.model!r}; add tokenizer.json")
    if not arguments.chat:
        return prompts
    if not getattr(llm.tokenizer, "chat_template", None):
        raise ValueError("--chat needs a model with a chat template, and this one has none: leave out --chat")
    return chat_prompts(llm.tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts])
