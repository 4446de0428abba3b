"""Pictures of what was kept, as in the paper's Figure 4: the rest is dimmed, the kept window framed, scores beneath.

Tokens that a reducer merged have the mean colour of all that became one; its bar is the share of a frame's tokens that is left.

Where it is known where the action is, it has a frame of its own.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stts_lightning.analysis.kept import Box, Kept

Pictures = NDArray[np.uint8]
"""`(T, H, W, 3)` RGB."""

Colour = tuple[int, int, int]
KEPT, DROPPED, PAPER, INK, DARK = (245, 176, 0), (190, 197, 204), (255, 255, 255), (20, 22, 26), (24, 26, 30)
TRUTH = (0, 170, 255)
COLUMNS = 8


def dimmed(picture: Pictures, mask: NDArray[np.bool_]) -> Pictures:
    """A picture `(H, W, 3)` with what the mask `(h, w)` leaves out turned dark and grey."""
    height, width = picture.shape[:2]
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    grey = picture.mean(-1, keepdims=True) * 0.42 + 14
    return np.where(mask[rows][:, columns, None], picture, grey).astype(np.uint8)


def merged(pictures: Pictures, groups: NDArray[np.int64] | None) -> Pictures:
    """Pictures in which tokens that were merged have the mean colour of all that became one; others are as they are.

    Args:
        pictures: of a clip, `(T, H, W, 3)`.
        groups: see `Kept`, `(T', h, w)`; None leaves all as they are.
    """
    if groups is None:
        return pictures
    length, height, width = pictures.shape[:3]
    at = (np.arange(side) * tokens // side for side, tokens in zip((length, height, width), groups.shape, strict=True))
    group = groups[np.ix_(*at)].ravel()
    members = np.bincount(groups[groups >= 0], minlength=1)
    several = (group >= 0) & (members[group] > 1)
    flat = pictures.reshape(-1, 3).copy()
    number = group[several]
    pixels = np.bincount(number, minlength=len(members)).clip(1)
    means = np.stack([np.bincount(number, flat[several, channel], len(members)) / pixels for channel in range(3)], -1)
    flat[several] = means[number].round()
    return flat.reshape(pictures.shape)


def _text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, fill: Colour) -> None:
    draw.text(at, text, fill=fill, font=ImageFont.load_default(size))


def contact_sheet(
    frames: Pictures, kept: Kept, title: str = "", width: int = 150, truth: Sequence[Box | None] | None = None
) -> Pictures:
    """All token frames of a clip side by side, and for each slot a bar a frame.

    Args:
        frames: pictures of the clip's frames, `(T, H, W, 3)`; a token frame shows the first of those it is made of.
        kept: what was kept of the clip.
        title: written above.
        width: of a picture on the sheet.
        truth: where the action is in each token frame; None where it is not.

    Returns:
        The sheet, `(H', W', 3)`; two clips of the same shape and slots give sheets of the same size.
    """
    step = len(frames) // kept.frames
    frames = merged(frames, kept.groups)
    across = min(kept.frames, COLUMNS)
    height, margin, head, bar, gap = round(width * frames.shape[1] / frames.shape[2]), 56, 30, 26, 8
    row_height = height + bar * len(kept.slots) + gap
    size = (margin + across * (width + gap), head + -(-kept.frames // across) * row_height)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (margin, 6), title, 16, INK)
    for number in range(kept.frames):
        row, column = divmod(number, across)
        x, y = margin + column * (width + gap), head + row * row_height
        picture = np.asarray(Image.fromarray(frames[number * step]).resize((width, height), Image.Resampling.LANCZOS))
        sheet.paste(Image.fromarray(dimmed(picture, kept.mask[number])), (x, y))
        action = truth[number] if truth else None
        for box, colour in ((kept.boxes.get(number), KEPT), (action, TRUTH)):
            if box is not None:
                top, left, bottom, right = box
                corners = (x + left * width, y + top * height, x + right * width - 1, y + bottom * height - 1)
                draw.rectangle(corners, outline=colour, width=4 if colour == KEPT else 2)
        for place, slot in enumerate(kept.slots):
            at = y + height + bar * place
            if column == 0:
                _text(draw, (8, at + 5), slot.slot.upper(), 15, INK)
            if number in slot.frames:
                score, chosen = (values[slot.frames.index(number)] for values in (slot.scores, slot.kept))
                draw.rectangle((x, at + 6, x + max(score, 0.005) * (width - 1), at + bar - 3), fill=KEPT if chosen else DROPPED)
                _text(draw, (x + 4, at + 7), f"{score:.2f}", 13, INK)
    return np.asarray(sheet)


def film(frames: Pictures, kept: Kept, lines: Sequence[str], least: int = 320) -> Iterator[Pictures]:
    """Frames of an overlay video: each frame of the clip with what was dropped dimmed; text and scores beneath.

    Args:
        frames: pictures of the clip, `(T, H, W, 3)`.
        kept: what was kept of it.
        lines: written above the scores, a line each.
        least: width of the video at least; pictures are enlarged by a whole factor.

    Yields:
        Pictures of even height and width, all of one size.
    """
    step = len(frames) // kept.frames
    frames = merged(frames, kept.groups)
    zoom = max(-(-least // frames.shape[2]), 1)
    height, width = frames.shape[1] * zoom // 2 * 2, frames.shape[2] * zoom // 2 * 2
    font = ImageFont.load_default(15)
    beneath = (20 * len(lines) + 34 * len(kept.slots) + 12) // 2 * 2
    cell = width / kept.frames
    for number, frame in enumerate(frames):
        token = min(number // step, kept.frames - 1)
        sheet = Image.new("RGB", (width, height + beneath), DARK)
        big = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(Image.fromarray(dimmed(np.asarray(big), kept.mask[token])))
        draw = ImageDraw.Draw(sheet)
        if token in kept.boxes:
            top, left, bottom, right = kept.boxes[token]
            draw.rectangle((left * width, top * height, right * width - 1, bottom * height - 1), outline=KEPT, width=4)
        for line, text in enumerate(lines):
            draw.text((6, height + 4 + 20 * line), text, fill=(235, 235, 235), font=font)
        for place, slot in enumerate(kept.slots):
            base = height + 20 * len(lines) + 34 * (place + 1)
            for at, score, chosen in zip(slot.frames, slot.scores, slot.kept, strict=True):
                bar = (at * cell + 2, base - 2 - 26 * score, (at + 1) * cell - 3, base)
                draw.rectangle(bar, fill=KEPT if chosen else (96, 102, 110))
            draw.text((6, base - 26), slot.slot.upper(), fill=(235, 235, 235), font=font, stroke_width=2, stroke_fill=DARK)
        cursor = (token * cell, height + 20 * len(lines) + 4, (token + 1) * cell - 1, height + beneath - 4)
        draw.rectangle(cursor, outline=(255, 255, 255), width=1)
        yield np.asarray(sheet)
