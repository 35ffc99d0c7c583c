"""Plugin: tests run in an order that the run's seed decides, so that none can lean on one before it.

Modules are shuffled, then the tests within each: a module's fixtures are made once, as before. Every worker of xdist
has the seed, and so the order.
"""

import random
from typing import TypeVar

import pytest

from tests.run_seed import SEED

Item = TypeVar("Item")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = shuffled(items, [item.nodeid.partition("::")[0] for item in items], SEED)


def shuffled(items: list[Item], groups: list[str], seed: int) -> list[Item]:
    """The items in random order; those of one group stay together."""
    generator = random.Random(seed)
    members: dict[str, list[Item]] = {}
    for item, group in zip(items, groups, strict=True):
        members.setdefault(group, []).append(item)
    names = sorted(members)
    generator.shuffle(names)
    for name in names:
        generator.shuffle(members[name])
    return [item for name in names for item in members[name]]
