"""A picture of a target's blocks and requests, as text."""

from typing import Any


def picture(target: Any) -> str:
    """One line a block that is held or holds something, one line a request. "" if the target's state is unreadable.

        block 0 |0 1|  ref 2  in the tables of r0, r1
        block 1 |0 .|  ref 1  in the table of r0
        block 2 |. .|  free
        r0: prompt 0 1, output 1; block table 0 1

    A slot shows the token whose key and value it holds; a dot: nothing that may be read.
    """
    if target is None:
        return ""
    try:
        return "".join(f"{line}\n" for line in [*_blocks(target), *_requests(target)])
    except Exception:
        return ""


def _blocks(target: Any) -> list[str]:
    size, counts, free = target.setup.block_size, target.adapter.ref_counts(), target.adapter.free_blocks() or []
    lines = []
    for block_id in range(target.setup.num_blocks):
        slots = target.cache.slots[block_id * size : (block_id + 1) * size]
        holders = [f"r{r.number}" for r in target.live if block_id in r.seq.block_table]
        if not holders and not any(slots) and not (counts and counts[block_id]):
            continue
        parts = [f"block {block_id} |{' '.join('.' if slot is None else str(slot[1]) for slot in slots)}|"]
        parts += [f"ref {counts[block_id]}"] if counts else []
        parts += [f"in the table{'s' * (len(holders) > 1)} of {', '.join(holders)}"] if holders else []
        parts += ["free"] if block_id in free else []
        lines.append("  ".join(parts))
    return lines


def _requests(target: Any) -> list[str]:
    lines = []
    for request in target.requests:
        text = f"r{request.number}: prompt {_tokens(request.prompt)}"
        text += f", output {_tokens(request.output)}" if request.output else ""
        table = list(request.seq.block_table)
        state = f"block table {_tokens(table)}" if table else "has ended" if request.is_finished else "waits"
        lines.append(f"{text}; {state}")
    return lines


def _tokens(values: list[int]) -> str:
    return " ".join(map(str, values))
