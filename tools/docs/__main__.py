"""python -m tools.docs: draws every picture again into docs/site/pictures, whose changes can be reviewed."""

from tools.docs.pictures import draw, picture_names
from tools.docs.sources import ROOT

FOLDER = ROOT / "docs/site/pictures"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.svg"):
        path.unlink()
    for name in picture_names():
        (FOLDER / f"{name}.svg").write_text(draw(name).file(), encoding="utf-8")
    print(f"{len(picture_names())} pictures in {FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
