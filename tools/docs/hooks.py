"""Hooks of MkDocs: the pages of the site that are made from the project's files. mkdocs.yml names this file."""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # MkDocs runs this file by its path

import reference  # noqa: E402
from tools.docs.page import page_path, reference_page, title  # noqa: E402
from tools.docs.pictures import figure  # noqa: E402
from tools.docs.sources import DOCUMENTS, Sources, document_page, heading, source_markdown, source_page  # noqa: E402
from tools.docs.svg import STYLE, inlined  # noqa: E402


def on_config(config: MkDocsConfig) -> None:
    config.nav = [
        {"Start here": "index.md"},
        {"The ideas, in order": [{f"{n}. {title(name)}": page_path(name)} for n, name in _numbered()]},
        {"The engine": [{heading(path): document_page(path)} for path in DOCUMENTS]},
    ]


def on_files(files: Files, config: MkDocsConfig) -> None:
    sources = Sources()
    made = {page_path(name): reference_page(name, sources) for name in reference.reading_order()}
    made |= {document_page(path): _document(path, sources) for path in DOCUMENTS}
    made |= {"index.md": _with_pictures_and_links("index.md", sources, config)}
    made |= {source_page(path): source_markdown(path) for path in sorted(sources.linked)}
    made["stylesheets/pictures.css"] = STYLE
    index = files.get_file_from_path("index.md")
    assert index is not None
    files.remove(index)
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))


def _numbered() -> list[tuple[int, str]]:
    return list(enumerate(reference.reading_order(), start=1))


def _with_pictures_and_links(page: str, sources: Sources, config: MkDocsConfig) -> str:
    """A page of docs/site: `{picture NAME}` becomes the picture, `{reading order}` the list of the pages."""
    text = (Path(config.docs_dir) / page).read_text(encoding="utf-8")
    about = dict(reference.READING_ORDER)
    listed = [f"{n}. [{title(name)}]({page_path(name)}): {about.get(name, '')}" for n, name in _numbered()]
    text = text.replace("{reading order}", "\n".join(listed))
    text = re.sub(r"\{picture (\w+)\}", lambda match: figure(match[1]), text)
    return _with_source_links(text, page, "", sources)


def _document(path: str, sources: Sources) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    folder = (ROOT / path).parent
    text = re.sub(r"!\[.*?\]\((\S+\.svg)\)", lambda match: inlined((folder / match[1]).read_text("utf-8")), text)
    text = _with_source_links(text, document_page(path), posixpath.dirname(path), sources)
    return f"---\nhide:\n  - toc\n---\n\n{text}"


def _with_source_links(text: str, page: str, folder: str, sources: Sources) -> str:
    """Relative links to files of the checkout, as links to their pages on the site."""

    def replace(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        return f"]({sources.link(page, path)})" if (ROOT / path).exists() else match[0]

    return re.sub(r"\]\(((?!https?:)[^)#]+)\)", replace, text)
