"""CONTRACTS: what every engine owes its users, checked through generate(prompts, params) alone.

A contract's scenarios each start with a fresh Driver, the smallest first, so the first that fails is printed. Those that
may leave the process broken (a device assert, a lost engine) come last.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.conformance.engines.adapters import ALL_ARCHITECTURES, Target
from tests.conformance.engines.driver import Driver, NotApplicable, Output, Request, request
from tests.conformance.engines.models import BUNDLED, bundled, tiny
from tests.conformance.engines.oracle import are_greedy_choices, greedy_tokens, prompt_that_ends
from tests.support.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE

Scenario = Callable[[Driver], None]


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


def first_model(driver: Driver) -> Path:
    return tiny(driver.adapter.architectures[0], driver.adapter.dtype)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random bytes. Prompts below 16 tokens fill no block, so that no prefix cache can give them anything."""
    return random.Random(f"{length} {seed}").choices(range(256), k=length)


def alone(driver: Driver, requests: Sequence[Request]) -> list[Output]:
    return [driver.generate([one])[0] for one in requests]


def compare(driver: Driver, got: Sequence[Output], expected: Sequence[Output]) -> None:
    for one, other in zip(got, expected, strict=True):
        driver.same_tokens(one, other)


# --- a request and its company ---


def batch(driver: Driver, number: int) -> None:
    requests = [request(prompt(length)) for length in (5, 9, 3, 12, 7, 4, 8, 6)[:number]]
    driver.open(first_model(driver))
    expected = alone(driver, requests)
    compare(driver, driver.generate(requests), expected)


def order(driver: Driver, number: int) -> None:
    requests = [request(prompt(5, seed=index), max_tokens=3 + 4 * index) for index in range(number)]
    driver.open(first_model(driver))
    expected = driver.generate(requests)
    compare(driver, driver.generate(requests[::-1]), expected[::-1])


def chunks(driver: Driver) -> None:
    requests = [request(prompt(40, seed=index), max_tokens=6) for index in range(3)]
    driver.open(first_model(driver))
    expected = driver.generate(requests)
    driver.open(first_model(driver), max_model_len=64, max_num_batched_tokens=driver.adapter.small_budget)
    compare(driver, driver.generate(requests), expected)
    driver.require("prefill chunk")


def cached_prompt(driver: Driver, num_more: int) -> None:
    again = request(prompt(2 * driver.adapter.block_size + num_more), max_tokens=6)
    driver.open(first_model(driver))
    expected = driver.generate([again])
    compare(driver, driver.generate([again]), expected)
    driver.require("prefix hit")


def shared_prefix(driver: Driver) -> None:
    size = driver.adapter.block_size
    prefix, same_block = prompt(size, seed=1), prompt(size, seed=2)
    found = request([*prefix, *prompt(5, seed=3)], max_tokens=6)
    not_found = request([*prompt(size, seed=4), *same_block, 1, 2, 3], max_tokens=6)
    driver.open(first_model(driver))
    expected = alone(driver, [found, not_found])
    driver.open(first_model(driver))
    alone(driver, [request([*prefix, 7]), request([*prompt(size, seed=5), *same_block, 1, 2, 3])])
    compare(driver, alone(driver, [found, not_found]), expected)
    driver.require("prefix hit")


def preemption(driver: Driver) -> None:
    requests = [request(prompt(10, seed=index), max_tokens=50) for index in range(4)]
    driver.open(first_model(driver))
    expected = driver.generate(requests)
    driver.open(first_model(driver), max_model_len=64, num_blocks=8)  # each request grows from 1 to 4
    compare(driver, driver.generate(requests), expected)
    driver.require("preemption")


# --- which tokens ---


