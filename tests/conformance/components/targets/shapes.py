"""Shapes that forks have and upstream has not, as changes of targets/right; and faults in them."""

from typing import Any

from tests.conformance.components.targets.faults import (
    ASYNC,
    BLOCKS,
    CONFIG,
    FAULTS,
    PARAMS,
    RUNNER,
    SCHEDULER,
    SEQUENCE,
    Fault,
)

_RETURN = "return (batch, True) if batch else (self._schedule_decode(), False)"
_POSTPROCESS = "def postprocess(self, seqs: list[Sequence], token_ids: list[int], is_prefill: bool):\n"
_LAST_ATTRIBUTE = "        self.num_prefills = 0\n\n"
_FLASH = "from flash_attn import flash_attn_varlen_func\n"


def shape(*texts: str, breaks: str = "", **options: Any) -> Fault:
    """Without a scheduler that runs ahead."""
    return Fault(breaks, *texts, without=ASYNC, **options)


# fmt: off
# Blocks move to the CPU and back.
_SWAP = """\
    def swap_out(self, seq: Sequence) -> list[tuple[int, int]]:
        pairs = [(block_id, self.free_places.popleft()) for block_id in seq.block_table]
        kept = seq.num_cached_tokens
        self.deallocate(seq)
        seq.num_cached_tokens = kept
        seq.places = [place for _, place in pairs]
        return pairs

    def swap_in(self, seq: Sequence) -> list[tuple[int, int]]:
        seq.block_table = [self._take_free_block() for _ in seq.places]
        self.free_places += seq.places
        return list(zip(seq.places, seq.block_table, strict=True))

    def can_append("""
_SCHEDULE = """\
    def schedule(self):
        self.swap_out_pairs, swap_in_pairs = [], []
        while self.swapped and len(self.running) < self.max_num_seqs:
            if len(self.block_manager.free_block_ids) < self.swapped[0].num_blocks:
                break
            self.running.append(self.swapped.popleft())
            swap_in_pairs += self.block_manager.swap_in(self.running[-1])
        seqs, is_prefill = self.choose()
        swap_out_pairs = self.swap_out_pairs
        return seqs, is_prefill, swap_in_pairs, swap_out_pairs

    def choose("""
_HAS_SWAPPED = (
    SCHEDULER, _LAST_ATTRIBUTE, "        self.num_prefills = 0\n        self.swapped = deque()\n\n",
)
_SWAPPING = (
    BLOCKS, "    def can_append(", _SWAP,
    BLOCKS, "        self.hash_to_block_id: dict",
    "        self.free_places = deque(range(64))\n        self.hash_to_block_id: dict",
    SCHEDULER, "    def schedule(", _SCHEDULE,
    *_HAS_SWAPPED,
    SCHEDULER, "return not seq.is_prefill\n", "return not seq.is_prefill and seq not in self.swapped\n",
    SCHEDULER, "while budget and self.waiting", "while budget and not self.swapped and self.waiting",
    SCHEDULER, "        seq.is_prefill = True\n        self.block_manager.deallocate(seq)\n", "",
    SCHEDULER, "self.waiting.appendleft(seq)",
    "self.swap_out_pairs += self.block_manager.swap_out(seq)\n        self.swapped.appendleft(seq)",
    SCHEDULER, "queue = self.running if seq in self.running else self.waiting",
    "queue = next(q for q in (self.running, self.waiting, self.swapped) if seq in q)",
    SCHEDULER, "[*self.running, *self.waiting]", "[*self.running, *self.waiting, *self.swapped]",
)
_WRONG_PLACE = ("return list(zip(seq.places,", "return list(zip(seq.places[::-1],")
# A schedule() moves a block to the CPU and back and chooses nothing; the next one goes on.
_MOVES = "\n    def swap_out(self, seq):\n        return [(0, 0)]\n\n    swap_in = swap_out\n\n    def can_append("
_MOVES_ALONE = """\
    def schedule(self) -> tuple[list[Sequence], bool]:
        if self.running and not self.has_swapped:
            self.has_swapped = bool(self.block_manager.swap_out(None) and self.block_manager.swap_in(None))
            return [], True
        return self.choose()

    def choose("""
