"""Planted faults: the smallest change of targets/right that breaks one contract, and no other."""

from collections.abc import Mapping
from pathlib import Path

RIGHT = Path(__file__).parent / "right"


class Fault:
    """A change that breaks `contract`.

    texts: file of smallvllm/, text, what stands there instead; and so on. num_steps: at most, of the smallest scenario.
    It is None where the contract has a script. also: contracts that it breaks as well, in rarer scenarios.
    renamed: what stands in all files, and what instead. without: a file that is left out.
    """

    def __init__(
        self,
        contract: str,
        *texts: str,
        num_steps: int | None = None,
        also: tuple[str, ...] = (),
        renamed: Mapping[str, str] | None = None,
        without: str = "",
    ) -> None:
        self.contract, self.texts, self.num_steps, self.also = contract, texts, num_steps, also
        self.renamed, self.without = renamed or {}, without

    def plant(self, root: Path) -> None:
        """Change the copy of RIGHT at `root`. Every text must be there once."""
        for file, old, new in zip(self.texts[::3], self.texts[1::3], self.texts[2::3], strict=True):
            path = root / "smallvllm" / file
            text = path.read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{self.contract}: {file} has {old!r} {text.count(old)} times"
            path.write_text(text.replace(old, new), encoding="utf-8")
        for path in root.rglob("*.py") if self.renamed else ():
            text = path.read_text(encoding="utf-8")
            for old, new in self.renamed.items():
                text = text.replace(old, new)
            path.write_text(text, encoding="utf-8")
        if self.without:
            (root / "smallvllm" / self.without).unlink()


BLOCKS, SCHEDULER = "engine/block_manager.py", "engine/scheduler.py"
SEQUENCE, RUNNER = "engine/sequence.py", "engine/model_runner.py"
ASYNC = "engine/async_scheduler.py"
CONFIG, PARAMS = "config.py", "sampling_params.py"
_TAKE = "while len(seq.block_table) < seq.num_blocks:\n            seq.block_table.append(self._take_free_block())"
_SHARE_PART = """\
while len(seq.block_table) < seq.num_blocks:
            is_last = len(seq.block_table) == seq.num_blocks - 1
            full = seq.num_blocks * self.block_size if is_last else -1
            sharing = [b for b in self.blocks if b.ref_count and len(b.prefix) == full]
            sharing = [b for b in sharing if b.prefix[: len(seq)] == seq.token_ids]
            if sharing:
                sharing[0].ref_count += 1
            seq.block_table.append(sharing[0].block_id if sharing else self._take_free_block())"""
_ENTER_EARLY = """\
            seq.append_token(token_id)
            self.block_manager.hash_blocks(seq, 1)
"""
_ENDS = "seq.num_completion_tokens >= seq.max_tokens:\n                "
_LEAVE = """\
(self.running if seq in self.running else self.waiting).remove(seq)
                seq.status = SequenceStatus.FINISHED
                seq.num_output_placeholders = 0
                """
_GIVE_BACK = "if block.ref_count == 0:\n                self.free_block_ids.append(block_id)"
_PREFIX = "self.blocks[block_id].prefix != seq.prefix(index + 1)"
_CHECK_MAX_TOKENS = "if self.max_tokens < 1:"
_ADVANCE = "seq.num_cached_tokens += num_computed\n"

