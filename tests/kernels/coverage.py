"""What every kernel must have, read off the source; and the written exemptions.

A kernel is a @triton.jit function that a launcher of its file launches. Kernels of nanovllm/kernels/NAME.py must be
reached, through a launcher,

- interpreted: by CHECKS of the cases that tests/kernels/test_NAME.py gives to run_interpreted,
- compiled: by a test there that calls compile_launches,
- on a GPU: by a test there that is marked gpu,
- measured: by a test of benchmarks/kernels that takes `measure`.

Reached means named: in the test itself, or in what it names of its own file, or in the CHECKS of the cases. That a
launcher launches each of its kernels in some case is for the cases to see to.
"""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

DEMANDS = ("interpreted", "compiled", "on a GPU", "measured")

# Device functions are compiled into the kernels that call them: file -> function -> kernel through which it is tested.
TESTED_THROUGH: dict[str, dict[str, str]] = {
    "qk_norm_rope_store": {
        "normalize": "qk_norm_rope_store_kernel",
        "rotate": "qk_norm_rope_store_kernel",
    },
    "rotary_embedding": {"rotate_and_store": "rotary_embedding_kernel"},
    "sampling": {
        "load_logits": "sampling_row_kernel",
        "load_counters": "sampling_row_kernel",
        "make_ordered": "sampling_row_kernel",
        "philox_words": "sampling_row_kernel",
        "philox": "sampling_row_kernel",
        "exact_gumbel": "sampling_row_kernel",
        "approximate_arrivals": "sampling_tile_kernel",
        "scores_of": "sampling_tile_kernel",
        "fast_log2": "sampling_tile_kernel",
        "score_error": "sampling_row_kernel",
    },
    "varlen_attention": {"_attend_tile": "varlen_attention_kernel"},
    "varlen_attention_hopper": {
        "_produce": "varlen_attention_hopper_kernel",
        "_copy": "varlen_attention_hopper_kernel",
        "_clear": "varlen_attention_hopper_kernel",
        "_consume": "varlen_attention_hopper_kernel",
        "_attend_tile": "varlen_attention_hopper_kernel",
        "_softmax": "varlen_attention_hopper_kernel",
        "_row_offsets": "varlen_attention_hopper_kernel",
    },
}

# (kernel, demand) -> why it need not be met.
EXEMPTIONS: dict[tuple[str, str], str] = {
    ("varlen_attention_hopper_kernel", "interpreted"): "Triton's interpreter does not run Gluon, its language of "
    "layouts and barriers: compiled on the CPU, and held against the references on a GPU only",
}


@dataclass
class Source:
    """One file's syntax tree."""

    tree: ast.Module
    definitions: dict[str, ast.AST] = field(init=False)

    def __post_init__(self) -> None:
        self.definitions = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                for target in ast.walk(node):
                    if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                        # A name that is assigned twice reaches what both assignments name.
                        known = self.definitions.get(target.id)
                        body = [*known.body, node] if isinstance(known, ast.Module) else [node]
                        self.definitions[target.id] = ast.Module(body=body, type_ignores=[])

    @property
    def functions(self) -> dict[str, ast.FunctionDef]:
        return {name: node for name, node in self.definitions.items() if isinstance(node, ast.FunctionDef)}

    def jit_functions(self) -> set[str]:
        return {name for name, node in self.functions.items() if "jit" in _decorator_names(node)}

    def launched(self) -> set[str]:
        """Names that are called with a grid: name[grid](...)."""
        calls = (node.func for node in ast.walk(self.tree) if isinstance(node, ast.Call))
        subscripts = (call.value for call in calls if isinstance(call, ast.Subscript))
        return {value.id for value in subscripts if isinstance(value, ast.Name)}

    def launchers(self, kernel: str) -> set[str]:
        """Public functions of the file that reach `kernel`."""
        functions = self.functions.keys() - self.jit_functions()
        return {name for name in functions if not name.startswith("_") and kernel in self.reached(name)}

    def reached(self, name: str) -> set[str]:
        """Every name that definition `name` uses, and that those of this file use which it names."""
        found: set[str] = set()
        waiting = [name]
        while waiting:
            new = _names_in(self.definitions[waiting.pop()]) - found
            found |= new
            waiting += [other for other in new if other in self.definitions]
        return found

    def tests(self, *, gpu: bool) -> list[str]:
        """Names of the tests that are marked gpu, or of those that are not."""
        module_mark = self.definitions.get("pytestmark")
        all_gpu = module_mark is not None and "gpu" in _names_in(module_mark)
        tests = [(name, node) for name, node in self.functions.items() if name.startswith("test_")]
        return [name for name, node in tests if ("gpu" in _decorator_names(node) or all_gpu) == gpu]


def _decorator_names(node: ast.FunctionDef) -> set[str]:
    return set().union(*map(_names_in, node.decorator_list))


def _names_in(node: ast.AST) -> set[str]:
    names = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    names |= {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
    return names | {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}


def unmet_demands(
    kernels: Source, tests: Source | None, cases: Source | None, benchmarks: Iterable[Source]
) -> Mapping[str, list[str]]:
    """Each kernel of a file: the demands that its tests, their cases and the benchmarks do not meet."""
    benchmarks = list(benchmarks)
    unmet = {}
    for kernel in sorted(kernels.jit_functions() & kernels.launched()):
        launchers = kernels.launchers(kernel)
        in_cases = bool(cases and "CHECKS" in cases.definitions and launchers & cases.reached("CHECKS"))
        met = {
            "interpreted": in_cases and _any_reaches(tests, False, {"run_interpreted"}),
            "compiled": _any_reaches(tests, False, {"compile_launches"}, launchers),
            "on a GPU": _any_reaches(tests, True, launchers) or (in_cases and _any_reaches(tests, True, {"CHECKS"})),
            "measured": any(_any_reaches(source, False, {"measure"}, launchers) for source in benchmarks),
        }
        unmet[kernel] = [demand for demand in DEMANDS if not met[demand]]
    return unmet


def _any_reaches(source: Source | None, gpu: bool, *groups: set[str]) -> bool:
    """Whether one test reaches a name of each group."""
    if source is None:
        return False
    reached = [source.reached(name) for name in source.tests(gpu=gpu)]
    return any(all(names & group for group in groups) for names in reached)
