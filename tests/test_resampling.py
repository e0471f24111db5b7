"""Bilinear sampling against SciPy and a loop over pixels."""

import numpy as np
import scipy.ndimage

from aft_jax.ops.resampling import sample_bilinear

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.random((3, 5, 7, 2)).astype(np.float32)


def one_sample(image, row, column):
    """torch.grid_sample's zero padding: each of the four neighbours outside the frame adds nothing."""
    height, width, channels = image.shape
    total = np.zeros(channels)
    top, left = int(np.floor(row)), int(np.floor(column))
    for r in (top, top + 1):
        for c in (left, left + 1):
            if 0 <= r < height and 0 <= c < width:
                total += (1 - abs(row - r)) * (1 - abs(column - c)) * image[r, c]
    return total


def test_sample_bilinear_equals_a_loop_over_pixels_and_scipy():
    rows = GENERATOR.uniform(-2, 6, (3, 4, 6)).astype(np.float32)
    columns = GENERATOR.uniform(-2, 8, (3, 4, 6)).astype(np.float32)
    # Positions between the border and a pixel beyond it are where conventions differ: make sure that some are there.
    assert ((rows > -1) & (rows < 0)).any() and ((columns > 6) & (columns < 7)).any()
    actual = np.asarray(sample_bilinear(IMAGES, rows, columns))
    assert actual.shape == (3, 4, 6, 2) and actual.dtype == np.float32
    for b, i, j in np.ndindex(3, 4, 6):
        np.testing.assert_allclose(actual[b, i, j], one_sample(IMAGES[b], rows[b, i, j], columns[b, i, j]), atol=1e-5)
    for b, c in np.ndindex(3, 2):
        # 'grid-constant' mixes border pixels with the constant beyond them; 'constant' would cut off at the border.
        expected = scipy.ndimage.map_coordinates(
            IMAGES[b, ..., c].astype(np.float64), [rows[b], columns[b]], order=1, mode='grid-constant', cval=0
        )
        np.testing.assert_allclose(actual[b, ..., c], expected, atol=1e-5)


def test_sample_bilinear_at_whole_positions_gives_the_pixels():
    rows, columns = np.meshgrid(np.arange(5.0), np.arange(7.0), indexing='ij')
    rows, columns = (np.broadcast_to(a, (3, 5, 7)).astype(np.float32) for a in (rows, columns))
    np.testing.assert_array_equal(sample_bilinear(IMAGES, rows, columns), IMAGES)


def test_sample_bilinear_far_outside_is_black():
    rows = np.array([[[-1.0, 5.0, 2.0, 2.0, -100.0]]] * 3, np.float32)
    columns = np.array([[[3.0, 3.0, -1.0, 7.0, 1e6]]] * 3, np.float32)
    np.testing.assert_array_equal(sample_bilinear(IMAGES, rows, columns), np.zeros((3, 1, 5, 2)))
