"""The source distribution is the checkout; the wheel, built from it, holds everything and declares everything. D71."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import nanovllm
from tests.support.programs import run_python
from tests.support.source_tree import ROOT, imported_packages, python_files
from tools.prepare_release import absolute_links, check_release, prepare

ADDED_BY_PACKING = r"PKG-INFO$|setup\.cfg$|nanovllm\.egg-info/"


def run(*command: object, cwd: Path = ROOT) -> str:
    result = run_python(*command, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def files_of(root: Path) -> set[str]:
    """Paths of the files below `root`, without what Python compiles."""
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def files_of_the_checkout() -> set[str]:
    """Those that git does not ignore; in an unpacked source distribution all but what packing adds."""
    if not (ROOT / ".git").exists():
        return {name for name in files_of(ROOT) if not re.match(rf"{ADDED_BY_PACKING}|\.(?!ci/)", name)}
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, in which a build may leave files."""
    folder = tmp_path_factory.mktemp("source")
    for name in files_of_the_checkout():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built by the declared backend without a network."""
    folder = tmp_path_factory.mktemp("sdist")
    run("-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})", cwd=source)
    (packed,) = folder.glob("nanovllm-*.tar.gz")
    return packed


@pytest.fixture(scope="module")
def unpacked_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution without a network, unpacked into an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*build, "-w", folder / "wheels", sdist)
    (wheel,) = folder.glob("wheels/nanovllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def distribution(unpacked_wheel: Path) -> importlib.metadata.Distribution:
    (found,) = importlib.metadata.distributions(path=[str(unpacked_wheel)])
    return found


def test_source_distribution_holds_every_file_of_the_checkout_and_what_packing_adds(sdist):
    """Files of the checkout whose name begins with a dot are of use in a checkout only, but for .ci/run."""
    expected = {name for name in files_of_the_checkout() if not name.startswith(".") or name.startswith(".ci/")}
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert expected - found == set()
    assert {name for name in found - expected if not re.match(ADDED_BY_PACKING, name)} == set()


# --- the wheel ---


def test_wheel_holds_every_file_of_the_package_and_no_other(unpacked_wheel):
    """D71: the bundled model and py.typed are no Python files and are packed only where pyproject.toml says so."""
    assert files_of(unpacked_wheel / "nanovllm") == files_of(ROOT / "nanovllm")
    assert [path.name for path in unpacked_wheel.iterdir() if path.suffix != ".dist-info"] == ["nanovllm"]


def test_wheel_declares_the_nanovllm_command(distribution):
    scripts = {entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert scripts == {"nanovllm": "nanovllm.cli:main"}


def test_declared_dependencies_are_those_that_are_imported(distribution):
    """D71: an undeclared one is missing in an empty environment. triton's import is lazy and optional."""
    extra = "extra =="
    declared = {(extra in text, re.split(r"[^\w-]", text)[0].replace("-", "_")) for text in distribution.requires}
    imported = {package for path in python_files("nanovllm") for package in imported_packages(path)}
    assert imported - {"nanovllm", *sys.stdlib_module_names} - {name for _, name in declared} == set()
    assert {name for is_extra, name in declared if not is_extra} - imported - {"triton"} == set()


# --- a release ---

URL, FILES_URL = "https://example.org/someone/nanovllm", "https://example.org/someone/nanovllm/blob/v0.1.0"


def test_a_prepared_release_has_urls_and_absolute_links_in_its_description(source, tmp_path):
    released = shutil.copytree(source, tmp_path / "released")
    changelog = released / "CHANGELOG.md"
    changelog.write_text(re.sub(r"^## 0\.1\.0.*$", "## 0.1.0 (2026-01-31)", changelog.read_text(), flags=re.MULTILINE))
    prepare(released, URL, "v0.1.0")
    hook = "from setuptools.build_meta import prepare_metadata_for_build_wheel as prepare; prepare('metadata')"
    (released / "metadata").mkdir()
    run("-c", hook, cwd=released)
    (folder,) = released.glob("metadata/*.dist-info")
    metadata = importlib.metadata.Distribution.at(folder).metadata
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL") or [])
    assert urls == {"Repository": URL, "Issues": f"{URL}/issues", "Changelog": f"{FILES_URL}/CHANGELOG.md"}
    description = metadata.get_payload()
    relative = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert relative
    assert re.findall(r"\]\(([^)#:]+)\)", description) == []
    assert all(f"]({FILES_URL}/{link})" in description for link in relative)


def test_links_in_code_and_to_other_sites_stay_as_they_are():
    text = "[a](docs/x.md#y) `[b](c.md)` [d](https://example.org) [e](#f)\n```python\ng[h](i)\n```\n[j](k.md)\n"
    expected = text.replace("docs/x.md", "https://r/docs/x.md").replace("k.md", "https://r/k.md")
    assert absolute_links(text, "https://r") == expected


@pytest.mark.parametrize(
    ("tag", "changelog", "words"),
    [
        ("0.1.0", "## 0.1.0 (2026-01-31)", "--tag must be v0.1.0, since nanovllm/__init__.py says so, got '0.1.0'"),
        ("v0.1.0", "## 0.2.0 (2026-01-31)", "section '## 0.1.0 (YYYY-MM-DD)', got no such section; date it"),
        ("v0.1.0", "## 0.1.0 (not released)", "got '## 0.1.0 (not released)'; date it"),
    ],
)
def test_a_release_whose_tag_version_and_changelog_disagree_is_refused(tag: str, changelog: str, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_release(tag, "0.1.0", changelog)


def test_an_address_that_is_none_is_refused_and_nothing_is_written(source, tmp_path):
    shutil.copy(source / "README.md", tmp_path)
    with pytest.raises(ValueError, match=r"must look like https://HOST/OWNER/NAME, got 'example\.org'"):
        prepare(tmp_path, "example.org", "v0.1.0")
    assert (tmp_path / "README.md").read_bytes() == (source / "README.md").read_bytes()


def test_the_changelog_lists_versions_newest_first_and_begins_with_this_one():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\S+) \((\d{4}-\d\d-\d\d|not released)\)$", changelog, re.MULTILINE)
    assert len(headings) == len(re.findall(r"^## ", changelog, re.MULTILINE))
    versions = [tuple(map(int, version.split("."))) for version, _ in headings]
    assert versions == sorted(versions, reverse=True)
    assert headings[0][0] == nanovllm.__version__
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", changelog, re.MULTILINE)) <= kinds
