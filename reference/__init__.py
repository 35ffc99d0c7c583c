"""The ideas of an inference engine, each as one short file of plain PyTorch that can be read, run and checked by hand.

Read them in the order of reading_order(). Each begins with the idea in a sentence, its formula and the reason why it is
true; the function that follows is the same in code, slow and without tricks, and its examples are tests. The engine
computes the same functions fast, and its tests compare it with these files. The engine does not import them.

Every function takes float64, leaves its inputs as they were, and has the parameter names of the engine's fast version.
Integers (slots, hashes, decisions, random words) must agree exactly, floats up to rounding.

DIMENSION_LETTERS says what the letters in a shape like Float[Tensor, "T H D"] stand for, unless a file says otherwise.
"""

import sys
from pathlib import Path

# The path through the ideas of the engine, and what each file is about.
READING_ORDER = (
    ("attention", "each token reads the values of the tokens before it"),
    ("packing", "sequences of different lengths lie end to end in one tensor"),
    ("slot_mapping", "where in the KV cache the token at a given position is stored"),
    ("store_kvcache", "new keys and values go to their slots"),
    ("paged_attention", "attention whose keys are looked up block by block"),
    ("shared_prefix_attention", "sequences that begin alike read the keys of the beginning once"),
    ("block_hash", "a number that names a full block together with everything before it"),
    ("block_manager", "which sequence owns which block, and which blocks can be shared"),
    ("scheduler", "which sequences compute how many tokens in the next step"),
    ("postprocess", "after a step, its tokens are appended and finished sequences leave"),
    ("linear", "every output feature is a weighted sum of the input features"),
    ("rms_norm", "bring every token's vector to one length"),
    ("rotary_embedding", "turn queries and keys by an angle that grows with the position"),
    ("silu_and_mul", "one half of a vector decides how much of the other half passes"),
    ("moe", "many feed-forward networks, of which a router picks a few for each token"),
    ("tensor_parallel", "every rank holds a slice of each matrix, and the slices add up"),
    ("philox", "random numbers by counting"),
    ("sampling", "drop improbable tokens, then let the others race"),
    ("checkpoint", "numbers by name, and a few settings"),
    ("transformer", "from token ids to logits, for every architecture"),
    ("generate", "read, sample, append, start again: the oracle of the whole engine"),
)

DIMENSION_LETTERS = {
    "T": "tokens of all sequences of a step, packed",
    "B": "sequences",
    "H": "query heads",
    "K": "key/value heads",
    "D": "head_dim, the size of one head",
    "E": "hidden size",
    "F": "intermediate size",
    "V": "vocabulary",
    "N": "experts",
    "L": "layers",
    "S": "slots of the KV cache, num_blocks * block_size",
}


def reading_order() -> list[str]:
    """Every file: those of READING_ORDER, then all others by name."""
    names = [name for name, _ in READING_ORDER]
    files = {path.stem for path in Path(__file__).parent.glob("*.py")} - {"__init__", "__main__"}
    return [*names, *sorted(files - set(names))]


def show_examples(path: str) -> None:
    """Run the examples of the file at `path` and of those named on the command line, show them, and exit.

    The last line of every file calls it, so `python reference/packing.py` does what `python -m reference packing` does.
    """
    from reference.__main__ import main

    sys.exit(main([path, *sys.argv[1:]]))
