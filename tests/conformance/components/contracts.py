"""The contracts of a nano-vllm engine's components: one row each, data only.

A contract with `script` is checked by running that script; the others are checked at every step of drawn scenarios.
It is one file because it is one table.
"""

from dataclasses import dataclass

# Groups, by their titles in the document, which has them in the order of their first rows.
BLOCKS, SCHEDULING, REQUESTS = "Blocks and the prefix cache", "Scheduling", "Requests"
PROCESSES, INPUTS = "Processes", "Input preparation"
AHEAD = "Async scheduling"  # of schedulers that choose a step before the tokens of the step in front are known


@dataclass(frozen=True)
class Contract:
    """One rule.

    id: what reports, tests and documents call it. users_see: what a broken rule looks like from outside.
    report: the public report that it comes from, or the row of tests/DEFECTS.md.
    is_isolated: breaking it changes nothing that the driver does later, so the scenario goes on behind it.
    implied_by: contracts that, when broken, break this one too; then it is not judged.
    is_admission: it may also be kept by LLMEngine.add_request.
    is_about: why no scenario may come to the check although nothing is broken before it.
    script: the lines that check it, if no drawn scenario does.
    """

    id: str
    group: str
    rule: str
    users_see: str
    report: str
    is_isolated: bool = False
    implied_by: tuple[str, ...] = ()
    is_admission: bool = False
    is_about: str = ""
    script: str = ""


