"""Attention, the layer, in warm-up, which runs before there is a cache. tests/e2e/test_hugging_face.py has the rest."""

import pytest

from tests.support.attention_cases import Case, make_step
from tests.support.comparing import same_bits

PREFILL, DECODE = Case(((8, 8), (3, 3))), Case(((1, 9), (1, 1)), is_prefill=False)


def test_without_a_cache_prefill_attends_over_the_step_and_stores_nothing() -> None:
    step = make_step(PREFILL)
    assert same_bits(step.run(has_cache=False), make_step(PREFILL).run())


@pytest.mark.parametrize("case", [DECODE, Case(((3, 8),))], ids=["decode", "prefill"])
def test_without_a_cache_cached_keys_are_an_error(case: Case) -> None:
    with pytest.raises(RuntimeError, match="needs a kv_cache"):
        make_step(case).run(has_cache=False)
