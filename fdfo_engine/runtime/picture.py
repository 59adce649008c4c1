"""PNG files of images and of labelled grids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fdfo_engine.runtime.console import visible

_LABEL_LINES, _LINE_HEIGHT = 2, 15
_LABEL_HEIGHT = _LABEL_LINES * _LINE_HEIGHT + 2
_GAP = 4
_MIN_CELL, _MAX_CELL = 192, 320  # room for a caption
_BACKGROUND = (24, 24, 27)
_INK = (228, 228, 231)
_FRAME = (80, 200, 120)
_EDGE = 3


def to_picture(image: Tensor) -> Image.Image:
    """A float image `[3, H, W]` in 0..1 as an 8-bit RGB picture; values outside are clamped, NaN becomes black."""
    pixels = image.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy().astype(np.uint8))


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images `[..., 3, H, W]` in 0..1 as PIL pictures, one after another: those of a rollout pair by pair."""
    return [to_picture(image) for image in images.flatten(0, -4)]


def save_images(images: Tensor, folder: str | Path, stem: str = "image") -> list[Path]:
    """Writes images `[..., 3, H, W]` in 0..1 to `folder` as `image_0000.png` and so on; returns the files.

    Raises:
        OSError: the storage refuses.
    """
    files = [Path(folder) / f"{stem}_{n:04d}.png" for n in range(len(images.flatten(0, -4)))]
    for file, picture in zip(files, to_pictures(images), strict=True):
        save_png(picture, file)
    return files


def draw_grid(images: Tensor, captions: Sequence[str], columns: int, framed: Collection[int] = ()) -> Image.Image:
    """Images `[N, 3, H, W]` in rows of `columns`, each over its caption, which is cut to two lines.

    Those whose numbers are `framed` have a frame around them.
    """
    pictures = [_fit(to_picture(image)) for image in images]
    width, height = max(_MIN_CELL, pictures[0].width), pictures[0].height
    rows = -(-len(pictures) // columns)
    cell_height = height + _LABEL_HEIGHT + _GAP
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * cell_height + _GAP), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for n, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = _GAP + n % columns * (width + _GAP), _GAP + n // columns * cell_height
        if n in framed:
            pen.rectangle((x - _EDGE, y - _EDGE, x + picture.width + _EDGE - 1, y + height + _EDGE - 1), fill=_FRAME)
        sheet.paste(picture, (x, y))
        pen.text(
            (x, y + height + _EDGE), "\n".join(_lines(visible(caption), width)), fill=_INK, font=_font(), spacing=2
        )
    return sheet


def save_png(picture: Image.Image, path: Path, texts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes `picture` to `path`, with its folders; `texts` by their keywords are kept in the file.

    Under its name once it is whole: a kill leaves no half picture that somebody is shown.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = PngInfo()
    for keyword, text in texts.items():
        chunks.add_text(keyword, text)
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, format="PNG", pnginfo=chunks)
    partial.replace(path)


def save_film(frames: Sequence[Image.Image], path: Path, frame_ms: int) -> None:
    """Writes frames of one size as an endless film: `.gif` (256 colours a frame) or `.png` (APNG, lossless).

    The last frame stays twice as long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    durations = [frame_ms] * (len(frames) - 1) + [2 * frame_ms]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def _fit(picture: Image.Image) -> Image.Image:
    """Large images are scaled down to the cell, tiny ones up by whole factors so that they can be seen."""
    side = max(picture.size)
    if side > _MAX_CELL:
        picture.thumbnail((_MAX_CELL, _MAX_CELL))
    elif side < _MIN_CELL:
        factor = -(-_MIN_CELL // side)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _lines(text: str, width: int) -> list[str]:
    """`text` broken at words into lines of at most `width` pixels, two at most; the rest is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font().getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_cut(line, width) for line in lines[:_LABEL_LINES]]


def _cut(text: str, width: int) -> str:
    font, text = _font(), text[: width // 2]
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
