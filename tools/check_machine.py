"""Prints in one line what this Python lacks for a target of the Makefile: python tools/check_machine.py [--gpu]
MODULES.

Exit code 1 if a module cannot be found, or with --gpu if torch finds no NVIDIA GPU. Runs in any Python 3.
"""

import importlib.util
import sys


def missing(modules, needs_gpu):
    """What is missing, in words; empty if nothing is."""
    absent = [name.replace("_", "-") for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        return "has no " + ", ".join(absent)
    if needs_gpu:
        import torch

        if not torch.cuda.is_available():
            return "finds no NVIDIA GPU"
    return ""


def main(arguments):
    """Print what is missing to stderr. Returns the exit code."""
    reason = missing([name for name in arguments if name != "--gpu"], "--gpu" in arguments)
    if not reason:
        return 0
    print(f"error: {sys.executable} {reason} here; name the python that does: make TARGET PYTHON=...", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
