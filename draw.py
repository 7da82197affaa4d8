"""Pictures of people: boxes and skeletons on images, many images on one sheet.

Owns pixels that are for looking at. Knows nothing about networks, files of labels or training; it
imports numpy and Pillow.
"""
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

LEFT, RIGHT, MIDDLE = (255, 140, 0), (0, 190, 255), (120, 230, 80)  # sides of the person
BOX, IGNORED = (255, 255, 255), (170, 170, 170)


def side_color(name: str) -> tuple[int, int, int]:
    """Orange for left_*, blue for right_*, green for the rest."""
    return LEFT if name.startswith("left") else RIGHT if name.startswith("right") else MIDDLE


def draw_people(image: Image.Image, boxes: np.ndarray, keypoints: np.ndarray, names: list[str],
                edges: list[list[int]], scores: Sequence[float] | None = None,
                min_score: float = 0.3) -> Image.Image:
    """A copy of the image with one skeleton and box a person.

    boxes (M, 4) and keypoints (M, K, 3) in px of the image; the third number is a visibility
    (labels: 0 is not drawn, 1 is hollow) or a score in [0, 1] (predictions, when scores (M,) of
    the people are given: under min_score a keypoint is not drawn).
    """
    image = image.convert("RGB")
    pen = ImageDraw.Draw(image)
    width = max(round(max(image.size) / 320), 1)
    for i, (box, person) in enumerate(zip(boxes, keypoints)):
        seen = person[:, 2] > (0 if scores is None else min_score)
        pen.rectangle([float(v) for v in box], outline=BOX if seen.any() else IGNORED, width=width)
        for a, b in edges:
            if seen[a] and seen[b]:
                color = side_color(names[b] if side_color(names[a]) == MIDDLE else names[a])
                pen.line([*person[a, :2], *person[b, :2]], fill=color, width=width)
        for (x, y, v), name in zip(person[seen], np.array(names)[seen]):
            r = 1.5 * width
            hidden = scores is None and v == 1
            pen.ellipse([x - r, y - r, x + r, y + r], outline=side_color(name),
                        fill=None if hidden else side_color(name))
        if scores is not None:
            pen.text((float(box[0]) + 2 * width, float(box[1]) + width), f"{scores[i]:.2f}",
                     fill=BOX, stroke_width=1, stroke_fill=(0, 0, 0),
                     font_size=max(10, max(image.size) // 50))
    return image


def contact_sheet(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size side by side, in rows of `columns` (default: about a square)."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
