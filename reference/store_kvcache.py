"""Store: the keys and values of new tokens go to their slots in the cache, so that no later step computes them again.

    k_cache[slot // block_size, slot % block_size] = key[i]      for every token i, slot = slot_mapping[i] != -1
    v_cache[slot // block_size, slot % block_size] = value[i]

Why: a token's key and value depend on the tokens up to it and on nothing after it (see attention), so they are final
once computed. With them, a step computes one token and reads the stored keys; without them, it would compute all
tokens.

Why -1: batches are padded to the sizes for which a graph was captured, and when the prefix cache holds a whole prompt,
its last token is computed again for its logits only. Such tokens have a key but no slot, and must not change the cache:
another sequence may be reading it.

Letters: T tokens, K key/value heads, D head_dim.
"""

from jaxtyping import Float, Int
from torch import Tensor


def store_kvcache(
    key: Float[Tensor, "T K D"],
    value: Float[Tensor, "T K D"],
    k_cache: Float[Tensor, "num_blocks block_size K D"],
    v_cache: Float[Tensor, "num_blocks block_size K D"],
    slot_mapping: Int[Tensor, "T"],
) -> tuple[Float[Tensor, "num_blocks block_size K D"], Float[Tensor, "num_blocks block_size K D"]]:
    """Return the caches after the store (the engine writes in place). No two tokens have the same slot.

    Two blocks of 2 slots; token 0 goes to slot 2 (block 1, offset 0), token 1 nowhere, token 2 to slot 1:

    >>> import torch
    >>> key, empty = torch.tensor([5.0, 6.0, 7.0]).view(3, 1, 1), torch.zeros(2, 2, 1, 1)
    >>> k_cache, v_cache = store_kvcache(key, -key, empty, empty, torch.tensor([2, -1, 1]))
    >>> k_cache.flatten(1).tolist(), v_cache.flatten(1).tolist()
    ([[0.0, 7.0], [5.0, 0.0]], [[0.0, -7.0], [-5.0, 0.0]])
    """
    block_size = k_cache.shape[1]
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot != -1:
            k_cache[slot // block_size, slot % block_size] = key[i]
            v_cache[slot // block_size, slot % block_size] = value[i]
    return k_cache, v_cache


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