def greedy_is_transformers(driver: Driver, model_dir: Path, requests: Sequence[Request]) -> None:
    driver.open(model_dir)
    for one in requests:
        (got,) = driver.generate([one])
        tokens = got.token_ids[: one.params["max_tokens"]]  # the number of tokens is another contract
        if tokens and are_greedy_choices(model_dir, one.prompt, tokens, driver.adapter.dtype):
            continue
        expected = greedy_tokens(model_dir, one.prompt, len(tokens) or 1)
        expression = driver.adapter.token_ids.format(got.source)
        driver.lines.append("# expected is what transformers' generate gives with do_sample=False")
        driver.same(f"{expression}[:{len(expected)}]", repr(expected))


def encoded(text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED).encode(text)


def greedy_bundled(driver: Driver) -> None:
    requests = [request(encoded(text), max_tokens=24) for text in ("In the beginning", "And God said")]
    greedy_is_transformers(driver, bundled(driver.adapter.dtype), requests)


def greedy_tiny(driver: Driver, index: int) -> None:
    names = driver.adapter.architectures
    if index < len(names):
        requests = [request(prompt(length), max_tokens=24) for length in (5, 70)]
        greedy_is_transformers(driver, tiny(names[index], driver.adapter.dtype), requests)


def seeds(driver: Driver) -> None:
    one, other = (request(prompt(6), max_tokens=16, seed=seed) for seed in (1, 2))
    driver.open(first_model(driver))
    (expected,) = driver.generate([one])
    compare(driver, driver.generate([one]), [expected])
    (different,) = driver.generate([other])
    if different.token_ids == expected.token_ids:
        expressions = [driver.adapter.token_ids.format(output.source) for output in (different, expected)]
        driver.run(f"assert {' != '.join(expressions)}", "other tokens with another seed")
    driver.open(first_model(driver))
    compare(driver, driver.generate([one]), [expected])


def seeds_in_company(driver: Driver) -> None:
    one, *others = (request(prompt(6, seed=seed), max_tokens=16, seed=seed) for seed in range(4))
    driver.open(first_model(driver))
    expected = driver.generate([one])
    if driver.adapter.dtype == "float32":  # in half precision, another batch size may change a draw by rounding
        compare(driver, driver.generate([*others, one])[-1:], expected)


# --- where a text ends ---


def max_tokens(driver: Driver, number: int) -> None:
    driver.open(first_model(driver))
    (whole,) = driver.generate([request(prompt(6), max_tokens=12)])
    (got,) = driver.generate([request(prompt(6), max_tokens=number)])
    driver.same(f"len({driver.adapter.token_ids.format(got.source)})", str(number))
    driver.same_tokens(got, whole.token_ids[:number])


def end_of_sequence(driver: Driver) -> None:
    model_dir = first_model(driver)
    text, tokens = prompt_that_ends(model_dir, EOS_TOKEN_ID)
    driver.open(model_dir)
    (ended,) = driver.generate([request(text, max_tokens=16, ignore_eos=False)])
    if ended.token_ids != tokens[:-1]:  # an engine may leave the end-of-sequence token out
        driver.same_tokens(ended, tokens)
    (continued,) = driver.generate([request(text, max_tokens=16)])
    expression = driver.adapter.token_ids.format(continued.source)
    driver.same(f"len({expression}) > {len(tokens)}", "True")
    driver.same(f"{expression}[:{len(tokens)}]", repr(tokens))


def stop_token_ids(driver: Driver) -> None:
    driver.open(first_model(driver))
    (whole,) = driver.generate([request(prompt(6), max_tokens=12)])
    stop = whole.token_ids[7]
    end = whole.token_ids.index(stop)
    (got,) = driver.generate([request(prompt(6), max_tokens=12, stop_token_ids=[stop])])
    if got.token_ids != whole.token_ids[:end]:  # an engine may leave the stop token out
        driver.same_tokens(got, whole.token_ids[: end + 1])


