"""The one test of `pytest --replay FILE`. Its name keeps it out of every other run."""

from pathlib import Path

import pytest

from tests.replay.player import Difference, machine_for, play
from tests.replay.plugin import replay_options
from tests.replay.trace import Trace


def test_replay(replayed_file: Path, request: pytest.FixtureRequest) -> None:
    """Passes when the run goes as recorded and nothing failed then; the record of a failure fails either way."""
    trace = Trace.load(replayed_file)
    ended = f"{trace.failure['failed']} ended in {trace.failure['error']}" if trace.failure else ""
    if trace.header["caveat"]:
        ended += f"\nthis trace cannot be repeated exactly: {trace.header['caveat']}"
    try:
        with machine_for(trace, **replay_options(request.config)) as machine:
            score = play(trace, machine)
    except Difference as difference:
        raise Difference(f"the run does not go as recorded: {difference}\n{ended}") from None
    print(score)
    if trace.failure:
        pytest.fail(
            f"reproduced, the run goes as recorded in all of its {score.num_steps} steps: {ended}", pytrace=False
        )
