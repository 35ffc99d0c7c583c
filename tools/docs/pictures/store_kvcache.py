"""Four new tokens and their slots, and the cache before and after store_kvcache(): three blocks of four slots.

The numbers stand for keys. The token with slot -1 is stored nowhere, and what other sequences keep stays as it was.
"""

import torch

from reference.store_kvcache import store_kvcache
from tools.docs.svg import Drawing

NUM_BLOCKS, BLOCK_SIZE = 3, 4
BEFORE = [[31, 32, 33, 0], [0, 0, 0, 0], [21, 22, 23, 24]]
KEYS, SLOTS = [41, 42, 43, 44], [4, 5, -1, 3]


def draw() -> Drawing:
    before = torch.tensor(BEFORE, dtype=torch.float64).view(NUM_BLOCKS, BLOCK_SIZE, 1, 1)
    keys = torch.tensor(KEYS, dtype=torch.float64).view(-1, 1, 1)
    after, _ = store_kvcache(keys, keys, before, before, torch.tensor(SLOTS))
    drawing = Drawing(372, 236, "New keys go to their slots in the cache")
    drawing.text(84, 24, "new keys", "faint small", "end")
    drawing.text(84, 52, "slot_mapping", "faint small", "end")
    for i, (key, slot) in enumerate(zip(KEYS, SLOTS, strict=True)):
        drawing.box(92 + 40 * i, 6, 40, 28, "b" if slot >= 0 else "free", key)
        drawing.text(112 + 40 * i, 52, slot, "bold" if slot >= 0 else "faint")
    for top, title, cache in ((92, "before", before), (178, "after", after)):
        drawing.text(8, top - 8, title, "bold", "start")
        for slot, (old, value) in enumerate(zip(before.flatten().tolist(), cache.flatten().tolist(), strict=True)):
            x = 8 + 29 * slot + 6 * (slot // BLOCK_SIZE)
            look = "free" if not value else "a" if value == old else "b"
            drawing.box(x, top, 29, 26, look, f"{value:g}" if value else "")
            drawing.text(x + 14.5, top + 40, slot, "faint small")
    return drawing
