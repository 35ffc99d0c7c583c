"""Whether the workers' processes, which multiprocessing spawns, can import the user's program."""

import os
import sys
from multiprocessing import process


def require_importable_program() -> None:
    """Raise ValueError when `__main__` has a file that does not exist, as with `python - <<EOF`.

    A spawned process imports the file of `__main__` first. Programs without one (python -c, a notebook, the interactive
    interpreter) are not imported, and modules (python -m) are found by their names.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is not None or path is None:
        return
    if not os.path.isabs(path):  # as multiprocessing resolves it
        path = os.path.join(getattr(process, "ORIGINAL_DIR", None) or "", path)
    if not os.path.isfile(path):
        raise ValueError(
            "a program that starts an engine with tensor_parallel_size above 1 must be a file, since the processes of "
            f"the other ranks import it, got {main.__file__!r}; save it to a file and start the engine there under "
            '`if __name__ == "__main__":`'
        )
