"""The refusals hold under `python -O`, which removes nanovllm's asserts (pytest rewrites those of the tests)."""

from tests.support.programs import run_python

API_TESTS = [
    "tests/e2e/test_errors.py",
    "tests/unit/test_config.py",
    "tests/unit/test_sampling_params.py",
    "tests/unit/test_validation.py",
    "tests/unit/test_model_config.py",
    "tests/unit/engine/test_scheduler.py",
]
# pytest's note that asserts outside of test modules do nothing under -O: which is the point
OPTIONS = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestConfigWarning"]
OPTIONS += ["-k", "not step_that_fails"]  # which is planted, and refuses nothing


def test_api_tests_pass_under_o():
    """D72: what users get wrong is refused by `raise`, not by assert."""
    result = run_python("-O", "-m", "pytest", *OPTIONS, *API_TESTS)
    assert result.returncode == 0, result.stdout
