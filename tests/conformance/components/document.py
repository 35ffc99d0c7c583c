"""Writes docs/conformance.md and its pictures: `python -m tests.conformance.components.document`.

Each contract is shown broken by the fault of targets/faults.py, in the smallest scenario that the checks find.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conformance.components.contracts import CONTRACTS, Contract
from tests.conformance.components.drawing import drawing
from tests.support.source_tree import ROOT

DOCUMENT = ROOT / "docs" / "conformance.md"
PICTURES = ROOT / "docs" / "conformance"
LEGEND = """\
block 0 |0 1|  ref 2  in the tables of r0, r1
block 1 |0 .|  ref 1  in the table of r0
block 2 |0 0|  ref 0  free
r0: prompt 0 1, output 0; block table 0 1
r1: prompt 0 1; block table 0
"""
NUM_SCENARIOS, SEED = 40, 32  # finds every planted fault; the tests compare with the document

_HEAD = """\
# Contracts of an engine's components

<!-- Written by `python -m tests.conformance.components.document`; change the text there. -->

A fork of nano-vllm inherits its files, and the mistakes in them. This page lists {number} rules
that the sequence, the block manager, the scheduler, the input preparation and the sampling parameters of such an
engine have to keep, and shows each of them broken. The checks run on a checkout of nano-vllm or of a fork, without
a GPU and without a model:

```sh
nanovllm conformance ../my-fork                          # text; --json, --html FILE
python -m pytest tests/conformance --target ../my-fork   # the same, a test a contract
```

Both run from a checkout of this project. The fork is read and never written to: a copy of its source runs in a
child process with limits of time, memory and file size, and without network. `flash_attn`, `triton`,
`transformers`, CUDA and NCCL are replaced by stand-ins; torch, numpy and xxhash must be installed. 1500 scenarios take
less than a minute on an idle core.

A contract **holds**, is **broken** (then the smallest scenario is printed as a script of a few lines, with a
picture of the blocks), or is **not applicable**, with the reason: the fork has no such part, no adapter knows its
shape, or another broken contract hides it. Exit code: 0 nothing is broken, 1 something is, 2 the checkout cannot be
examined.

## In GitHub Actions

```yaml
- uses: actions/checkout@v4
  with: {{ repository: OWNER/nanovllm, path: checks }}
- run: pip install torch numpy xxhash
- run: python -m tests.conformance.components .. --html ../conformance.html
  working-directory: checks
```

These five lines follow the step that checks out the fork. OWNER/nanovllm stands for this project's repository. A
fork that breaks a rule on purpose reads the JSON (`--json`) instead of the exit code.

## How it works

Scenarios are drawn: requests that arrive, repeat, continue each other's text and are aborted, in engines of a few
blocks of a few tokens. Each step runs the fork's own `schedule()`, `prepare_prefill` or `prepare_decode`, and
`postprocess()`. In place of the model stands a symbolic cache: a slot holds which token it is of, at which position
and after which tokens. So a step that reads a wrong, foreign, stale or unwritten slot is noticed when it reads. The
checks run in the order of cause and effect and a scenario ends with the first broken contract, so that one fault
has one name.

How forks differ stands in the tables of
[tests/conformance/components/adapters](../tests/conformance/components/adapters/names.py): how a scheduler is
constructed, what `schedule()` returns, what `postprocess()` takes, whether the block size is an attribute of the
class Sequence, what the queues are called, whether one method prepares prefill and decode. Options that a fork adds to
its Config have the fork's own defaults, or follow from the sizes of the scenario. Blocks that are swapped to the CPU
are followed where `swap_out` and `swap_in` of the block manager return which they move.
Steps with several new tokens a sequence (speculative decoding) are not modelled: their contracts are not applicable.

