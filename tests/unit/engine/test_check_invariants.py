"""BlockManager.check_invariants: each invariant, broken on purpose, is named."""

from collections.abc import Callable

import pytest

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from tests.support.scheduling import computed


def empty_free_list(manager: BlockManager, seqs: list[Sequence]) -> None:
    manager._free_block_ids.popitem()


def own_one_block_twice(manager: BlockManager, seqs: list[Sequence]) -> None:
    seqs[1].block_table.append(seqs[1].block_table[0])
    manager.blocks[seqs[1].block_table[0]].ref_count += 1


def lose_an_owner(manager: BlockManager, seqs: list[Sequence]) -> None:
    manager.blocks[seqs[0].block_table[0]].ref_count = 5


def lose_a_mapping(manager: BlockManager, seqs: list[Sequence]) -> None:
    manager.hash_to_block_id.popitem()


def leave_an_empty_list(manager: BlockManager, seqs: list[Sequence]) -> None:
    manager._same_hash[next(iter(manager.hash_to_block_id))] = []


def change_a_hash(manager: BlockManager, seqs: list[Sequence]) -> None:
    manager.blocks[0].hash = 12345


def drop_a_token(manager: BlockManager, seqs: list[Sequence]) -> None:
    manager.blocks[0].token_ids.pop()


def name_equal_contents_differently(manager: BlockManager, seqs: list[Sequence]) -> None:
    manager.blocks[seqs[1].block_table[0]].token_ids = [1, 2]


def name_two_contents_alike(manager: BlockManager, seqs: list[Sequence]) -> None:
    manager.blocks[seqs[1].block_table[0]].prefix_id = manager.blocks[seqs[0].block_table[0]].prefix_id


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (empty_free_list, "free list .* is not the set of unowned blocks"),
        (own_one_block_twice, "owns a block twice"),
        (lose_an_owner, "block 0 has ref_count 5 and 1 owners"),
        (lose_a_mapping, "blocks found by hash .* are not the cached blocks"),
        (leave_an_empty_list, "a hash has further blocks but no first one, or an empty list"),
        (change_a_hash, "cached block 0 is not found by its hash"),
        (drop_a_token, "cached block 0 holds 1 tokens, not 2"),
        (name_equal_contents_differently, "has the content of another but not its prefix_id"),
        (name_two_contents_alike, "one prefix_id names two contents"),
    ],
)
def test_check_invariants_names_what_is_broken(damage: Callable[..., None], words: str) -> None:
    manager = BlockManager(6, 2)
    seqs = [computed(manager, [1, 2]), computed(manager, [3, 4, 5])]
    manager.check_invariants(seqs)
    damage(manager, seqs)
    with pytest.raises(RuntimeError, match=f"BlockManager invariant broken: .*{words}"):
        manager.check_invariants(seqs)
