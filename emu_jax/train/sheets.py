"""Contact sheets: images that show prompts, what a model generated, and the references.

DIR/samples/EVALUATION/STEP.png
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from emu_jax.storage import writing

SheetPart = str | Image.Image  # texts and images in reading order
_Box = tuple[int, int, SheetPart]  # width, height, and a word or a scaled image

_FOLDER = "samples"  # in a run directory
HEADINGS = ("prompt", "generated", "reference")
MAX_ROWS = 12  # of a sheet
NOTHING = "(nothing)"  # shown where a model generated neither text nor an image
SIDE = 96  # of an image's longer side, in pixels
TEXT_SIZE, TITLE_SIZE = 17, 22  # of the fonts, in pixels
GAP = 7  # between two words or images
MARGIN = 18  # around a cell
CELL_WIDTHS = (130, 400)  # the narrowest and the widest column, without its margins
MAX_CHARACTERS = 300  # of a text
PAPER, INK, SOFT, RULE = "#ffffff", "#1d2126", "#666d76", "#d5d7d3"


@dataclasses.dataclass(frozen=True)
class SheetRow:
    """One document of a contact sheet: each column is a sequence of texts and images."""

    prompt: Sequence[SheetPart]
    generated: Sequence[SheetPart]
    reference: Sequence[SheetPart]


def contact_sheet(title: str, rows: Sequence[SheetRow]) -> Image.Image:
    """Draws one line for each row, with its prompt, what was generated, and the reference.

    Small images are enlarged by a whole factor, so that their pixels stay sharp.
    """
    cells = [
        [_boxes(row.prompt), _boxes(row.generated or [NOTHING]), _boxes(row.reference)]
        for row in rows
    ]
    widths = [_column_width(heading, cells, n) for n, heading in enumerate(HEADINGS)]
    lines = [[_wrap(cell, width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    heights = [max(_height(cell) for cell in row) for row in lines]
    top = 2 * MARGIN + TITLE_SIZE + TEXT_SIZE + GAP
    size = (
        max(sum(widths) + 2 * MARGIN * len(widths), 2 * MARGIN + _text_width(title, TITLE_SIZE)),
        top + MARGIN + sum(height + 2 * MARGIN for height in heights),
    )
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, font=_font(TITLE_SIZE))
    left = [MARGIN + sum(widths[:n]) + 2 * MARGIN * n for n in range(len(widths))]
    for x, heading in zip(left, HEADINGS, strict=True):
        pen.text((x, top - TEXT_SIZE - GAP), heading, SOFT, font=_font(TEXT_SIZE))
    y = top
    for row, height in zip(lines, heights, strict=True):
        pen.line((MARGIN, y, size[0] - MARGIN, y), RULE)
        for x, cell in zip(left, row, strict=True):
            _draw(sheet, pen, (x, y + MARGIN + (height - _height(cell)) // 2), cell)
        y += height + 2 * MARGIN
    return sheet


def save_sheet(workdir: Path, evaluation: str, step: int, sheet: Image.Image) -> None:
    """Writes a contact sheet atomically, in place of an earlier one of the same step."""
    path = workdir / _FOLDER / evaluation / f"{step}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        sheet.save(temporary, format="png")


def list_sheets(workdir: Path) -> dict[str, list[tuple[int, Path]]]:
    """Returns the contact sheets of each evaluation of a run as (step, file), in order."""
    sheets: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted((workdir / _FOLDER).glob("*/*.png")):
        if path.stem.isdigit():
            sheets.setdefault(path.parent.name, []).append((int(path.stem), path))
    return {evaluation: sorted(files) for evaluation, files in sheets.items()}


def remove_later_sheets(workdir: Path, step: int) -> None:
    """Removes the contact sheets of later steps, which a resumed run draws again."""
    for files in list_sheets(workdir).values():
        for number, path in files:
            if number > step:
                path.unlink()


def _boxes(parts: Sequence[SheetPart]) -> list[_Box]:
    """Splits texts into words and scales images."""
    boxes: list[_Box] = []
    for part in parts:
        if isinstance(part, Image.Image):
            image = _scaled(part)
            boxes.append((*image.size, image))
            continue
        cut = part if len(part) <= MAX_CHARACTERS else part[:MAX_CHARACTERS] + " …"
        words = [piece for word in cut.split() for piece in _pieces(word)]
        boxes += [(_text_width(word, TEXT_SIZE), TEXT_SIZE, word) for word in words]
    return boxes


def _pieces(word: str) -> list[str]:
    """Cuts a word that is wider than a column."""
    pieces = [""]
    for letter in word:
        if _text_width(pieces[-1] + letter, TEXT_SIZE) > CELL_WIDTHS[1]:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _scaled(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    longer = max(image.size)
    if longer <= SIDE:
        width, height = (side * (SIDE // longer) for side in image.size)
        return image.resize((width, height), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * SIDE / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _column_width(heading: str, cells: Sequence[Sequence[list[_Box]]], column: int) -> int:
    """Returns the width at which the longest cell of a column fits one line, within limits."""
    unbroken = [sum(width + GAP for width, _, _ in row[column]) for row in cells]
    narrowest, widest = CELL_WIDTHS
    wanted = max([narrowest, _text_width(heading, TEXT_SIZE), *unbroken])
    return min(wanted, widest)


def _wrap(boxes: Sequence[_Box], width: int) -> list[list[_Box]]:
    """Breaks words and images into lines."""
    lines: list[list[_Box]] = [[]]
    used = 0
    for box in boxes:
        if lines[-1] and used + box[0] > width:
            lines.append([])
            used = 0
        lines[-1].append(box)
        used += box[0] + GAP
    return lines


def _height(lines: Sequence[Sequence[_Box]]) -> int:
    return sum(_line_height(line) + GAP for line in lines) - GAP


def _line_height(line: Sequence[_Box]) -> int:
    return max((height for _, height, _ in line), default=TEXT_SIZE)


def _draw(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[list[_Box]]
) -> None:
    """Draws lines of words and images, each centered vertically in its line."""
    x, y = at
    for line in lines:
        tall = _line_height(line)
        for width, height, content in line:
            corner = (x, y + (tall - height) // 2)
            if isinstance(content, str):
                color = SOFT if content == NOTHING else INK
                pen.text(corner, content, color, font=_font(TEXT_SIZE))
            else:
                sheet.paste(content, corner)
            x += width + GAP
        x, y = at[0], y + tall + GAP


def _text_width(text: str, size: int) -> int:
    return round(_font(size).getlength(text))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Matplotlib ships this font, which has Latin, Greek and Cyrillic letters.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)