# fmt: off
FAULTS = {
    "C01 shares a block in part and writes to it": Fault("C01", BLOCKS, _TAKE, _SHARE_PART, num_steps=5),
    "C02 does not count down what is shared": Fault("C02",
        BLOCKS, "block.ref_count -= 1", "block.ref_count -= block.ref_count == 1", num_steps=4),
    "C03 frees a block that one sequence still holds": Fault("C03",
        BLOCKS, _GIVE_BACK, _GIVE_BACK.replace("== 0", "<= 1"), num_steps=4),
    "C04 never frees what is cached": Fault("C04",
        BLOCKS, _GIVE_BACK, _GIVE_BACK.replace("== 0", "== 0 and not block.prefix"), num_steps=2),
    "C05 opens a block one token late": Fault("C05",
        BLOCKS, "if seq.num_tokens_ahead % self.block_size == 1:",
        "if seq.num_tokens_ahead - 1 > len(seq.block_table) * self.block_size:", num_steps=3),
    "C06 hashes and compares the block alone": Fault("C06",
        BLOCKS, _PREFIX, "self.blocks[block_id].token_ids != seq.block(index)",
        BLOCKS, "[parent + 1, len(token_ids)]", "[0, len(token_ids)]", num_steps=4),
    "C07 compares the block's tokens alone": Fault("C07",
        BLOCKS, _PREFIX, "self.blocks[block_id].token_ids != seq.block(index)", num_steps=4),
    "C08 enters a block before its last token is computed": Fault("C08",
        SCHEDULER, "            seq.append_token(token_id)\n", _ENTER_EARLY, num_steps=4),
    "C09 enters no block": Fault("C09", BLOCKS, "self.hash_to_block_id[parent] = block.block_id", "pass"),
    "C10 counts a chunk as one token": Fault("C10",
        SCHEDULER, "return budget - seq.num_scheduled_tokens", "return budget - 1", num_steps=3, also=("C16",)),
    "C11 admits one sequence too many": Fault("C11",
        SCHEDULER, "len(self.running) < self.max_num_seqs", "len(self.running) <= self.max_num_seqs", num_steps=3),
    "C12 bounds the step and not the set": Fault("C12",
        SCHEDULER, "len(self.running) < self.max_num_seqs", "len(batch) < self.max_num_seqs",
        SCHEDULER, "for seq in list(self.running):", "for seq in list(self.running)[: self.max_num_seqs]:",
        num_steps=4),
    "C13 leaves no token to compute": Fault("C13",
        BLOCKS, "range((len(seq) - 1) // self.block_size)", "range(len(seq) // self.block_size)", num_steps=4),
    "C14 wants a free block at every step": Fault("C14",
        BLOCKS, "return len(self.free_block_ids) >= seq.num_blocks - len(seq.block_table)",
        "return len(self.free_block_ids) >= 1", num_steps=3),
    "C15 sends the preempted to the back": Fault("C15",
        SCHEDULER, "self.waiting.appendleft(seq)", "self.waiting.append(seq)", num_steps=6),
    "C16 fails where it must preempt the last": Fault("C16",
        SCHEDULER, "if last is seq:\n                    break", "assert last is not seq", num_steps=4),
    "C16 loops until a block is free": Fault("C16",
        SCHEDULER, "self.preempt(last)\n                if last is seq:\n                    break", "pass",
        num_steps=4),
    "C17 computes a chunk again and again": Fault("C17",
        SCHEDULER, "            " + _ADVANCE,
        "            if num_computed == len(seq) - seq.num_cached_tokens:\n                " + _ADVANCE,
        num_steps=2, also=("C16",)),
    "C18 always prefers prefill": Fault("C18", SCHEDULER, "[] if is_due else self._sch", "self._sch"),
    "C19 admits what never fits": Fault("C19", SCHEDULER, "if length - 1 > room:", "if False:"),
    "C20 takes a token after each chunk": Fault("C20",
        SCHEDULER, "if is_prefill and seq.num_cached_tokens < len(seq):", "if False:", num_steps=2),
    "C21 generates one token too many": Fault("C21",
        SCHEDULER, "seq.num_completion_tokens >= seq.max_tokens", "seq.num_completion_tokens > seq.max_tokens",
        num_steps=2),
    "C22 stops in spite of ignore_eos": Fault("C22", SCHEDULER, " and not seq.ignore_eos", "", num_steps=2),
    "C23 keeps the blocks of what has ended": Fault("C23",
        SCHEDULER, _ENDS + "self.finish(seq)", _ENDS + _LEAVE, num_steps=2),
    "C24 keeps the blocks of what is aborted": Fault("C24",
        SCHEDULER, "self.finish(seq)\n                return", _LEAVE + "return", num_steps=3, also=("C02",)),
    "C25 ignores max_model_len": Fault("C25", SCHEDULER, "if length > self.max_model_len:", "if False:"),
    "C26 takes the last token of no prompt": Fault("C26", SEQUENCE, "if not token_ids:", "if False:"),
    "C27 accepts max_tokens=0": Fault("C27",
        PARAMS, _CHECK_MAX_TOKENS, "if False:",
        SCHEDULER, "seq.num_completion_tokens >= seq.max_tokens", "seq.num_completion_tokens == seq.max_tokens"),
    "C28 accepts any temperature": Fault("C28", PARAMS, "if not self.temperature > 1e-10:", "if False:"),
    "C29 sends its own token list away": Fault("C29",
        SEQUENCE, "        counters = (",
        "        if not self.is_prefill:\n            self.token_ids = []\n        counters = (", num_steps=3),
    "C30 sends one token of what was preempted": Fault("C30",
        SEQUENCE, "tokens = self.token_ids if self.is_prefill else",
        "tokens = self.token_ids if not self.num_completion_tokens else", num_steps=5),
    "C31 numbers no request": Fault("C31", SEQUENCE, "next(Sequence.ids)", "0"),
    "C32 has one block size a process": Fault("C32",
        SEQUENCE, "self.block_size = block_size\n        self.status",
        "Sequence.block_size = block_size\n        self.status",
        SEQUENCE, "self.num_output_placeholders, self.block_size, self.block_table, tokens) = state",
        "self.num_output_placeholders, _, self.block_table, tokens) = state"),
    "C33 begins at the first token": Fault("C33",
        RUNNER, "seq.token_ids[start:end]", "seq.token_ids[: end - start]", num_steps=3),
    "C34 is one position ahead": Fault("C34",
        RUNNER, "positions = [length - 1 for", "positions = [length for", num_steps=3),
    "C35 is one slot ahead": Fault("C35",
        RUNNER, "slots = [self.slot(seq, length - 1)", "slots = [self.slot(seq, length - 1) + 1", num_steps=3),
    "C36 counts cached tokens as queries": Fault("C36",
        RUNNER, "cu_seqlens_q[-1] + end - start", "cu_seqlens_q[-1] + end", num_steps=3),
    "C37 has the keys of the whole prompt": Fault("C37",
        RUNNER, "cu_seqlens_k[-1] + end)", "cu_seqlens_k[-1] + len(seq))", num_steps=2),
    "C38 leaves out the last key": Fault("C38",
        RUNNER, "context_lens = list(lengths)", "context_lens = list(positions)", num_steps=3),
    "C39 has no tables for cached prompts": Fault("C39",
        RUNNER, "self.block_tables(seqs) if has_cached_keys else None", "None", num_steps=3),
    "C40 sorts the temperatures": Fault("C40",
        RUNNER, "[seq.temperature for seq in seqs]", "sorted(seq.temperature for seq in seqs)", num_steps=4),
}
# fmt: on

