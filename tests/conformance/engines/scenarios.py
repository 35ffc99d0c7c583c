"""Scenarios of the contracts: what is done with an engine, through generate(prompts, params) alone.

Each starts with a fresh Driver, and compares the engine with itself in another way, unless it says otherwise.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from tests.conformance.engines.driver import Driver, NotApplicable, Output, Request, request
from tests.conformance.engines.models import BUNDLED, bundled, tiny
from tests.conformance.engines.oracle import are_greedy_choices, greedy_tokens, prompt_that_ends
from tests.support.counts import count_comparisons
from tests.support.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE


def first_model(driver: Driver, ends: tuple[int, ...] = (EOS_TOKEN_ID,)) -> Path:
    """ends: its end-of-sequence tokens, which change nothing else of it."""
    return tiny(driver.adapter.architectures[0], driver.adapter.dtype, ends)


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


def batch_of_both(driver: Driver) -> None:
    greedy, other = request(prompt(5)), request(prompt(9))
    driver.open(first_model(driver))
    expected = alone(driver, [greedy, other])
    got = driver.generate([greedy, request(prompt(7), temperature=1.0), other])
    compare(driver, [got[0], got[2]], expected)


def order(driver: Driver, number: int) -> None:
    requests = [request(prompt(5, seed=index), max_tokens=3 + 4 * index) for index in range(number)]
    driver.open(first_model(driver))
    expected = driver.generate(requests)
    # Not reversed, which an engine that reverses its outputs would do twice.
    compare(driver, driver.generate([*requests[1:], requests[0]]), [*expected[1:], expected[0]])


def chunks(driver: Driver) -> None:
    requests = [request(prompt(40, seed=index), max_tokens=6) for index in range(3)]
    driver.open(first_model(driver))
    expected = driver.generate(requests)
    driver.open(first_model(driver), max_model_len=64, max_num_batched_tokens=driver.adapter.small_budget)
    compare(driver, driver.generate(requests), expected)
    driver.require("prefill chunk")


def cached_prompt(driver: Driver, num_more: int) -> None:
    again = request(prompt(2 * driver.adapter.block_size + num_more), max_tokens=4)
    driver.open(first_model(driver))
    expected = driver.generate([again])
    compare(driver, driver.generate([again]), expected)
    driver.require("prefix hit")


def shared_prefix(driver: Driver) -> None:
    size = driver.adapter.block_size
    prefix, same_block = prompt(size, seed=1), prompt(size, seed=2)
    found = request([*prefix, *prompt(5, seed=3)], max_tokens=4)
    not_found = request([*prompt(size, seed=4), *same_block, 1, 2, 3], max_tokens=4)
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


def greedy_is_transformers(driver: Driver, model_dir: Path, prompts: Sequence[Sequence[int]]) -> None:
    driver.open(model_dir)
    for text in prompts:
        (got,) = driver.generate([request(text, max_tokens=24)])
        tokens = got.token_ids[:24]  # the number of tokens is another contract
        count_comparisons("engine contracts: greedy tokens against transformers", len(tokens))
        if tokens and are_greedy_choices(model_dir, text, tokens, driver.adapter.dtype):
            continue
        expected = greedy_tokens(model_dir, text, len(tokens) or 1)
        driver.lines.append("# expected is what transformers' generate gives with do_sample=False")
        driver.same(f"{got.token_ids_source}[:{len(expected)}]", repr(expected))


def greedy_bundled(driver: Driver) -> None:
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(BUNDLED).encode
    prompts = [encode(text) for text in ("In the beginning", "And God said")]
    greedy_is_transformers(driver, bundled(driver.adapter.dtype), prompts)


def greedy_tiny(driver: Driver, index: int) -> None:
    names = driver.adapter.architectures
    if index < len(names):
        greedy_is_transformers(driver, tiny(names[index], driver.adapter.dtype), [prompt(5), prompt(70)])


def seeds(driver: Driver) -> None:
    one, other = (request(prompt(6), max_tokens=8, seed=seed) for seed in (1, 2))
    driver.open(first_model(driver))
    (expected,) = driver.generate([one])
    compare(driver, driver.generate([one]), [expected])
    (different,) = driver.generate([other])
    if different.token_ids == expected.token_ids:
        differ = f"{different.token_ids_source} != {expected.token_ids_source}"
        driver.run(f"assert {differ}", "other tokens with another seed")
    driver.open(first_model(driver))
    compare(driver, driver.generate([one]), [expected])


def seeds_in_company(driver: Driver) -> None:
    one, other = (request(prompt(6, seed=seed), max_tokens=8, seed=seed) for seed in (1, 2))
    greedy = request(prompt(6, seed=3), max_tokens=8)
    cold = request(prompt(6, seed=4), max_tokens=8, temperature=0.3, seed=4)
    driver.open(first_model(driver))
    expected = alone(driver, [one, cold])
    if driver.adapter.dtype == "float32":  # in half precision, another batch size may change a draw by rounding
        compare(driver, driver.generate([other, greedy, one, cold])[2:], expected)


# --- where a text ends ---


def max_tokens(driver: Driver, number: int) -> None:
    driver.open(first_model(driver))
    (got,) = driver.generate([request(prompt(6), max_tokens=number)])
    driver.same(f"len({got.token_ids_source})", str(number))
    (whole,) = driver.generate([request(prompt(6), max_tokens=12)])
    driver.same_tokens(got, whole.token_ids[:number])


def max_model_len(driver: Driver) -> None:
    driver.open(first_model(driver), max_model_len=64)
    (got,) = driver.generate([request(prompt(60), max_tokens=12)])
    driver.same(f"len({got.token_ids_source})", "64 - 60")


def end_of_sequence(driver: Driver, end: int, ends: tuple[int, ...] = (EOS_TOKEN_ID,)) -> None:
    """A text that ends with `end`, one of the end-of-sequence tokens of the checkpoint."""
    text, tokens = prompt_that_ends(first_model(driver), end)
    driver.open(first_model(driver, ends))
    (ended,) = driver.generate([request(text, max_tokens=16, ignore_eos=False)])
    if ended.token_ids != tokens[:-1]:  # an engine may leave the end-of-sequence token out
        driver.same_tokens(ended, tokens)
    (continued,) = driver.generate([request(text, max_tokens=16)])
    driver.same(f"len({continued.token_ids_source}) > {len(tokens)}", "True")
    driver.same(f"{continued.token_ids_source}[:{len(tokens)}]", repr(tokens))


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
    driver.same(got.text_source, repr(whole.text.partition(stop)[0]))


# --- errors and memory ---


def recovery(driver: Driver, share: float) -> None:
    """share: how much of a call's work is done when the error occurs in it."""
    failing = [request(prompt(5), max_tokens=8), request(prompt(9), max_tokens=8)]
    driver.open(first_model(driver))
    expected = driver.generate([request(prompt(7))])
    driver.generate(failing)  # what is done once, at the first call, is done
    driver.run("from tests.conformance.engines.planted import ModuleCalls")
    driver.generate(failing, "with ModuleCalls() as calls:\n    {}")
    number_of_all = driver.value("calls.number")
    if not number_of_all:
        raise NotApplicable("it calls its modules in another process, where no error can be planted")
    number = 1 + int(share * number_of_all)
    call = f"with ModuleCalls(fail_at={number}) as calls:\n        {driver.call(failing)}"
    driver.run(f"try:\n    {call}\nexcept Exception:\n    pass")
    assert driver.value("calls.number") >= number, "no error was planted: the same call calls fewer modules"
    compare(driver, driver.generate([request(prompt(7))]), expected)


def free_blocks(driver: Driver) -> None:
    requests = [request(prompt(20, seed=index)) for index in range(3)]
    expression = str(driver.adapter.free_blocks).format("llm")
    driver.open(first_model(driver))
    driver.run(f"before = {expression}")
    for number in (1, 3):
        driver.generate(requests[:number])
        driver.same(expression, "before")


def memory(driver: Driver, ending: str) -> None:
    """Libraries keep something from the first use on, so the second counts. ending: source that gives the rest back."""
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
    memory(driver, f"{str(driver.adapter.close).format('llm')}; kept.append(llm)")


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
