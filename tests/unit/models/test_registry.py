"""The registry: each architecture is one file, found by its name, and read without torch."""

import re
from pathlib import Path

from nanovllm import models
from nanovllm.assets import bundled_model_path
from nanovllm.models.registry import SHARED_FILES, architectures
from tests.support.programs import run_python
from tests.support.source_tree import ROOT
from tests.support.tiny_models import ARCHITECTURES


def test_each_file_states_the_architecture_of_its_name():
    """D64: one file an architecture; none is guessed from a flag."""
    names = {path.stem for path in Path(models.__path__[0]).glob("*.py")} - SHARED_FILES - {"__init__"}
    assert list(architectures()) == sorted(names)
    assert names == set(ARCHITECTURES), "tests/support/tiny_models.py lists the architectures that the tests draw"
    assert len({architecture.class_name for architecture in architectures().values()}) == len(names)


def test_a_model_config_is_read_without_torch():
    """LLMEngine reads it before it imports torch, and so that a wrong model is refused within a second."""
    code = "import sys; from nanovllm.models.registry import load_model_config as load; load(sys.argv[1])"
    result = run_python("-c", f"{code}; print('torch' in sys.modules)", bundled_model_path())
    assert result.stdout.strip() == "False", result.stderr


def test_the_guide_shows_the_file_that_it_adds():
    shown = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/adding_a_model.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert shown == [(ROOT / "nanovllm/models/mistral.py").read_text()]
