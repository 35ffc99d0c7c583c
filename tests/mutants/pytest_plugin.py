"""Loaded into the pytest that judges a mutant: a failing example is enough, nobody reads it, so it is not shrunk."""

from hypothesis import Phase, settings


def pytest_sessionstart() -> None:
    """After conftest.py has loaded its profile, before the tests take it over."""
    settings.register_profile(
        "mutants", parent=settings(), phases=(Phase.explicit, Phase.generate), database=None, print_blob=False
    )
    settings.load_profile("mutants")
