"""Pictures of the ideas in reference/, drawn from what its functions return: one file a picture, named as the page.

Each file's draw() returns a Drawing, and its docstring is the caption. `python -m tools.docs` writes all of them into
docs/site/pictures; a test compares these files with what the code draws.
"""

import html
import importlib
from pathlib import Path

from tools.docs.svg import Drawing

FOLDER = Path(__file__).parent


def picture_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def has_picture(name: str) -> bool:
    return (FOLDER / f"{name}.py").exists()


def draw(name: str) -> Drawing:
    return importlib.import_module(f"tools.docs.pictures.{name}").draw()


def caption(name: str) -> str:
    return " ".join((importlib.import_module(f"tools.docs.pictures.{name}").__doc__ or "").split())


def figure(name: str) -> str:
    """The picture and its caption as HTML."""
    return (
        f'<figure class="drawn">\n{draw(name).inline()}<figcaption>{html.escape(caption(name))}</figcaption>\n</figure>'
    )
