"""What the owner of an engine reads when it breaks a contract."""

from tests.conformance.engines.adapters import Target
from tests.conformance.engines.contracts import Contract
from tests.conformance.engines.driver import Broken

LINE = "-" * 40


def explain(contract: Contract, target: Target, broken: Broken) -> str:
    parts = [
        f"{contract.id} is broken by {target.name}: {contract.sentence}\nusers see: {contract.users_see}",
        f"expected   {broken.expected}\ngot        {broken.got}",
        script(target, broken),
        broken.traceback(),
    ]
    return "\n\n".join(part for part in parts if part)


def explain_unusable(target: Target, broken: Broken) -> str:
    """For an engine that fails before any contract is checked."""
    return (
        f"--engine {target.name}, called as {target.adapter.name}, cannot be used: {broken.got}\n\n"
        f"{script(target, broken)}\n\n--engine-adapter NAME calls it in another way, --engine-option NAME=VALUE "
        "constructs it with other options: see docs/conformance_engines.md"
    )


def script(target: Target, broken: Broken) -> str:
    path = f"{target.path}:." if target.path else "."
    command = f"PYTHONPATH={path} python scenario.py"
    return (
        f"the smallest scenario, as scenario.py for the root of this checkout: {command}\n{LINE}\n{broken.script}{LINE}"
    )
