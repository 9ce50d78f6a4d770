"""How far the rewards for text in pictures err: words drawn with PIL, read back by the terms' own reader.

./run --extra rewards python scripts/measure_reading.py                   # 200 pictures of 256 and of 512 px
./run --extra rewards python scripts/measure_reading.py --pictures 20     # does it run?

Each picture has one to three strings of one to three words in fonts, sizes, colours and places of their own
that do not overlap, on a flat ground, a slope or noise. A right picture should get 1 from both terms; what it
gets instead is their error. The same picture judged for other words shows what a wrong picture gets. Boxes
are those of the ink. Fonts are PIL's own and the TrueType files below --fonts, if there are any.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emuworld.training.reading import Box, Reader, Wanted, accuracy, layout

WORDS = """
open closed exit push pull sale fresh bread coffee market station museum library garden winter summer happy
new year welcome home danger high voltage keep left stop ahead school bakery hotel river bridge north south
east west thank you best wishes number seven platform 9 24 hours no entry $5.99 don't wait!
"""
MARGIN_PX = 4
CONTRAST = 90  # of 255 levels, ground against ink, in brightness

Picture = tuple[np.ndarray, Wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200, help="of each size")
    parser.add_argument("--fonts", default="/usr/share/fonts/truetype/dejavu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fonts = [str(file) for file in sorted(Path(options.fonts).glob("*.ttf")) if "Math" not in file.name]
    print(f"{len(fonts)} fonts and PIL's own")
    reader = Reader()
    reader(np.zeros((256, 256, 3), np.uint8))  # opens the networks
    for side in (256, 512):
        rng = np.random.default_rng((options.seed, side))
        pictures = [draw(rng, side, fonts) for _ in range(options.pictures)]
        report(side, pictures, reader)


def report(side: int, pictures: list[Picture], reader: Reader) -> None:
    start, worked = time.perf_counter(), time.process_time()
    read = [reader(pixels) for pixels, _ in pictures]
    ms, cpu_ms = (
        seconds / len(pictures) * 1e3
        for seconds in (time.perf_counter() - start, time.process_time() - worked)
    )
    right = [accuracy(want.strings, lines) for (_, want), lines in zip(pictures, read, strict=True)]
    placed = [layout(want, lines) for (_, want), lines in zip(pictures, read, strict=True)]
    others = [*read[1:], read[0]]  # what the next picture says
    wrong = [accuracy(want.strings, lines) for (_, want), lines in zip(pictures, others, strict=True)]
    mirrored = [
        layout(Wanted(strings=want.strings, boxes=tuple(across(box) for box in want.boxes)), lines)
        for (_, want), lines in zip(pictures, read, strict=True)
    ]
    heights = [box[3] - box[1] for _, want in pictures for box in want.boxes]
    exact = statistics.mean(figure == 1.0 for figure in right)
    print(
        f"{side} px, {len(pictures)} pictures, ink {min(heights) * side:.0f} to {max(heights) * side:.0f} px"
    )
    print(f"  ocr, right words   {told(right)}, exactly 1 in {exact:.0%}")
    print(f"  ocr, other words   {told(wrong)}")
    print(f"  layout, right      {told(placed)}")
    print(f"  layout, turned     {told(mirrored)} (right words, boxes turned by half a turn)")
    print(f"  {ms:.0f} ms a picture, {cpu_ms:.0f} ms of CPU time", flush=True)


def told(figures: list[float]) -> str:
    lowest, highest = np.quantile(figures, (0.05, 0.95))
    return f"mean {statistics.mean(figures):.3f}, 5 to 95 % {lowest:.2f} to {highest:.2f}"


def across(box: Box) -> Box:
    left, top, right, bottom = box
    return 1 - right, 1 - bottom, 1 - left, 1 - top


def draw(rng: np.random.Generator, side: int, fonts: list[str]) -> Picture:
    """A picture uint8 [side, side, 3] with one to three strings, and where their ink is."""
    ground = background(rng, side)
    image = Image.fromarray(ground)
    pen = ImageDraw.Draw(image)
    strings: list[str] = []
    places: list[tuple[int, int, int, int]] = []
    while len(strings) < 1 or (len(strings) < 3 and rng.random() < 0.4):
        text = words(rng)
        size = int(rng.integers(side // 18, side // 5))
        number = int(rng.integers(len(fonts) + 1))
        while True:  # smaller, until it fits
            font = (
                ImageFont.load_default(size)
                if number == len(fonts)
                else ImageFont.truetype(fonts[number], size)
            )
            left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
            if right - left < side - 2 * MARGIN_PX:
                break
            size -= 1
        place = free(rng, side, right - left, bottom - top, places)
        if place is None:
            break
        pen.text((place[0] - left, place[1] - top), text, font=font, fill=ink(rng, ground))
        strings.append(text)
        places.append(place)
    boxes = tuple((x / side, y / side, u / side, v / side) for x, y, u, v in places)
    return np.asarray(image), Wanted(strings=tuple(strings), boxes=boxes)


def words(rng: np.random.Generator) -> str:
    text = " ".join(rng.choice(WORDS.split(), size=int(rng.integers(1, 4)), replace=False))
    return str((text, text.upper(), text.title())[int(rng.integers(3))])


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: a flat colour, a slope between two, or a colour with noise."""
    one, other = rng.integers(0, 256, (2, 3)).astype(float)
    kind = int(rng.integers(3))
    if kind == 1:
        other = one + (other - one) * 0.3
        slope = np.linspace(0.0, 1.0, side)[:, None, None]
        pixels = np.broadcast_to(one + (other - one) * slope, (side, side, 3))
    else:
        pixels = one + rng.normal(0.0, 12.0 if kind == 2 else 0.0, (side, side, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def ink(rng: np.random.Generator, ground: np.ndarray) -> tuple[int, int, int]:
    """A colour that is brighter or darker than the ground."""
    light = np.array([0.299, 0.587, 0.114])
    while True:
        red, green, blue = (int(level) for level in rng.integers(0, 256, 3))
        if abs(light @ (red, green, blue) - light @ ground.mean(axis=(0, 1))) > CONTRAST:
            return red, green, blue


def free(
    rng: np.random.Generator, side: int, width: int, height: int, taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """A place [left, top, right, bottom] in pixels that keeps clear of others, if one of 50 draws does."""
    for _ in range(50):
        x = int(rng.integers(MARGIN_PX, side - width - MARGIN_PX + 1))
        y = int(rng.integers(MARGIN_PX, max(side - height - MARGIN_PX, MARGIN_PX) + 1))
        gap = height // 2
        if all(
            x >= c + gap or x + width + gap <= a or y >= d + gap or y + height + gap <= b
            for a, b, c, d in taken
        ):
            return x, y, x + width, y + height
    return None


if __name__ == "__main__":
    main()
