"""CONTRACTS: what every engine owes its users.

The smallest scenario of a contract comes first, and the first that fails is printed. The contracts after which the
process may be unusable, by a device assert or a lost engine, come last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tests.conformance.engines import scenarios
from tests.conformance.engines.adapters import ALL_ARCHITECTURES, Target
from tests.conformance.engines.driver import Driver, NotApplicable, request
from tests.support.tiny_models import EOS_TOKEN_ID

Scenario = Callable[[Driver], None]
OTHER_END = 291  # a second end-of-sequence token: no byte, and every tiny model soon generates it after some prompt


@dataclass(frozen=True)
class Contract:
    """needs: words of Adapter.lacks without which the contract does not apply."""

    id: str
    sentence: str
    users_see: str
    scenarios: Sequence[Scenario]
    needs: tuple[str, ...] = ()

    def check(self, target: Target) -> None:
        """Raises Broken, or NotApplicable."""
        reasons = [target.adapter.lacks[word] for word in self.needs if word in target.adapter.lacks]
        if reasons:
            raise NotApplicable("; ".join(reasons))
        for scenario in self.scenarios:
            with Driver(target) as driver:
                scenario(driver)


def check_usable(target: Target) -> None:
    """Raises Broken unless the engine can be constructed and answers one request."""
    with Driver(target) as driver:
        driver.open(scenarios.first_model(driver))
        driver.generate([request(scenarios.prompt(5))])


# fmt: off
CONTRACTS = [
    Contract("E01", "The tokens of a request do not depend on the other requests of the call.",
        "The answer to a prompt changes with what others ask at the same time; scores change with the batch size.",
        [partial(scenarios.batch, number=2), scenarios.batch_of_both, partial(scenarios.batch, number=8)]),
    Contract("E02", "Outputs come in the order of the prompts, and that order changes none of them.",
        "An answer is given to another user's question.",
        [partial(scenarios.order, number=2), partial(scenarios.order, number=5)]),
    Contract("E03",
        "A prompt that is computed in several chunks gives the tokens that it gives when it is computed whole.",
        "Long prompts get worse answers on a busy server than on an idle one.",
        [scenarios.chunks]),
    Contract("E04", "A prompt whose beginning is in the prefix cache gives the tokens that it gives without the cache.",
        "The second user of a system prompt gets another answer than the first, or one that belongs to another text.",
        [
            partial(scenarios.cached_prompt, num_more=0),
            partial(scenarios.cached_prompt, num_more=3),
            scenarios.shared_prefix,
        ]),
    Contract("E05",
        "A request that is preempted for lack of KV blocks gives the tokens that it gives with enough of them.",
        "Under load, answers repeat themselves or lose the thread in the middle.",
        [scenarios.preemption], needs=("num_blocks",)),
    Contract("E06", "Greedy tokens are those of transformers, but where the two best logits are closer than rounding.",
        "Fluent but wrong text; scores below those that the model's authors report.",
        [
            *(partial(scenarios.greedy_tiny, index=index) for index in range(len(ALL_ARCHITECTURES))),
            scenarios.greedy_bundled,
        ]),
    Contract("E07",
        "Equal seed, prompt and parameters give equal tokens, in any company and in a new engine; another seed others.",
        "An answer cannot be reproduced, so no failure can be studied.",
        [scenarios.seeds, scenarios.seeds_in_company], needs=("seed",)),
    Contract("E08", "With ignore_eos a request has exactly max_tokens tokens, or as many as fit in max_model_len.",
        "Answers are cut short, cost more than was asked for, or run past what model and memory can hold.",
        [partial(scenarios.max_tokens, number=1), partial(scenarios.max_tokens, number=7), scenarios.max_model_len]),
    Contract("E09", "A text ends at any end-of-sequence token of the checkpoint, and goes on after it with ignore_eos.",
        "Answers run on into garbage until max_tokens; benchmarks with ignore_eos measure fewer tokens than they say.",
        [
            partial(scenarios.end_of_sequence, end=EOS_TOKEN_ID),
            partial(scenarios.end_of_sequence, end=OTHER_END, ends=(EOS_TOKEN_ID, OTHER_END)),
            partial(scenarios.end_of_sequence, end=EOS_TOKEN_ID, ends=(EOS_TOKEN_ID, OTHER_END)),
        ]),
    Contract("E10", "A text ends at the first of its stop_token_ids.",
        "A chat model goes on and writes the user's next message.",
        [scenarios.stop_token_ids], needs=("stop_token_ids",)),
    Contract("E11", "A text ends before the first stop string in it.",
        "Programs that parse an answer find more behind its end.",
        [scenarios.stop_string], needs=("stop",)),
    Contract("E12", "After an exception inside a step, the next call returns its own outputs, and the right ones.",
        "After one failure, every answer belongs to an older question, or the server must be restarted.",
        [partial(scenarios.recovery, share=share) for share in (0.1, 0.5)]),
    Contract("E13", "After a call, as many KV blocks are free as before it.",
        "The server slows down over days, and at last accepts nothing.",
        [scenarios.free_blocks], needs=("free_blocks",)),
    Contract("E14", "A closed engine gives back tensors, processes, files, shared memory and threads.",
        "A second engine in the same process runs out of memory; processes stay behind on the GPU.",
        [scenarios.closed], needs=("close",)),
    Contract("E15", "An engine that is deleted without being closed gives back the same.",
        "A notebook runs out of memory when its cell is executed again.",
        [scenarios.deleted]),
    Contract("E16",
        "A request that needs more KV blocks than exist is refused with a ValueError, and later calls are unharmed.",
        "One long request stops the server, or waits without end.",
        [scenarios.more_than_the_pool], needs=("small_pool",)),
    Contract("E17", "Bad input is refused with a ValueError or TypeError, and later calls are unharmed.",
        "One bad request takes down all others, or gets an answer that means nothing.",
        [
            scenarios.too_few_params,
            *(partial(scenarios.bad_request, bad=bad) for bad in scenarios.BAD_REQUESTS.values()),
        ]),
]
# fmt: on