def stop_string(driver: Driver) -> None:
    driver.open(bundled(driver.adapter.dtype))
    (whole,) = driver.generate([request("In the beginning", max_tokens=24)])
    stop = whole.text.split()[3]
    (got,) = driver.generate([request("In the beginning", max_tokens=24, stop=stop)])
    driver.same(driver.adapter.text.format(got.source), repr(whole.text.partition(stop)[0]))


# --- errors and memory ---


def recovery(driver: Driver, share: float) -> None:
    """share: how much of a call's work is done when the error occurs in it."""
    failing = [request(prompt(5), max_tokens=8), request(prompt(9), max_tokens=8)]
    driver.open(first_model(driver))
    expected = driver.generate([request(prompt(7))])
    driver.generate(failing)  # what is done once, at the first call, is done
    driver.run("from tests.conformance.engines.planted import TorchCalls")
    driver.generate(failing, "with TorchCalls() as calls:\n    {}")
    number = int(share * driver.value("calls.number"))
    if not number:
        raise NotApplicable("it calls torch in another thread or process, where no error can be planted")
    call = f"with TorchCalls(fail_at={number}) as calls:\n        {driver.call(failing)}"
    driver.run(f"try:\n    {call}\nexcept Exception:\n    pass")
    assert driver.value("calls.number") >= number, "no error was planted: the same call calls torch less often"
    compare(driver, driver.generate([request(prompt(7))]), expected)


def free_blocks(driver: Driver) -> None:
    requests = [request(prompt(20, seed=index)) for index in range(3)]
    expression = driver.adapter.free_blocks.format("llm")
    driver.open(first_model(driver))
    driver.run(f"before = {expression}")
    for number in (1, 3):
        driver.generate(requests[:number])
        driver.same(expression, "before")


def memory(driver: Driver, ending: str) -> None:
    """ending: source that gives everything back. Libraries keep something from the first use on, so the second counts."""
    driver.run("from tests.conformance.engines.resources import Watching, growth")
    constructor = driver.constructor(first_model(driver))
    driver.run("watching, kept = Watching(), []")
    lines = [f"llm = {constructor}", driver.call([request(prompt(20))]), ending, "return watching()"]
    driver.run("\n    ".join(["def use():", *lines]))
    try:
        driver.run("first, second = use(), use()")
        driver.same("growth(first, second)", "{}")
    finally:
        driver.value("watching.stop()")


def closed(driver: Driver) -> None:
    memory(driver, f"{driver.adapter.close.format('llm')}; kept.append(llm)")


def deleted(driver: Driver) -> None:
    memory(driver, "del llm")


# --- bad input ---


def bad_request(driver: Driver, bad: Request) -> None:
    refused(driver, driver.call([request(prompt(5)), bad]), max_model_len=64)


def too_few_params(driver: Driver) -> None:
    refused(driver, driver.call([request(prompt(5)), request(prompt(9)), request(prompt(3))], num_params=2))


def more_than_the_pool(driver: Driver) -> None:
    refused(driver, driver.call([request(prompt(5)), request(prompt(60), max_tokens=80)]), num_blocks=4)


def refused(driver: Driver, call: str, **options: int) -> None:
    """The call is refused, and the request that comes after it gets what it got before."""
    good = [request(prompt(7))]
    driver.open(first_model(driver), **options)
    expected = driver.generate(good)
    driver.refuse(call)
    compare(driver, driver.generate(good), expected)


BAD_REQUESTS = {
    "max_tokens of 0": request(prompt(9), max_tokens=0),
    "an empty prompt": request([]),
    "a prompt longer than max_model_len": request(prompt(70)),
    "a negative token id": request([5, -1, 7]),
    "a token id beyond the vocabulary": request([5, VOCAB_SIZE, 7]),
}

