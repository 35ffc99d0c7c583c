"""check_invariants: what holds of a BlockManager between any two calls."""

from collections.abc import Iterable, Iterator

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence


def check_invariants(manager: BlockManager, sequences: Iterable[Sequence]) -> None:
    """Raise RuntimeError that names the first broken invariant. sequences: all that own blocks."""
    for problem in (*_broken_ownership(manager, list(sequences)), *_broken_invariants(manager)):
        raise RuntimeError(f"BlockManager invariant broken: {problem}")


def _broken_invariants(manager: BlockManager) -> Iterator[str]:
    mapped = [block_id for block_ids in manager.hash_to_block_ids.values() for block_id in block_ids]
    cached = [block.block_id for block in manager.blocks if block.is_cached]
    if sorted(mapped) != cached:
        yield f"blocks found by hash {sorted(mapped)} are not the cached blocks {cached}"
    if [] in manager.hash_to_block_ids.values():
        yield "a hash has an empty list of blocks"
    prefix_of: dict[tuple[int | None, tuple[int, ...]], int | None] = {}
    for block in (manager.blocks[block_id] for block_id in cached):
        if block.hash is None or block.block_id not in manager.hash_to_block_ids.get(block.hash, ()):
            yield f"cached block {block.block_id} is not found by its hash"
        if len(block.token_ids) != manager.block_size:
            yield f"cached block {block.block_id} holds {len(block.token_ids)} tokens, not {manager.block_size}"
        content = (block.parent_prefix_id, tuple(block.token_ids))
        if prefix_of.setdefault(content, block.prefix_id) != block.prefix_id:
            yield f"cached block {block.block_id} has the content of another but not its prefix_id"
    if len(set(prefix_of.values())) != len(prefix_of):
        yield "one prefix_id names two contents"


def _broken_ownership(manager: BlockManager, sequences: list[Sequence]) -> Iterator[str]:
    unowned = {block.block_id for block in manager.blocks if block.ref_count == 0}
    if unowned != set(manager._free_block_ids):
        yield f"free list {sorted(manager._free_block_ids)} is not the set of unowned blocks {sorted(unowned)}"
    owners = [0] * len(manager.blocks)
    for seq in sequences:
        if len(set(seq.block_table)) != len(seq.block_table):
            yield f"{seq!r} owns a block twice"
        for block_id in seq.block_table:
            owners[block_id] += 1
    for block in manager.blocks:
        if block.ref_count != owners[block.block_id]:
            yield f"block {block.block_id} has ref_count {block.ref_count} and {owners[block.block_id]} owners"
