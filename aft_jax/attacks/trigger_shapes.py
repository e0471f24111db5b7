"""Draws the shapes of local triggers: boolean masks [H, W] of about a wanted number of pixels, anywhere in the image.

A shape may touch the edges of the image, and may be cut by them where its description says so. Every function has the
signature (generator, height, width, pixels) -> bool [H, W], and draws from the generator alone.
"""

import math
from collections.abc import Callable

import numpy as np


def rectangle(generator: np.random.Generator, height: int, width: int, pixels: int) -> np.ndarray:
    """Draws a filled rectangle whose aspect ratio lies between 1:3 and 3:1."""
    rows, columns = _sides(generator, height, width, pixels)
    return _placed(generator, height, width, np.ones((rows, columns), bool))


def bar(generator: np.random.Generator, height: int, width: int, pixels: int) -> np.ndarray:
    """Draws a horizontal or vertical bar, one to three pixels thick, at most as long as the image."""
    thickness = int(generator.integers(1, 4))
    upright = bool(generator.integers(2))
    length = min(max(2, round(pixels / thickness)), height if upright else width)
    block = np.ones((length, thickness) if upright else (thickness, length), bool)
    return _placed(generator, height, width, block)


def frame(generator: np.random.Generator, height: int, width: int, pixels: int) -> np.ndarray:
    """Draws the outline of a rectangle, one or two pixels thick; a large one runs along the edges of the image."""
    thickness = int(generator.integers(1, 3)) if pixels >= 24 else 1
    # The outline of a square of side s and thickness w has 4 w (s - w) pixels.
    side = max(2 * thickness + 1, round(pixels / (4 * thickness)) + thickness)
    ratio = math.exp(generator.uniform(math.log(0.6), -math.log(0.6)))
    rows, columns = min(height, round(side * ratio)), min(width, round(side / ratio))
    block = np.ones((rows, columns), bool)
    block[thickness:-thickness, thickness:-thickness] = False
    return _placed(generator, height, width, block)


def cross(generator: np.random.Generator, height: int, width: int, pixels: int) -> np.ndarray:
    """Draws an upright or a diagonal cross with arms one or two pixels thick."""
    thickness = int(generator.integers(1, 3))
    side = min(height, width, max(3, round((pixels / thickness + thickness) / 2)))
    rows, columns = np.mgrid[:side, :side]
    if generator.integers(2):
        middle = (side - thickness) // 2
        block = ((rows >= middle) & (rows < middle + thickness)) | (
            (columns >= middle) & (columns < middle + thickness)
        )
    else:
        block = (np.abs(rows - columns) < thickness) | (np.abs(rows + columns - side + 1) < thickness)
    return _placed(generator, height, width, block)


def checker(generator: np.random.Generator, height: int, width: int, pixels: int) -> np.ndarray:
    """Draws a rectangle of which every second cell of one to three pixels is set."""
    rows, columns = _sides(generator, height, width, 2 * pixels)
    cell = int(generator.integers(1, min(4, 1 + max(1, min(rows, columns) // 2))))
    i, j = np.mgrid[:rows, :columns]
    return _placed(generator, height, width, (i // cell + j // cell) % 2 == 0)


def disk(generator: np.random.Generator, height: int, width: int, pixels: int) -> np.ndarray:
    """Draws a filled disk. Its centre may lie near an edge, which then cuts it."""
    radius = math.sqrt(pixels / math.pi)
    row, column = generator.uniform(0, height - 1), generator.uniform(0, width - 1)
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - row, columns - column)
    return distance <= max(radius, float(distance.min()))


def strokes(generator: np.random.Generator, height: int, width: int, pixels: int) -> np.ndarray:
    """Draws strokes like handwriting: a pen that turns a little at each step, lifted now and then."""
    side = max(4, min(height, width, round(2.2 * math.sqrt(pixels))))
    block = np.zeros((side, side), bool)

    def pen_down() -> tuple[float, float, float]:
        row, column = generator.uniform(0, side - 1, 2)
        return row, column, generator.uniform(0, 2 * math.pi)

    row, column, angle = pen_down()
    # A pen that returns to pixels that are set already needs more steps than pixels.
    for _ in range(20 * pixels):
        block[round(row), round(column)] = True
        if block.sum() >= pixels:
            break
        angle += generator.normal(0, 0.5)
        row, column = row + math.sin(angle), column + math.cos(angle)
        inside = 0 <= row <= side - 1 and 0 <= column <= side - 1
        if not inside or generator.random() < 0.04:
            row, column, angle = pen_down()
    rows, columns = np.flatnonzero(block.any(axis=1)), np.flatnonzero(block.any(axis=0))
    return _placed(generator, height, width, block[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


SHAPES: dict[str, Callable[[np.random.Generator, int, int, int], np.ndarray]] = {
    'rectangle': rectangle,
    'bar': bar,
    'frame': frame,
    'cross': cross,
    'checker': checker,
    'disk': disk,
    'strokes': strokes,
}


def _sides(generator: np.random.Generator, height: int, width: int, pixels: int) -> tuple[int, int]:
    """Draws the rows and columns of a rectangle of about `pixels` pixels that fits the image."""
    ratio = math.exp(generator.uniform(-math.log(3), math.log(3)))
    rows = min(height, max(1, round(math.sqrt(pixels * ratio))))
    return rows, min(width, max(1, round(pixels / rows)))


def _placed(generator: np.random.Generator, height: int, width: int, block: np.ndarray) -> np.ndarray:
    """Puts a block anywhere into an empty mask; one place in four touches an edge of the image."""
    room = height - block.shape[0], width - block.shape[1]
    place = [int(generator.integers(0, free + 1)) for free in room]
    if generator.random() < 0.25:
        axis = int(generator.integers(2))
        place[axis] = int(generator.integers(2)) * room[axis]
    mask = np.zeros((height, width), bool)
    mask[place[0] : place[0] + block.shape[0], place[1] : place[1] + block.shape[1]] = block
    return mask
