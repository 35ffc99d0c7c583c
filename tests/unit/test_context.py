"""Context belongs to one forward pass of one thread."""

import threading

import pytest

from nanovllm.context import get_context, set_context
from tests.support.attention_cases import Case, make_step


def test_another_thread_sets_a_context_of_its_own() -> None:
    """D81."""
    outer, inner = (make_step(Case((lengths,))).context for lengths in ((3, 3), (2, 2)))
    seen = []

    def use() -> None:
        with pytest.raises(RuntimeError, match="outside"):
            get_context()
        with set_context(inner):
            seen.append(get_context())

    with set_context(outer):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert get_context() is outer
    assert seen == [inner]


def test_forward_passes_do_not_nest() -> None:
    context = make_step(Case(((3, 3),))).context
    with set_context(context), pytest.raises(RuntimeError, match="nest"), set_context(context):
        pass
    with set_context(context):  # the failed one left nothing behind
        assert get_context() is context
