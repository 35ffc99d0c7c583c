"""A prefix shared by two sequences, and its eviction: the states of a BlockManager of six blocks of two tokens.

A block shows its tokens if a new sequence can hit it. Sequence b begins like a and shares two blocks. Freed blocks keep
their content until another sequence takes them; c first takes blocks that hold nothing, then evicts the longest unused.
"""

from itertools import chain

from reference.block_manager import BlockManager
from tools.docs.svg import Drawing

NUM_BLOCKS, BLOCK_SIZE = 6, 2
TEXTS = {"a": ["and", "God", "said", "let", "there"], "b": ["and", "God", "said", "let", "the", "waters"]}
TEXTS["c"] = ["the", "earth", "was", "without", "form", "and", "void"]
LETTERS = {word: number for number, word in enumerate(dict.fromkeys(chain.from_iterable(TEXTS.values())))}


def draw() -> Drawing:
    left, width, row = 8, 60, 68
    drawing = Drawing(left + NUM_BLOCKS * width + 4, 40 + row * len(states()), "The blocks of the cache over time")
    for block in range(NUM_BLOCKS):
        drawing.text(left + block * width + width / 2, 14, f"block {block}", "faint small")
    for number, (what, pool) in enumerate(states()):
        top = 24 + number * row
        drawing.text(left, top + 12, what, "small", "start")
        for block in range(NUM_BLOCKS):
            owners = sorted(str(name) for name, table in pool.tables.items() if block in table)
            look = "c" if len(owners) > 1 else owners[0].replace("c", "d") if owners else "free"
            content = pool.prefixes.get(block, ())[-BLOCK_SIZE:]
            drawing.box(left + block * width, top + 18, width, 38, look if owners or not content else "free dashed")
            words = list(LETTERS)
            for line, token in enumerate(content):
                drawing.text(
                    left + block * width + 4,
                    top + 32 + 13 * line,
                    words[token][:8],
                    "small" if owners else "small faint",
                    "start",
                )
            label = f"x{len(owners)}" if len(owners) > 1 else "".join(owners)
            drawing.text(left + (block + 1) * width - 4, top + 52, label, "bold small", "end")
    return drawing


def states() -> list[tuple[str, BlockManager]]:
    """What happened, and the state after it."""
    tokens = {name: [LETTERS[word] for word in text] for name, text in TEXTS.items()}
    pool, _ = BlockManager(NUM_BLOCKS, BLOCK_SIZE).allocate("a", tokens["a"])
    pool = pool.computed("a", tokens["a"], len(tokens["a"]))
    found = [(f"a is computed: {len(tokens['a'])} tokens, the last block is not full", pool)]
    pool, cached = pool.allocate("b", tokens["b"])
    pool = pool.computed("b", tokens["b"], len(tokens["b"]))
    found.append((f"b begins alike: {cached} tokens are cached, two blocks shared", pool))
    found.append(("a leaves: the shared blocks still belong to b", pool := pool.deallocate("a")))
    found.append(("b leaves: all blocks are free, the full ones can be hit", pool := pool.deallocate("b")))
    order, cached_before = ", ".join(str(block) for block in pool.reuse_order()), set(pool.prefixes)
    pool, _ = pool.allocate("c", tokens["c"])
    (evicted,) = cached_before - set(pool.prefixes)
    pool = pool.computed("c", tokens["c"], len(tokens["c"]))
    found.append((f"c takes 4 blocks in the order {order} and evicts block {evicted}", pool))
    return found
