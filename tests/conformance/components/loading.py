"""Imports a target's modules without a GPU: stand-ins for flash_attn, triton, transformers, CUDA and NCCL.

Used in the process that runs the target. Imports nothing of nanovllm, whose name the target's package has.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.conformance.components.sizes import EOS

# Replaced even where installed: they need a GPU, or take seconds to import for nothing that a contract is about.
REPLACED = ("flash_attn", "flash_attn_interface", "flashinfer", "transformers", "triton", "tqdm")
NEEDED = ("numpy", "torch", "xxhash")  # what a contract is about depends on them: a stand-in would prove nothing
ROLES = {  # role -> the name of its class, and the file that it is in upstream
    "Config": "config.py",
    "SamplingParams": "sampling_params.py",
    "Sequence": "engine/sequence.py",
    "BlockManager": "engine/block_manager.py",
    "Scheduler": "engine/scheduler.py",
    "AsyncScheduler": "engine/async_scheduler.py",  # of forks
    "ModelRunner": "engine/model_runner.py",
    "LLMEngine": "engine/llm_engine.py",
}
_loaded: dict[Path, dict[str, Any]] = {}
SKIPPED_FOLDERS = {"tests", "test", "build", "dist", "site-packages", "node_modules", "reference", "tools", "docs"}


class NotRecognised(BaseException):
    """The target has a shape that no table of adapters/ has. The text is the reason in the report.

    A BaseException, since it may be raised in calls of the target, and targets catch Exception.
    """


class StandIn:
    """Takes the place of anything of a replaced module: a value, a function, a decorator, a base class, a type."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "StandIn":
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self._name}.{name}")

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._name.endswith("from_pretrained"):
            return hugging_face_config()
        is_decorator = len(args) == 1 and not options and callable(args[0]) and not isinstance(args[0], StandIn)
        return args[0] if is_decorator else StandIn(f"{self._name}()")

    def __getitem__(self, key: Any) -> "StandIn":
        return self

    def __or__(self, other: Any) -> "StandIn":
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[()]:
        return ()

    def __instancecheck__(self, value: Any) -> bool:
        return False


class _StandInModule(ModuleType):
    __path__: Sequence[str] = ()
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> StandIn:
        return getattr(StandIn(self.__name__), name)


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what no other finder does, unless it is a module of the target itself, or a needed one."""

    def __init__(self) -> None:
        self.missing: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        is_real = not isinstance(sys.modules.get(top), _StandInModule | None)
        if is_real or top in NEEDED or top in sys.stdlib_module_names or top.startswith("_"):
            return None
        self.missing.add(top)
        return self.spec(name)

    def spec(self, name: str) -> importlib.machinery.ModuleSpec:
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def hugging_face_config() -> SimpleNamespace:
    import torch

    return SimpleNamespace(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        hidden_size=8,
        head_dim=4,
        intermediate_size=16,
        vocab_size=64,
        max_position_embeddings=32768,
        eos_token_id=EOS,
        torch_dtype=torch.float32,
        dtype=torch.float32,
    )


def find_package(path: Path) -> Path:
    """The folder of the checkout that has engine/scheduler.py: nanovllm/, or whatever the fork calls it."""
    if not path.is_dir():
        raise NotRecognised(f"{path} is no folder; give the root of a checkout of nano-vllm or of a fork")
    folders = [file.relative_to(path).parent.parent for file in path.glob("**/engine/scheduler.py")]
    folders = [one for one in folders if not any(part in SKIPPED_FOLDERS or part[0] == "." for part in one.parts)]
    if not folders:
        raise NotRecognised(f"{path} has no PACKAGE/engine/scheduler.py; give the root of a checkout")
    return path / min(folders, key=lambda folder: (len(folder.parts), str(folder)))


def loaded(path: Path) -> dict[str, Any]:
    """The classes of the checkout, imported once a process. A second checkout in one process is refused."""
    path = path.resolve()
    if path not in _loaded:
        if _loaded:
            raise NotRecognised(f"this process has loaded {next(iter(_loaded))}; start another one for {path}")
        _loaded[path] = _load(find_package(path))
    return _loaded[path]


def _load(package: Path) -> dict[str, Any]:
    """The target's classes by role (ROLES); {role: why it is absent} under "reasons"; "package"; "stand_ins"."""
    sys.dont_write_bytecode = True
    _replace_cuda()
    for name in [name for name in sys.modules if name.partition(".")[0] in (*REPLACED, package.name)]:
        del sys.modules[name]
    finder = _StandInFinder()
    sys.modules.update({name: importlib.util.module_from_spec(finder.spec(name)) for name in REPLACED})
    sys.meta_path.append(finder)
    sys.path.insert(0, str(package.parent))
    root, found, reasons = package.name, {}, {}
    for role, file in ROLES.items():
        module = _module_of(package, role, file)
        if module is None:
            continue
        try:
            found[role] = getattr(importlib.import_module(f"{root}.{module}"), role)
        except (Exception, SystemExit) as error:
            reasons[role] = f"{root}.{module} cannot be imported without a GPU: {type(error).__name__}: {error}"
    stand_ins = sorted(finder.missing.difference(REPLACED))
    return found | {"reasons": reasons, "package": package, "stand_ins": stand_ins}


def _module_of(package: Path, role: str, file: str) -> str | None:
    """The module that defines the class, relative to the package: upstream's file if it does, else the first."""
    pattern = re.compile(rf"^class {role}\b", re.MULTILINE)
    files = [package / file, *sorted(package.rglob("*.py"))]
    for path in files:
        if path.is_file() and pattern.search(path.read_text(encoding="utf-8", errors="replace")):
            return ".".join(path.relative_to(package).with_suffix("").parts)
    return None


def _replace_cuda() -> None:
    """torch without a GPU: tensors stay where they are, ranks are one, nothing is compiled."""
    import torch
    import torch.distributed as dist

    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "as_tensor", "empty_like", "zeros_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = torch.Tensor.pin_memory = lambda self, *args, **options: self  # type: ignore[assignment]
    torch.Tensor.to = _to_cpu(torch.Tensor.to)  # type: ignore[assignment]
    torch.compile = lambda function=None, **options: function if callable(function) else (lambda f: f)  # type: ignore
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "current_stream"):
        setattr(torch.cuda, name, lambda *args, **options: None)
    for name, value in {"get_rank": 0, "get_world_size": 1, "is_initialized": True}.items():
        setattr(dist, name, lambda *args, _value=value, **options: _value)
    for name in ("init_process_group", "destroy_process_group", "barrier", "all_reduce", "broadcast", "gather"):
        setattr(dist, name, lambda *args, **options: None)


def _on_cpu(function: Any) -> Any:
    def on_cpu(*args: Any, **options: Any) -> Any:
        options.pop("pin_memory", None)
        if "cuda" in str(options.get("device")):
            del options["device"]
        return function(*args, **options)

    return on_cpu


def _to_cpu(function: Any) -> Any:
    def to(self: Any, *args: Any, **options: Any) -> Any:
        args = tuple(value for value in args if "cuda" not in str(value))
        options = {name: value for name, value in options.items() if name == "dtype"}
        return function(self, *args, **options) if args or options else self

    return to
