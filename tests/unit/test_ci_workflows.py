"""What the workflows and docs/ci.md name exists: make targets, modules, paths, and the declared Python versions."""

import re
from typing import Any

import pytest
import yaml

from tests.support.source_tree import ROOT

FOLDER = ROOT / ".github" / "workflows"
PAGE = ROOT / "docs" / "ci.md"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted(FOLDER.glob("*.yml"))  # the source distribution has none


def gitlab() -> str:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return block


def texts() -> dict[str, str]:
    """Name -> YAML of each workflow, and of the GitLab job in docs/ci.md."""
    return {path.name: path.read_text(encoding="utf-8") for path in WORKFLOWS} | {"GitLab": gitlab()}


def scripts(node: Any) -> list[str]:
    """Every shell script in a workflow."""
    if isinstance(node, list):
        return [script for item in node for script in scripts(item)]
    if not isinstance(node, dict):
        return []
    found = [script for value in node.values() for script in scripts(value)]
    found += [node["run"]] if isinstance(node.get("run"), str) else []
    return found + [line for line in node.get("script") or [] if isinstance(line, str)]


@pytest.mark.parametrize("name", texts())
def test_targets_modules_and_paths_of_a_workflow_exist_and_the_page_names_it(name: str) -> None:
    lines = [line for script in scripts(yaml.safe_load(texts()[name])) for line in script.splitlines()]
    calls = [re.split(r" \w+=|#", line.strip())[0].split() for line in lines]
    targets = {target for call in calls if call[:1] == ["make"] for target in call[1:]}
    assert targets or name == "release.yml"
    assert [target for target in targets if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)] == []
    modules = set(re.findall(r"python -m (tools\.\w+)", "\n".join(lines)))
    assert [module for module in modules if not (ROOT / f"{module.replace('.', '/')}.py").is_file()] == []
    assert name in PAGE.read_text(encoding="utf-8")
    paths = re.findall(r"\b(?:tests|tools|benchmarks)/[\w/]+", texts()[name])
    assert [path for path in paths if not (ROOT / path).exists() and not path.startswith("benchmarks/results")] == []


def test_the_suite_runs_on_every_python_that_pyproject_declares() -> None:
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert yaml.safe_load(gitlab())["test"]["parallel"]["matrix"][0]["PYTHON_VERSION"] == declared
    if WORKFLOWS:
        jobs = yaml.safe_load(texts()["ci.yml"])["jobs"]
        assert jobs["test"]["strategy"]["matrix"]["python-version"] == declared


def test_a_workflow_has_read_permission_only_unless_a_job_has_more() -> None:
    permissions = {path.name: yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] for path in WORKFLOWS}
    assert permissions == {path.name: {"contents": "read"} for path in WORKFLOWS}