_SWAPS_ALONE = (
    BLOCKS, "\n    def can_append(", _MOVES,
    SCHEDULER, "    def schedule(", _MOVES_ALONE,
    SCHEDULER, _LAST_ATTRIBUTE, "        self.num_prefills = 0\n        self.has_swapped = False\n\n",
)
_CATCHES_ALL = "with __import__('contextlib').suppress(Exception): "
# A block that holds a cached prefix leaves the list of free ones for another, and is taken when that is empty.
_CACHED = (
    BLOCKS, "        self.free_block_ids = deque(range(num_blocks))\n",
    "        self.free_block_ids = deque(range(num_blocks))\n        self.cached_block_ids = deque()\n",
    BLOCKS, "self.free_block_ids.append(block_id)",
    "(self.cached_block_ids if block.prefix else self.free_block_ids).append(block_id)",
    BLOCKS, "self.free_block_ids.remove(block_id)", "self.cached_block_ids.remove(block_id)",
    BLOCKS, "return len(self.free_block_ids) >= seq.num_blocks - len(shared)",
    "return len(self.free_block_ids) + len(self.cached_block_ids) >= seq.num_blocks - len(shared)",
    BLOCKS, "return len(self.free_block_ids) >= seq.num_blocks - len(seq.block_table)",
    "return len(self.free_block_ids) + len(self.cached_block_ids) >= seq.num_blocks - len(seq.block_table)",
)
_TAKE = (
    BLOCKS, "block_id = self.free_block_ids.popleft()",
    "block_id = (self.free_block_ids or self.cached_block_ids).popleft()",
)
# How long a chunk is follows from another option, unless it is given.
_CHUNKS = (
    CONFIG, "    prefills_in_a_row: int = 4", "    chunk_size: int = 0\n    prefills_in_a_row: int = 4",
    CONFIG, "        if self.kvcache_block_size % 256:",
    "        self.chunk_size = self.chunk_size or self.max_num_batched_tokens\n"
    "        if self.kvcache_block_size % 256:",
    SCHEDULER, "budget = self.max_num_batched_tokens", "budget = self.chunk_size",
    SCHEDULER, "        self.eos = config.eos\n",
    "        self.eos = config.eos\n        self.chunk_size = config.chunk_size\n",
)
# Prefill and decode are prepared by one method.
_UNIFIED = (
    RUNNER, "            cu_seqlens_k.append(cu_seqlens_k[-1] + end)\n",
    "            cu_seqlens_k.append(cu_seqlens_k[-1] + end)\n            lengths.append(end)\n",
    RUNNER, "slots, cu_seqlens_q, cu_seqlens_k = [], [], [], [0], [0]",
    "slots, lengths, cu_seqlens_q, cu_seqlens_k = [], [], [], [], [0], [0]",
    RUNNER, "            cu_seqlens_q=self.tensor(cu_seqlens_q),\n",
    "            cu_seqlens_q=self.tensor(cu_seqlens_q),\n            context_lens=self.tensor(lengths),\n",
)
_SENDS_ALL_TOKENS = (
    SEQUENCE, "tokens = self.token_ids if self.is_prefill else self.last_token", "tokens = self.token_ids",
)
_BATCH = (
    RUNNER, "def prepare_prefill(self, seqs: list[Sequence]):\n",
    "def prepare_batch(self, step):\n        seqs = step.sequences\n",
)
_PREPARE_OTHER = {"prepare_prefill": "prepare_model_input", "prepare_decode": "prepare_other"}
# A step is an object.
_OUTPUT = """\
from types import SimpleNamespace

        seqs = batch or self._schedule_decode()
        return SimpleNamespace(scheduled_seqs=seqs, num_prefills=len(batch), num_tokens=0)"""
