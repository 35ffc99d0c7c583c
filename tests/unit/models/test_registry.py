"""The registry: each architecture is one file, found by its name."""

import re
from pathlib import Path

from nanovllm import models
from nanovllm.models.registry import SHARED_FILES, architectures
from tests.support.source_tree import ROOT
from tests.support.tiny_models import ARCHITECTURES


def test_each_file_states_the_architecture_of_its_name():
    """D64: one file an architecture; none is guessed from a flag."""
    names = {path.stem for path in Path(models.__path__[0]).glob("*.py")} - SHARED_FILES - {"__init__"}
    assert list(architectures()) == sorted(names)
    assert names == set(ARCHITECTURES), "tests/support/tiny_models.py lists the architectures that the tests draw"
    assert len({architecture.class_name for architecture in architectures().values()}) == len(names)


def test_the_guide_shows_the_file_that_it_adds():
    shown = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/adding_a_model.md").read_text(), re.M | re.S)
    assert shown == [(ROOT / "nanovllm/models/mistral.py").read_text()]
