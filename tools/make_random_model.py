"""Writes a checkpoint with the shape of a known model and random weights, to measure speed.

    python -m tools.make_random_model --like qwen3-0.6b DIR    (from the repository's root)

The checkpoint has no tokenizer, so prompts are token ids. Writing takes seconds on a GPU, and on a CPU about a minute
for the small models.
"""

import argparse
from pathlib import Path

from nanovllm.bench.random_model import SHAPES, make_config, make_random_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--like", required=True, choices=SHAPES)
    parser.add_argument("--num-layers", type=int, help="fewer or more layers than the model has")
    arguments = parser.parse_args()
    make_random_model(arguments.directory, make_config(arguments.like, arguments.num_layers))


if __name__ == "__main__":
    main()
