"""The `nanovllm` command: generate, demo, bench.

What a user can get wrong ends in one line on stderr and exit code 2, Ctrl-C in 130, a bug of nanovllm in its traceback
and 70. torch and transformers are imported only by the commands that run a model, so that `--help` is quick.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nanovllm import __version__
from nanovllm.cli_errors import report_error
from nanovllm.config import ATTENTION_BACKENDS, DEVICES, DTYPES, Config
from nanovllm.console import discard_stdout, flush_stdout, lossless_console, read_lines_from_stdin, require_stdout
from nanovllm.engine.chat import chat_prompts
from nanovllm.sampling_params import SamplingParams
from nanovllm.torchrun_env import read_torchrun_env
from nanovllm.validation import require_unicode

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE

_EXAMPLES = """\
examples:
  nanovllm demo                                      what the engine does, in a minute, without a GPU or a download
  nanovllm generate "In the beginning"               one prompt, streamed, from the bundled model
  nanovllm generate --model Qwen/Qwen3-0.6B --chat "Why is the sky blue?"
  nanovllm generate --model ./my-model -             one prompt a line from standard input
  nanovllm bench --model ./my-model --num-seqs 256   throughput

exit codes: 0 done; 1 the demo found a difference; 2 an error whose message names a remedy; 70 a bug of nanovllm;
130 interrupted by Ctrl-C; 141 the reader of the output closed the pipe
"""

# name of the option -> its text in --help. Type, choices and default come from Config and SamplingParams.
_CONFIG_HELP = {
    "dtype": "of weights and KV cache; auto takes that of the checkpoint",
    "device": "auto takes cuda if there is an NVIDIA GPU, else cpu",
    "attention_backend": "auto takes the fastest that is installed and fits",
    "max_model_len": "longest sequence, prompt and output together, in tokens; lowered to what the model supports",
    "max_num_seqs": "most sequences that run at a time",
    "max_num_batched_tokens": "most tokens one step computes",
    "kv_cache_block_size": "tokens a KV block: a multiple of 256; with --attention-backend "
    "triton also a power of two from 16, with torch any power of two",
    "num_kv_cache_blocks": "blocks of the KV cache; without it, as many as memory holds",
    "gpu_memory_utilization": "share of the GPU's memory to use",
    "tensor_parallel_size": "GPUs, or processes on a CPU, that share the model; under torchrun, all of its processes",
    "enforce_eager": "never use CUDA graphs",
    "async_scheduling": "submit a decode step before the tokens of the step before are known, or never do "
    "(default: on a GPU, with several ranks where each has its own)",
}
_SAMPLING_HELP = {
    "max_tokens": "most tokens to generate for each prompt",
    "temperature": "below 1 is more predictable, above 1 more surprising; 0 is --greedy",
    "top_k": "sample from the k most likely tokens only",
    "top_p": "sample from the smallest set of tokens with this probability",
    "min_p": "drop tokens less likely than this fraction of the most likely one",
    "seed": "the same seed gives the same text, whatever other requests run",
}
_CHOICES = {"dtype": DTYPES, "device": DEVICES, "attention_backend": ATTENTION_BACKENDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv[1:] if None) and return its exit code; argparse's errors exit with 2."""
    with lossless_console():
        return _run(_parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    try:
        require_stdout()
        launch = read_torchrun_env()
        if launch is not None and launch.rank > 0 and arguments.run is not _demo:
            _open_llm(arguments)  # serves rank 0, which alone reads and prints, and does not return
        with _log_on_stderr():
            code = arguments.run(arguments)
        sys.stdout.flush()  # raises BrokenPipeError here rather than at interpreter exit
        return code
    except KeyboardInterrupt:
        print("\nnanovllm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        discard_stdout()
        return BROKEN_PIPE
    except Exception as error:
        code = report_error(error, _option_names(arguments), arguments.debug)
        flush_stdout()
        return code


def _option_names(arguments: argparse.Namespace) -> dict[str, str]:
    """Field name -> option of the command that runs, for messages about them."""
    return {name: _flag(name) for name in vars(arguments) if name not in ("run", "debug", "prompts")}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Shows on stderr what the engine logs while a command runs, such as the attention backend and the reason."""
    logger, handler = logging.getLogger("nanovllm"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _generate(arguments: argparse.Namespace) -> int:
    params = _sampling_params(arguments)
    prompts = _read_prompts(arguments.prompts)
    with _open_llm(arguments) as llm:
        if llm.tokenizer is None:
            raise ValueError(
                f"model must have a tokenizer to read prompts, got {arguments.model!r}; add tokenizer.json"
            )
        inputs = [_as_chat(llm, prompt) for prompt in prompts] if arguments.chat else prompts
        if len(prompts) == 1 and not arguments.json:
            for item in llm.generate_stream(inputs, params):
                print(item["text"], end="", flush=True)
            print()
            return 0
        outputs = llm.generate(inputs, params, use_tqdm=not arguments.json)
    for prompt, output in zip(prompts, outputs, strict=True):
        if arguments.json:
            print(json.dumps({"prompt": prompt, **output}))  # ASCII, which every encoding has
        else:
            print(f"\n>>> {prompt}\n{output['text']}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from nanovllm.demo import run_demo

    return run_demo()


def _bench(arguments: argparse.Namespace) -> int:
    from nanovllm.bench import run_bench

    with _open_llm(arguments) as llm:
        run_bench(llm, arguments.num_seqs, tuple(arguments.input_len), tuple(arguments.output_len), arguments.seed)
    return 0


def _open_llm(arguments: argparse.Namespace) -> Any:
    """The LLM of these options, on all ranks that torchrun started. Prints a note if it is the bundled model."""
    from nanovllm import LLM, bundled_model_path

    options, launch = _given(arguments, _CONFIG_HELP), read_torchrun_env()
    if launch is not None:
        options.setdefault("tensor_parallel_size", launch.size)
    model = arguments.model
    if model is None:
        model = str(bundled_model_path())
        if launch is None or launch.rank == 0:
            note = "no --model given: using the bundled one, which knows passages of the King James Bible"
            print(note, file=sys.stderr)
    return LLM(model, **options)


def _sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """SamplingParams of these options. --temperature 0 means --greedy, and a note names the options without effect.

    Raises ValueError for a wrong value, used or not, and for --greedy together with another sampling option.
    """
    options, ends = _given(arguments, _SAMPLING_HELP), {"stop": arguments.stop, "ignore_eos": arguments.ignore_eos}
    is_zero = options.get("temperature") == 0
    if not arguments.greedy and not is_zero:
        return SamplingParams(**options, **ends)
    unused = [name for name in options if name != "max_tokens" and not (name == "temperature" and is_zero)]
    flags = ", ".join(map(_flag, unused))
    if arguments.greedy and unused:
        raise ValueError(f"--greedy takes the most likely token at every step: leave out {flags}")
    SamplingParams(**{**options, "temperature": 1.0}, **ends)
    if not arguments.greedy:
        note = f"; {flags} without effect" if unused else ""
        print(f"--temperature 0: taking the most likely token at every step, as --greedy{note}", file=sys.stderr)
    return SamplingParams.greedy(**_given(arguments, ["max_tokens"]), **ends)


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


def _as_chat(llm: Any, prompt: str) -> list[int]:
    """Token ids of a conversation that consists of the user's `prompt`, up to where the answer begins."""
    if not getattr(llm.tokenizer, "chat_template", None):
        raise ValueError("--chat needs a model with a chat template, and this one has none: leave out --chat")
    (token_ids,) = chat_prompts(llm.tokenizer, [{"role": "user", "content": prompt}])
    return token_ids


def _given(arguments: argparse.Namespace, names: Any) -> dict[str, Any]:
    """The options that the user gave. Config and SamplingParams have the defaults of the others."""
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanovllm",
        description="A small LLM inference engine: generate text from a local model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate = _command(commands, "generate", _generate, "continue one prompt or many", " PROMPT [PROMPT ...]")
    generate.add_argument(
        "prompts",
        nargs="+",
        metavar="PROMPT",
        help='text to continue; "-" reads prompts from standard input, one a line',
    )
    _add_model_options(generate)
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument("--greedy", action="store_true", help="take the most likely token at every step")
    _add_options(sampling, SamplingParams, _SAMPLING_HELP)
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the model's end-of-sequence token")
    generate.add_argument("--chat", action="store_true", help="apply the model's chat template to each prompt")
    generate.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line for each prompt: prompt, text, token_ids, finish_reason and more, in ASCII",
    )

    _command(commands, "demo", _demo, "what the engine does, in a minute, without a GPU or a download")

    bench = _command(commands, "bench", _bench, "measure throughput on random prompts")
    _add_model_options(bench)
    bench.add_argument("--num-seqs", type=int, default=32, metavar="N", help="requests (default: %(default)s)")
    for name, what in (("--input-len", "prompt"), ("--output-len", "output")):
        text = f"{what} tokens of each request, drawn from this range (default: 16 128)"
        bench.add_argument(name, type=int, nargs=2, default=(16, 128), metavar=("MIN", "MAX"), help=text)
    bench.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, operands: str = "") -> argparse.ArgumentParser:
    description = summary[0].upper() + summary[1:] + "."
    usage = f"nanovllm {name} [options]{operands}"
    command = commands.add_parser(name, usage=usage, help=summary, description=description)
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return command


def _add_model_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("model and engine")
    group.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="a directory in Hugging Face's format, or a hub id such as Qwen/Qwen3-0.6B (default: the bundled model)",
    )
    _add_options(group, Config, _CONFIG_HELP)


def _add_options(group: Any, owner: Any, helps: dict[str, str]) -> None:
    """One option for each field of the dataclass `owner` that `helps` names; not given means None."""
    fields = {field.name: field for field in dataclasses.fields(owner)}
    for name, text in helps.items():
        flag, default = _flag(name), fields[name].default
        if isinstance(default, bool):
            group.add_argument(flag, action="store_true", default=None, help=text)
            continue
        if fields[name].type == bool | None:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        text += "" if default is None else f" (default: {default})"
        if name in _CHOICES:
            group.add_argument(flag, choices=_CHOICES[name], help=text)
        else:
            group.add_argument(flag, type=float if isinstance(default, float) else int, metavar="N", help=text)