# What only a scheduler that runs ahead of the model gets wrong.
_PLACED = "seq.num_output_placeholders += 1\n"
_ARRIVED = "        pairs = list(zip(seqs, token_ids, strict=True))\n"
_PREEMPTED = "seq.num_output_placeholders = 0\n        super().preempt(seq)\n"
_ENTER_LOST = (
    _ARRIVED
    + """\
        for seq in seqs:
            if not seq.is_finished and not seq.block_table:
                seq.block_table = seq.written
                self.block_manager.hash_blocks(seq, len(seq.written) * self.block_manager.block_size)
                seq.block_table = []
"""
)


def _late(condition: str) -> Fault:
    """A token that arrives for a finished sequence is appended under the condition."""
    lines = f"        for seq, token_id in pairs:\n            if seq.is_finished and {condition}:\n"
    contract = "C42" if condition == "seq.last_token == self.eos" else "C43"
    return Fault(
        contract, ASYNC, _ARRIVED, f"{_ARRIVED}{lines}                seq.append_token(token_id)\n", num_steps=4
    )


# fmt: off
FAULTS |= {
    "C42 appends what was computed behind the end": _late("seq.last_token == self.eos"),
    "C43 appends to what was aborted in flight": _late(
        "seq.last_token != self.eos and seq.num_completion_tokens < seq.max_tokens"
    ),
    "C43 takes the last token of what is preempted for the placeholder": Fault("C43",
        ASYNC, _PREEMPTED,
        ("if seq.num_output_placeholders:\n            seq.num_tokens -= 1\n            seq.token_ids.pop()\n"
            "            seq.last_token = seq.token_ids[-1]\n        " + _PREEMPTED), num_steps=5),
    "C41 enters the token in flight": Fault("C41",
        ASYNC, _ARRIVED,
        (_ARRIVED + "        for seq in seqs if not is_prefill else []:\n            if seq.block_table:\n"
            "                self.block_manager.hash_blocks(seq, seq.num_output_placeholders)\n"), num_steps=4),
    "C41 enters a block that was freed while its step was in flight": Fault("C41",
        ASYNC, _PLACED, _PLACED + "                seq.written = list(seq.block_table)\n",
        ASYNC, _ARRIVED, _ENTER_LOST, num_steps=5),
    "C03 frees the blocks of what ends with the step in flight": Fault("C03",
        ASYNC, _PLACED,
        (_PLACED + "                if not self.can_decode(seq):\n"
            "                    self.block_manager.free_block_ids.extend(seq.block_table)\n"), num_steps=3),
    "C05 counts blocks without the token in flight": Fault("C05",
        BLOCKS, "if seq.num_tokens_ahead % self.block_size == 1:",
        "if len(seq) > len(seq.block_table) * self.block_size:", num_steps=4),
    "C16 wants every token of a step": Fault("C16",
        ASYNC, "for seq, token_id in pairs if seq.num_output_placeholders]", "for seq, token_id in pairs]",
        ASYNC, "-= 1\n", "-= 1\n                assert seq.num_output_placeholders >= 0\n", num_steps=4),
    "C21 counts the token in flight as received": Fault("C21",
        SCHEDULER, "seq.num_completion_tokens >= seq.max_tokens",
        "seq.num_completion_tokens + (token_id != self.eos) * seq.num_output_placeholders >= seq.max_tokens",
        num_steps=4),
    "C22 goes on while a token is in flight": Fault("C22",
        SCHEDULER, " and not seq.ignore_eos", " and not seq.ignore_eos and not seq.num_output_placeholders",
        num_steps=4),
    "C30 sends no placeholders": Fault("C30",
        SEQUENCE, "(*counters, self.num_output_placeholders, self.block_size, self.block_table, tokens)\n",
        "(*counters, 0, self.block_size, self.block_table, tokens)\n", num_steps=4),
    "C34 leaves the token in flight out": Fault("C34",
        RUNNER, "[length - 1 for length in lengths]", "[len(seq) - 1 for seq in seqs]", num_steps=4),
    "C35 leaves the token in flight out": Fault("C35",
        RUNNER, "self.slot(seq, length - 1)", "self.slot(seq, len(seq) - 1)", num_steps=4),
    "C38 leaves the token in flight out": Fault("C38",
        RUNNER, "list(lengths)", "[len(seq) for seq in seqs]", num_steps=4),
}
# fmt: on