_TAKES_OUTPUT = """\
def postprocess(self, output, token_ids: list[int]):
        seqs, is_prefill = output.scheduled_seqs, output.num_prefills > 0
"""
_STEP = """\
from dataclasses import dataclass


@dataclass(slots=True)
class Step:
    rows: list

    @property
    def sequences(self):
        return [seq for seq, _ in self.rows]


class Scheduler:
"""
_TAKES_STEP = """\
def postprocess(self, step, token_ids: list[int], is_prefill: bool | None = None, seconds: float = 0.0):
        seqs, is_prefill = step.sequences, True
"""
_DERIVED = (
    SCHEDULER, "class Scheduler:\n", _STEP,
    SCHEDULER, _RETURN, "return Step([(seq, True) for seq in batch or self._schedule_decode()])",
    SCHEDULER, _POSTPROCESS, _TAKES_STEP,
)
# A step is a list, and postprocess() is given the numbers of the rows that are sampled.
_TAKES_ROWS = """\
def postprocess(self, seqs: list[Sequence], token_ids: list[int], seq_need_compute_logits: list[int]):
        given = dict(zip(seq_need_compute_logits, token_ids, strict=True))
        token_ids, is_prefill = [given.get(row, -1) for row in range(len(seqs))], True
"""
_ROWS = (
    SCHEDULER, _RETURN, "return batch or self._schedule_decode()",
    SCHEDULER, _POSTPROCESS, _TAKES_ROWS,
)
_ONE_METHOD = """\
def prepare_inputs(self, seqs):
        return (self.prefill_inputs if seqs[0].is_prefill else self.decode_inputs)(seqs)

    def prefill_inputs("""
_COUNT = "        self.num_scheduled_tokens = 0\n"
_CAN_ALLOCATE = "if not self.block_manager.can_allocate(seq):"

# Each is checked whole, and clean.
KNOWN = {
    "blocks that are moved to the CPU": shape(*_SWAPPING),
    "an object with the number of prefills": shape(
        SCHEDULER, _RETURN, _OUTPUT,
        SCHEDULER, _POSTPROCESS, _TAKES_OUTPUT),
    "inputs that one method prepares": shape(
        RUNNER, "def prepare_prefill(", _ONE_METHOD,
        RUNNER, "def prepare_decode(", "def decode_inputs("),
    "a Config that refuses to be made here": shape(CONFIG, "if not os.path.isdir(self.model):", "if True:"),
    "a package that is not installed": shape(RUNNER, _FLASH, _FLASH + "import made_up_kernels\n"),
    "tokens of a step under another name": shape(renamed={"num_scheduled_tokens": "num_new_tokens"}),
    "a count that nothing sets": shape(
        SCHEDULER, _CAN_ALLOCATE, _CAN_ALLOCATE.replace("if", "if budget < len(seq) or", 1),
        SEQUENCE, _COUNT, _COUNT + "        self.num_scheduled = 0\n",
        renamed={"num_scheduled_tokens": "todo", "num_scheduled": "num_scheduled_tokens"}),
    "cached blocks in a list of their own": shape(*_CACHED, *_TAKE),
    "an option that is derived of another": shape(*_CHUNKS),
    "one preparation for all rows, and the sampled ones by number": shape(
        *_UNIFIED, *_SENDS_ALL_TOKENS, *_ROWS,
        renamed=_PREPARE_OTHER | {"self.is_prefill": "self.prefills", "seq.is_prefill": "seq.prefills"}),
    "a step whose sequences are derived": shape(
        *_UNIFIED, *_SENDS_ALL_TOKENS, *_BATCH, *_DERIVED, renamed={"prepare_decode": "prepare_other"}),
    "such a step, and a preparation of its sequences": shape(
        *_UNIFIED, *_SENDS_ALL_TOKENS, *_DERIVED, renamed=_PREPARE_OTHER),
    "a step that only swaps": shape(*_SWAPS_ALONE),
}