CONTRACTS = [
    Contract(
        "E01",
        "The tokens of a request do not depend on the other requests of the call.",
        "The answer to a prompt changes with what others ask at the same time; scores change with the batch size.",
        [partial(batch, number=2), partial(batch, number=8)],
    ),
    Contract(
        "E02",
        "Outputs come in the order of the prompts, and that order changes none of them.",
        "An answer is given to somebody else's question.",
        [partial(order, number=2), partial(order, number=5)],
    ),
    Contract(
        "E03",
        "A prompt that is computed in several chunks gives the tokens that it gives when it is computed whole.",
        "Long prompts get worse answers on a busy server than on an idle one.",
        [chunks],
    ),
    Contract(
        "E04",
        "A prompt whose beginning is in the prefix cache gives the tokens that it gives without the cache.",
        "The second user of a system prompt gets another answer than the first, or one that belongs to another text.",
        [partial(cached_prompt, num_more=0), partial(cached_prompt, num_more=3), shared_prefix],
    ),
    Contract(
        "E05",
        "A request that is preempted for lack of KV blocks gives the tokens that it gives with enough of them.",
        "Under load, answers repeat themselves or lose the thread in the middle.",
        [preemption],
        needs=("num_blocks",),
    ),
    Contract(
        "E06",
        "Greedy tokens are those of transformers, but where the two best logits are closer than rounding.",
        "Fluent but wrong text; scores below those that the model's authors report.",
        [*(partial(greedy_tiny, index=index) for index in range(len(ALL_ARCHITECTURES))), greedy_bundled],
    ),
    Contract(
        "E07",
        "Equal seed, prompt and parameters give equal tokens, in any company and in a new engine; another seed others.",
        "An answer cannot be reproduced, so no failure can be studied.",
        [seeds, seeds_in_company],
        needs=("seed",),
    ),
    Contract(
        "E08",
        "With ignore_eos a request has exactly max_tokens tokens, and max_tokens changes none of them.",
        "Answers are cut short, or cost more than was asked for.",
        [partial(max_tokens, number=number) for number in (1, 7)],
    ),
    Contract(
        "E09",
        "A text ends at the end-of-sequence token, and goes on after it with ignore_eos.",
        "Answers run on into garbage until max_tokens; benchmarks with ignore_eos measure fewer tokens than they say.",
        [end_of_sequence],
    ),
    Contract(
        "E10",
        "A text ends at the first of its stop_token_ids.",
        "A chat model goes on and writes the user's next message.",
        [stop_token_ids],
        needs=("stop_token_ids",),
    ),
    Contract(
        "E11",
        "A text ends before the first stop string in it.",
        "Programs that parse an answer find more behind its end.",
        [stop_string],
        needs=("stop",),
    ),
    Contract(
        "E12",
        "After an exception inside a step, the next call returns its own outputs, and the right ones.",
        "After one failure, every answer belongs to an older question, or the server must be restarted.",
        [partial(recovery, share=share) for share in (0.1, 0.5)],
    ),
    Contract(
        "E13",
        "After a call, as many KV blocks are free as before it.",
        "The server slows down over days, and at last accepts nothing.",
        [free_blocks],
        needs=("free_blocks",),
    ),
    Contract(
        "E14",
        "A closed engine gives back tensors, processes, files, shared memory and threads.",
        "A second engine in the same process runs out of memory; processes stay behind on the GPU.",
        [closed],
        needs=("close",),
    ),
    Contract(
        "E15",
        "An engine that is deleted without being closed gives back the same.",
        "A notebook runs out of memory when its cell is executed again.",
        [deleted],
    ),
    Contract(
        "E16",
        "A request that needs more KV blocks than exist is refused with a ValueError, and later calls are unharmed.",
        "One long request stops the server, or waits for ever.",
        [more_than_the_pool],
        needs=("small_pool",),
    ),
    Contract(
        "E17",
        "Bad input is refused with a ValueError or TypeError, and later calls are unharmed.",
        "One bad request takes down all others, or gets an answer that means nothing.",
        [too_few_params, *(partial(bad_request, bad=bad) for bad in BAD_REQUESTS.values())],
    ),
]
