"""Prepares a checkout for a release: `python -m tools.prepare_release --url https://HOST/OWNER/nanovllm --tag v0.1.0`.

Checks that the tag is "v" and nanovllm's version, and that CHANGELOG.md has a dated section for it. Then writes
[project.urls] into pyproject.toml of this checkout, and makes the links of README.md absolute: a package index shows it
as the project's description, where relative links lead nowhere. Nothing is committed.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def check_release(tag: str, version: str, changelog: str) -> None:
    """Raise ValueError unless `tag` belongs to `version` and the changelog says when it was released."""
    if tag != f"v{version}":
        raise ValueError(
            f"--tag must be v{version}, since nanovllm/__init__.py says so, got {tag!r}; change one of the two"
        )
    heading = re.search(rf"^## {re.escape(version)} *(.*)$", changelog, re.MULTILINE)
    if heading is None or not re.fullmatch(r"\(\d{4}-\d\d-\d\d\)", heading[1]):
        found = "no such section" if heading is None else repr(heading[0])
        raise ValueError(f"CHANGELOG.md must have a section '## {version} (YYYY-MM-DD)', got {found}; date it")


def absolute_links(markdown: str, files_url: str) -> str:
    """`markdown` with `files_url` before every relative link outside of code."""
    code_or_text = re.split(r"(^```.*?^```$|`[^`\n]*`)", markdown, flags=re.MULTILINE | re.DOTALL)
    link = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s]+)(?=\))")
    code_or_text[::2] = [link.sub(rf"{files_url}/\1", text) for text in code_or_text[::2]]
    return "".join(code_or_text)


def with_urls(pyproject: str, url: str, files_url: str) -> str:
    """The text of pyproject.toml with a table [project.urls]. Raises ValueError if it has one."""
    before, header, after = pyproject.partition("[project.optional-dependencies]")
    if "[project.urls]" in pyproject or not header:
        raise ValueError("pyproject.toml must have [project.optional-dependencies] and no [project.urls] yet")
    urls = {"Repository": url, "Issues": f"{url}/issues", "Changelog": f"{files_url}/CHANGELOG.md"}
    table = "".join(f'{name} = "{address}"\n' for name, address in urls.items())
    return f"{before}[project.urls]\n{table}\n{header}{after}"


def prepare(root: Path, url: str, tag: str, files_url: str | None = None) -> None:
    """Check the release and change the two files of the checkout `root`. Raises ValueError before anything is written.

    files_url: the address that a path in the checkout is appended to; URL/blob/TAG unless given.
    """
    files_url = files_url or f"{url}/blob/{tag}"
    for address in (url, files_url):
        if not re.fullmatch(r"https://[\w.-]+(/[\w.~-]+)+", address):
            raise ValueError(f"--url and --files-url must look like https://HOST/OWNER/NAME, got {address!r}")
    readme, pyproject = root / "README.md", root / "pyproject.toml"
    version = re.search(r'^__version__ = "(.*)"$', (root / "nanovllm/__init__.py").read_text(), re.MULTILINE)
    assert version
    check_release(tag, version[1], (root / "CHANGELOG.md").read_text(encoding="utf-8"))
    changed = {
        pyproject: with_urls(pyproject.read_text(encoding="utf-8"), url, files_url),
        readme: absolute_links(readme.read_text(encoding="utf-8"), files_url),
    }
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", required=True, help="of the repository")
    parser.add_argument("--tag", required=True, help="of the release, such as v0.1.0")
    parser.add_argument(
        "--files-url", help="where a file is read by its path (default: URL/blob/TAG; GitLab: URL/-/blob/TAG)"
    )
    arguments = parser.parse_args()
    try:
        prepare(ROOT, arguments.url, arguments.tag, arguments.files_url)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("README.md and pyproject.toml are ready to be built")
    return 0


if __name__ == "__main__":
    sys.exit(main())