UPSTREAM = "https://github.com/GeeeekExplorer/nano-vllm"
_NO_HIT = "no prompt finds a cached block"
# fmt: off
_ROWS = (
    Contract("C01", BLOCKS, "A step overwrites no slot that another sequence reads.",
             "text of one request turns up in another, or turns into nonsense",
             "D05, D14; " + UPSTREAM + "/issues/208"),
    Contract("C02", BLOCKS, "The ref_count of a block is the number of sequences that hold it.",
             "blocks are lost until the server stalls, or are reused while a sequence still reads them",
             "block invariants of tests/DEFECTS.md (D09, D13)", implied_by=("C03",)),
    Contract("C03", BLOCKS, "A block of a block table is not free, and is in no table twice.",
             "a new request overwrites the keys of a running one",
             "block invariants of tests/DEFECTS.md (D09, D13); " + UPSTREAM + "/pull/243"),
    Contract("C04", BLOCKS, "When all requests have ended, the whole cache can be allocated again.",
             "a server that runs for days gets slower, preempts more and more, and stops",
             "D18, D34"),
    Contract("C05", BLOCKS, "The block table has a block for every token that the step computes.",
             "IndexError under load, or keys written past the end of the cache",
             "D06, D41; " + UPSTREAM + "/pull/66"),
    Contract("C06", BLOCKS, "A prefix hit means that all tokens up to the end of the block are equal.",
             "a fluent answer to a prompt that the user did not send",
             "D09; " + UPSTREAM + "/issues/163", is_about=_NO_HIT),
    Contract("C07", BLOCKS, "Two prefixes with the same block hash do not share the block.",
             "the answer to another prompt, for prompts that were made to collide: xxh64 is no cryptographic hash",
             "D09", implied_by=("C06", "C08"), is_about=_NO_HIT),
    Contract("C08", BLOCKS, "A block is shared only once its keys and values are stored.",
             "the first answers after a burst of equal prompts are nonsense, later ones are right",
             "D13; " + UPSTREAM + "/issues/208", is_about=_NO_HIT),
    Contract("C09", BLOCKS, "A prompt that was computed before finds its full blocks in the prefix cache.",
             "no error: the time to the first token of a shared system prompt is that of a new one",
             "D13, D14; " + UPSTREAM + "/issues/163", script="""\
target = Target(PATH, only="C09", block_size=2, num_blocks=8)
target.add([0, 1, 0, 1, 0], max_tokens=1)
target.step(8)
again = target.add([0, 1, 0, 1, 0], max_tokens=1)
target.step()
target.expect("C09", again.num_hit_tokens == 4, f"4 tokens are cached and {again.num_hit_tokens} were found")
"""),
    Contract("C10", SCHEDULING, "A step computes at most max_num_batched_tokens tokens.",
             "out of memory in the middle of a run, since warm-up measured a smaller step",
             "D42", is_isolated=True),
    Contract("C11", SCHEDULING, "A step has at most max_num_seqs sequences.",
             "StopIteration: no CUDA graph has that batch size",
             "D40", is_isolated=True),
    Contract("C12", SCHEDULING, "At most max_num_seqs sequences run at a time.",
             "max_num_seqs=4 and a hundred half-done requests, all of them slow, that preempt each other",
             "D16", is_isolated=True, implied_by=("C11",)),
    Contract("C13", SCHEDULING, "A scheduled sequence computes at least one token, and none past its end.",
             "an attention launch error for a repeated prompt, or IndexError after a preemption",
             "D05, D06; " + UPSTREAM + "/pull/211; " + UPSTREAM + "/pull/233"),
    Contract("C14", SCHEDULING, "No sequence is preempted while the free blocks suffice.",
             "a prompt is computed twice although its blocks were there",
             "D02; " + UPSTREAM + "/pull/66"),
    Contract("C15", SCHEDULING, "A preempted request runs again before those that arrived after it.",
             "the oldest request is the slowest, and gets slower the longer it waits",
             "D17"),
    Contract("C16", SCHEDULING, "schedule() and postprocess() neither fail nor hang while requests that fit are left.",
             "one AssertionError ends the server and every request in it",
             "D10, D19; " + UPSTREAM + "/pull/277"),
    Contract("C17", SCHEDULING, "Every request that fits ends after a bounded number of steps.",
             "the GPU is busy and no text comes",
             "D17"),
    Contract("C18", SCHEDULING, "A running sequence gets a token now and then while new prompts arrive.",
             "a stream stands still for as long as other users keep asking",
             "D15", script="""\
target = Target(PATH, only="C18", block_size=2, num_blocks=256, max_num_seqs=128)
running = target.add([0], max_tokens=100, ignore_eos=True)
target.step()
for token in range(64):
    target.add([token + 10], max_tokens=1)
    target.step()
target.expect("C18", len(running.output) > 1, "64 steps with an arrival each, and no token for a running sequence")
"""),
    Contract("C19", SCHEDULING, "A request that can never fit into the cache does not stop the others.",
             "one long prompt stalls or ends the whole server",
             "D10; " + UPSTREAM + "/pull/277", is_admission=True, script="""\
target = Target(PATH, only="C19", block_size=2, num_blocks=2, max_model_len=16)
target.add([1], max_tokens=1)
target.step(8)
target.try_add([0] * 7, max_tokens=2)
other = target.add([1], max_tokens=1)
target.try_steps(20)
target.expect("C19", other.is_finished, "a prompt of 7 tokens was accepted, and blocks the next request")
"""),
    Contract("C20", REQUESTS,
             "A sequence gets exactly one token in the step that computes its last token, and none before.",
             "a token too many in the middle of a long prompt, or one that is lost after a preemption",
             "D08"),
    Contract("C21", REQUESTS, "A request ends with its max_tokens-th token.",
             "answers of max_tokens - 1 or + 1 tokens, or without end",
             "D08, D12"),
    Contract("C22", REQUESTS, "A request ends at the end-of-sequence token, and goes on with ignore_eos.",
             "text after the end of the answer, or a benchmark that measures short answers",
             "D70"),
    Contract("C23", REQUESTS, "A finished sequence is in no queue and holds no block.",
             "finished requests are computed again, or keep their memory",
             "D18"),
    Contract("C24", REQUESTS, "An aborted request holds no block, and the others go on.",
             "clients that disconnect fill the cache",
             "D19", implied_by=("C31",)),
    Contract("C25", REQUESTS, "No sequence becomes longer than max_model_len.",
             "nonsense after the last position, or an illegal memory access in the rotary table",
             "D11", is_admission=True, script="""\
target = Target(PATH, only="C25", block_size=2, num_blocks=16, max_model_len=8)
request = target.try_add([0, 1, 0, 1], max_tokens=8, ignore_eos=True)
target.try_steps(12)
target.expect("C25", request is None or len(request.seq) <= 8, "max_model_len=8 and the sequence has more tokens")
"""),
    Contract("C26", REQUESTS, "An empty prompt is refused with ValueError.",
             "IndexError from the inside of the engine",
             "D12", is_admission=True, script="""\
target = Target(PATH, only="C26")
target.expect_refused("C26", "an empty prompt", lambda: target.add([], max_tokens=1))
"""),
    Contract("C27", REQUESTS, "max_tokens=0 is refused, or ends at once.",
             "a request that generates until the model's length, or without end",
             "D12", is_admission=True, script="""\
target = Target(PATH, only="C27", block_size=2, num_blocks=16)
request = target.try_add([0], max_tokens=0, ignore_eos=True)
target.try_steps(4)
target.expect("C27", request is None or request.is_finished, "max_tokens=0 was accepted, and the request does not end")
"""),
    Contract("C28", REQUESTS, "A temperature that is negative or no number is refused.",
             "the least likely token at every step, or NaN",
             "D56, D72", is_admission=True, script="""\
target = Target(PATH, only="C28")
for temperature in (-1.0, float("nan")):
    target.expect_refused(
        "C28", f"temperature={temperature}", lambda: target.add([0], max_tokens=1, temperature=temperature), Exception
    )
"""),
    Contract("C29", PROCESSES, "Pickling a sequence for the workers leaves it as it was.",
             "with two GPUs the outputs lose tokens; with one they do not",
             "D03"),
    Contract("C30", PROCESSES, "A worker prepares the same step from the pickled sequences as rank 0.",
             "with two GPUs an AttributeError or nonsense after a preemption; with one all is well",
             "D04", is_isolated=True),
    Contract("C31", REQUESTS, "Two requests have different ids.",
             "one request gets the output of another",
             "D18", script="""\
target = Target(PATH, only="C31")
first, second = target.add([0], max_tokens=1), target.add([0], max_tokens=1)
target.expect("C31", first.seq.seq_id != second.seq.seq_id, f"both have the id {first.seq.seq_id}")
"""),
    Contract("C32", PROCESSES, "Two engines with different block sizes in one process do not meet.",
             "wrong tokens in a server with two models, or in a test that starts a second engine",
             "D21", script="""\
first = Target(PATH, only="C32", block_size=2, num_blocks=8)
request = first.add([0, 1, 0, 1], max_tokens=1)
Target(PATH, only="C32", block_size=4, num_blocks=8).add([0], max_tokens=1)
first.expect("C32", request.seq.num_blocks == 2, f"4 tokens in blocks of 2 now take {request.seq.num_blocks} blocks")
"""),
    Contract("C33", INPUTS, "input_ids are the tokens that the step computes, sequence after sequence.",
             "the model answers another prompt",
             "D04, D06", is_isolated=True),
    Contract("C34", INPUTS, "The position of a token is its index in the sequence.",
             "text that is almost right: all rotary angles of the decode are off by one",
             "D01", is_isolated=True),
    Contract("C35", INPUTS, "The slot of token i is block_table[i // block_size] * block_size + i % block_size.",
             "text that is right until the first block is full",
             "D01", is_isolated=True),
    Contract("C36", INPUTS, "cu_seqlens_q counts the tokens that each sequence computes in the step.",
             "tokens of one prompt are taken for those of the next",
             "D05, D06", is_isolated=True),
    Contract("C37", INPUTS, "cu_seqlens_k counts the keys of each sequence up to the last token of the step.",
             "a chunk of a long prompt attends to slots that nothing has written yet",
             "D07", is_isolated=True),
    Contract("C38", INPUTS, "context_lens of a decode step counts all tokens, the last one included.",
             "each token does not see the one before it",
             "D01", is_isolated=True),
    Contract("C39", INPUTS, "block_tables has the block table of each sequence, wherever keys are read from the cache.",
             "a cached prompt is computed without its cached part",
             "D05, D41", is_isolated=True),
    Contract("C40", INPUTS, "Each row is sampled with the temperature of its own request.",
             "a request with a low temperature gets wild text when it shares a batch",
             "D57", is_isolated=True),
    Contract("C41", AHEAD,
             "The prefix cache says of a block what it holds: no placeholder, no token of a step that lost the block.",
             "the next turn of a conversation is computed again, or continues another conversation",
             "D09, D13; https://github.com/LMCache/LMCache/pull/1898", implied_by=("C01",)),
    Contract("C42", AHEAD, "A token that is computed past the end of a request is discarded.",
             "half a word behind the end of an answer, now and then",
             "D08; https://github.com/vllm-project/vllm/pull/19970"),
    Contract("C43", AHEAD, "A request that is preempted or aborted takes a token in flight once, or not at all.",
             "under load a word comes twice, or is missing",
             "D08; https://github.com/vllm-project/vllm/pull/48245; https://github.com/vllm-project/vllm/pull/38624",
             implied_by=("C20", "C31", "C42")),
)
# fmt: on
CONTRACTS = {row.id: row for row in _ROWS}