# Fixes that were proposed in public, or are near at hand, and are wrong: what they break.
_FORGET = "if self.hash_to_block_id.get(block.hash) == block_id:\n            del"
# fmt: off
WRONG_FIXES = {
    "a stale hash is deleted without a look at whose it is": Fault("C16",
        BLOCKS, _FORGET, "if block.hash != -1:\n            del"),
    "a block is demanded one token early": Fault("C05",
        BLOCKS, "if seq.num_tokens_ahead % self.block_size == 1:", "if len(seq) % self.block_size == 0:"),
    "the first sequence of a step is clamped where the step is prepared": Fault("C13",
        BLOCKS, "range((len(seq) - 1) // self.block_size)", "range(len(seq) // self.block_size)",
        RUNNER, "start = seq.num_cached_tokens\n", "start = min(seq.num_cached_tokens, len(seq) - 1)\n",
        RUNNER, "end = start + seq.num_scheduled_tokens", "end = start + max(seq.num_scheduled_tokens, 1)"),
    "a step that can schedule nothing is tried again": Fault("C19",
        SCHEDULER, "if length - 1 > room:", "if False:",
        SCHEDULER, "return (batch, True) if batch else (self._schedule_decode(), False)",
        "return (batch, True) if batch else (self._schedule_decode() or self.schedule()[0], False)"),
}
# fmt: on

# What the process that runs the target must survive.
_PREEMPT = "    def preempt(self, seq: Sequence):\n"


def _hostile(*lines: str) -> Fault:
    """A preemption that begins with `lines`."""
    body = "".join(f"        {line}\n" for line in lines)
    return Fault("C16", SCHEDULER, _PREEMPT, _PREEMPT + body)


HOSTILE = {
    "ends its process": _hostile("import os", "os._exit(0)"),
    "is ended by a signal": _hostile("import os", "os.abort()"),
    "eats memory": _hostile("self.eaten = bytearray(2**34)"),
    "empties its own source, and needs the network": _hostile(
        "import socket",
        "from pathlib import Path",
        "Path(__file__).write_text('')",
        "socket.create_connection(('127.0.0.1', 9), timeout=1)",
    ),
}
