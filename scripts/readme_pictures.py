"""The README's pictures, cut from the demo's page: docs/images/walk.jpg and robot.jpg.

./run emuworld demo && ./run python scripts/readme_pictures.py outputs/demo
"""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from emuworld.files import write_bytes

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIDE, GAP, LINE = 190, 4, 20  # pixels of a picture, between pictures, of a line of words
_FIGURE = re.compile(r'<img src="data:image/\w+;base64,([^"]+)" alt="([^"]*)"')


def main(demo: Path) -> None:
    page = (demo / "index.html").read_text(encoding="utf-8")
    figures = [(words, _picture(data)) for data, words in _FIGURE.findall(page)]
    walk = [[one for one in figures if one[0].startswith(f"{row}, ")][:7] for row in ("MuJoCo", "dream")]
    plan = page[page.index("<h2>A robot") :]
    robot = [
        (words.removeprefix("executed, "), _picture(data))
        for data, words in _FIGURE.findall(plan)
        if not words.startswith("imagined, ")
    ]
    sheets = {"walk": walk}
    if "in the end: Success" in plan:  # the README shows a plan that worked
        sheets["robot"] = [robot]
    IMAGES.mkdir(exist_ok=True)
    for name, rows in sheets.items():
        if not all(rows):
            raise SystemExit(
                f"{demo / 'index.html'} shows no {name}; make the page again: ./run emuworld demo"
            )
        buffer = io.BytesIO()
        sheet(rows).save(buffer, format="JPEG", quality=88)
        write_bytes(IMAGES / f"{name}.jpg", buffer.getvalue())
        print(IMAGES / f"{name}.jpg", f"{len(buffer.getvalue()) / 1e3:.0f} kB")


def _picture(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> Image.Image:
    """Rows of pictures, each with its words above it."""
    width = max(len(row) for row in rows) * (SIDE + GAP) - GAP
    sheet = Image.new("RGB", (width, len(rows) * (LINE + SIDE + GAP) - GAP), "white")
    pen, fonts = ImageDraw.Draw(sheet), [ImageFont.load_default(size) for size in range(13, 8, -1)]
    for k, row in enumerate(rows):
        top = k * (LINE + SIDE + GAP)
        for column, (words, picture) in enumerate(row):
            left = column * (SIDE + GAP)
            font = next(
                (one for one in fonts if one.getlength(words) <= SIDE), fonts[-1]
            )  # long words smaller
            pen.text((left, top + 2), words, fill="black", font=font)
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top + LINE))
    return sheet


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo"))