# Schedulers that run ahead of the model; of the second it is not known how it counts the tokens in flight.
_OBJECT = "output = super().schedule()\n        seqs, is_prefill = output.scheduled_seqs, output.is_prefill"
_COUNT_EACH = "if not is_prefill:\n            for seq in seqs:\n"
AHEAD_SHAPES = {
    "an object with is_prefill, and postprocess of three": Fault("",
        SCHEDULER, _RETURN, _OUTPUT.replace("num_prefills=len(batch)", "is_prefill=bool(batch)"),
        ASYNC, "seqs, is_prefill = super().schedule()", _OBJECT,
        ASYNC, "return seqs, is_prefill", "return output"),
    "placeholders of another name": Fault("",
        ASYNC, _COUNT_EACH, _COUNT_EACH.replace("if not is_prefill", "for seq in []")),
}

# With a part of the reason why they are not applicable.
UNKNOWN = {
    "a tuple of 4": Fault("",
        SCHEDULER, _RETURN, "return batch or self._schedule_decode(), bool(batch), [], []"),
    "none of the queues": Fault("",
        SCHEDULER, _LAST_ATTRIBUTE,
        "        self.num_prefills = 0\n        self.__dict__['lane'] = self.__dict__.pop('waiting')\n\n"),
    "Scheduler needs 'connector'": Fault("",
        SCHEDULER, "def __init__(self, config: Config):", "def __init__(self, config: Config, connector):"),
    "the block manager no swap_": Fault("", *_HAS_SWAPPED),
    "swap_out returns a str, and not which blocks it moves": Fault("", *(
        text.replace("[(0, 0)]", "'moved'").replace("            self.", f"            {_CATCHES_ALL}self.")
        for text in _SWAPS_ALONE)),
}

# Each is found by the contract that it breaks.
BROKEN_SHAPES = {
    "a block that comes back to the wrong place": shape(
        *(text.replace(*_WRONG_PLACE) for text in _SWAPPING), breaks="C06"),
    "cached blocks that nothing takes again": shape(*_CACHED, breaks="C04", also=("C16",)),
    "a worker that gets one token and reads all": shape(
        *_UNIFIED, *_BATCH, *_DERIVED, breaks="C30", renamed={"prepare_decode": "prepare_other"}),
    "a token after each chunk": shape(*_CHUNKS, *FAULTS["C20 takes a token after each chunk"].texts, breaks="C20"),
    "a step that neither computes nor swaps": shape(
        *(text.replace("return [(0, 0)]", "return []").replace("bool(", "not bool(") for text in _SWAPS_ALONE),
        breaks="C16"),
}
# Upstream's block manager of 2025: a block is entered when it is allocated, and its old entry stays.
_ENTERS_EARLY = """\
            block = self.blocks[self._take_free_block()]
            index, parent = len(seq.block_table), -1
            seq.block_table.append(block.block_id)
            if len(seq.block(index)) == self.block_size:
                for before in range(index + 1):
                    parent = self.compute_hash(seq.block(before), parent)
                block.hash, block.token_ids, block.prefix = parent, seq.block(index), seq.prefix(index + 1)
                self.hash_to_block_id[parent] = block.block_id

    def deallocate"""
ENTERS_EARLY = shape(
    BLOCKS, "            seq.block_table.append(self._take_free_block())\n\n    def deallocate", _ENTERS_EARLY,
    BLOCKS, "if self.hash_to_block_id.get(block.hash) == block_id:", "if False:",
    BLOCKS, "self.blocks[block_id].prefix != seq.prefix(index + 1)",
    "self.blocks[block_id].token_ids != seq.block(index)")
NEVER_SWAPS = shape(
    BLOCKS, "    def can_append(", _MOVES.lstrip("\n").replace("(0, 0)", ""),
    *_HAS_SWAPPED)
TWO_FAULTS = shape(
    *FAULTS["C25 ignores max_model_len"].texts, *FAULTS["C05 opens a block one token late"].texts)
ONE_TOKEN = shape(PARAMS, "if self.max_tokens < 1:", "if False:")
# fmt: on
