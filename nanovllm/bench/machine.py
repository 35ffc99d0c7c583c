"""The machine and the versions on which figures depend."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def machine_info(gpu: str | None) -> dict[str, Any]:
    """Device and versions; nothing that differs between two machines of one kind. gpu: its name, None without a GPU."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "triton", "flash-attn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"gpu": gpu, "cpu": platform.machine(), "python": platform.python_version(), **versions}