**Async scheduling.** A class AsyncScheduler is examined beside the class Scheduler, and half of the scenarios schedule
each step before the tokens of the step in front of it are known. Two shapes are followed: schedule() is called again,
and each token in flight is a placeholder of its sequence (`num_output_placeholders`, as in vLLM); or
`schedule_next_async(step)` returns the next step, and `commit_async_batch(next_step)` drops what has ended meanwhile. A
step that leaves no placeholder, as a prefill may, is collected before the next one. postprocess() gets every row of a
step, those of requests that have ended meanwhile too. A scheduler that runs ahead in another way is not applicable.

## Reading the pictures

![Three blocks of two slots, and two requests](conformance/legend.svg)

A picture shows the target at the moment at which the contract is found broken. Above are the blocks of the KV cache,
each with its id, its ref_count and the tokens whose keys and values its slots hold; an empty slot holds nothing that
may be read. A block has the colour of the request that holds it, and is hatched if another one shares it. A dashed
block is held by none; if it is free and not empty, it is still in the prefix cache. Below are the requests: the tokens
in their blocks, by the ids of the block table. Generated tokens are bold. A token outside of a block has no slot.
Tokens are 0 and 1; 2 ends a sequence. `nanovllm conformance` prints the same as text:

```text
{legend}```

## The contracts
"""


def document(rows: dict[str, dict[str, Any]]) -> str:
    """The whole text. rows: contract -> its verdict on the target with its planted fault."""
    parts = [_HEAD.format(number=len(CONTRACTS), legend=LEGEND)]
    for group in dict.fromkeys(contract.group for contract in CONTRACTS.values()):
        parts.append(f"\n### {group}\n")
        parts += [section(contract, rows[contract.id]) for contract in CONTRACTS.values() if contract.group == group]
    return "".join(parts)


def section(contract: Contract, row: dict[str, Any]) -> str:
    script = "\n".join(_wrapped(line) for line in _anonymous(row["script"]).splitlines()[2:])
    text = f"\n#### {contract.id}. {contract.rule}\n\nWhat users see: {contract.users_see}. From: {_links(contract)}.\n"
    text += f"\n```python\n{script}\n```\n"
    shown = f"![The blocks and requests when {contract.id} is found broken](conformance/{contract.id}.svg)"
    return text + (f"\n{shown}\n" if row["picture"] else "")


def pictures(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Name -> SVG, of the contracts whose verdict has a picture, and of the legend."""
    texts = {"legend": LEGEND} | {name: row["picture"] for name, row in rows.items() if row["picture"]}
    titles = {name: f"Blocks and requests when {name} is found broken" for name in texts} | {"legend": "An example"}
    return {name: drawing(text, titles[name]).file() for name, text in texts.items()}


def _anonymous(script: str) -> str:
    return re.sub(r"Target\(('|\")[^'\"]*\1", 'Target("your-fork"', script)


def _wrapped(line: str) -> str:
    """A line with a long comment has it above."""
    code, mark, comment = line.partition("  # ")
    return f"# {comment}\n{code}" if mark else line


def _links(contract: Contract) -> str:
    text = re.sub(r"^(D[\d, D]+\d)", r"\1 of [tests/DEFECTS.md](../tests/DEFECTS.md)", contract.report)
    return re.sub(r"https://github.com/[\w-]+/([\w-]+)/(?:issues|pull)/(\d+)", r"[\1 #\2](\g<0>)", text)


def main() -> int:
    from tests.conformance.components.running import plant, verdicts_of
    from tests.conformance.components.targets.faults import FAULTS

    faults = {fault.contract: fault for fault in reversed(FAULTS.values())}  # the first fault of each contract
    with tempfile.TemporaryDirectory() as folder:
        found = verdicts_of(*plant(faults, Path(folder)), scenarios=NUM_SCENARIOS, seed=SEED)
    rows = {name: verdicts[name] for name, verdicts in zip(faults, found, strict=True)}
    DOCUMENT.write_text(document(rows), encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for path in PICTURES.glob("*.svg"):
        path.unlink()
    for name, svg in pictures(rows).items():
        (PICTURES / f"{name}.svg").write_text(svg, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
