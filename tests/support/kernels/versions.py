"""What depends on the installed versions of Triton and numpy; the file imports neither."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

INTERPRETER_REASON = "Triton before 3.7 does not interpret range() with run-time bounds under numpy 2.4 or later"


@cache
def _release(package: str) -> tuple[int, int]:
    """Major and minor version; (0, 0) if it is not installed."""
    try:
        major, minor = version(package).split(".")[:2]
    except PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


def interprets() -> bool:
    return _release("triton") >= (3, 7) or _release("numpy") < (2, 4)


def tolerated_stack_bytes() -> int:
    """Bytes of stack that a thread may use besides its limit. Triton 3.6 uses 8 to 24 where 3.7 needs none, seen in
    sampling_row_kernel, in varlen_attention_kernel in float32, and in varlen_attention_hopper_kernel."""
    return 0 if _release("triton") >= (3, 7) else 24
