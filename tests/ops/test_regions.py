import numpy as np
import pytest

from kornia_tinyvit.ops.regions import remove_small_regions


def flood(mask):
    """Return the regions of a mask, each the set of its pixels, found one pixel after the other."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        front = [min(left)]
        region = set(front)
        left -= region
        while front:
            y, x = front.pop()
            touching = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= touching
            region |= touching
            front += touching
        regions.append(region)
    return regions


def image(regions, shape):
    mask = np.zeros(shape, dtype=bool)
    for region in regions:
        mask[tuple(np.array(sorted(region)).T)] = True
    return mask


@pytest.mark.parametrize("shape", [(12, 17), (1, 30), (30, 1), (40, 40)])
@pytest.mark.parametrize("density", [0.15, 0.4, 0.6, 0.85])
def test_flooding_agrees(shape, density):
    mask = np.random.default_rng(0).random(shape) < density
    min_area = 4
    holes = [region for region in flood(~mask) if len(region) < min_area]
    filled, changed = remove_small_regions(mask, min_area, "holes")
    assert changed == bool(holes)
    np.testing.assert_array_equal(filled, mask | image(holes, shape))
    islands = flood(mask)
    large = [region for region in islands if len(region) >= min_area] or [max(islands, key=len)]
    cleaned, changed = remove_small_regions(mask, min_area, "islands")
    assert changed == any(len(region) < min_area for region in islands)
    np.testing.assert_array_equal(cleaned, image(large, shape))


def test_long_winding_region():
    mask = np.zeros((41, 41), dtype=bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True  # one line from the top to the bottom
    assert remove_small_regions(mask, mask.sum(), "islands") == (mask, False)
    mask[20, 20] = False
    cleaned, changed = remove_small_regions(mask, mask.sum() // 2 + 1, "islands")
    assert changed
    assert cleaned.sum() == max(map(len, flood(mask)))


def test_corners_touch():
    mask = np.eye(4, dtype=bool)
    assert not remove_small_regions(mask, 4, "islands")[1]
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = ring[0, 0] = False  # the hole has a way out over the corner
    assert not remove_small_regions(ring, 2, "holes")[1]


def test_of_small_islands_the_largest_stays():
    mask = np.array([[1, 0, 1, 1, 0, 1]], dtype=bool)
    np.testing.assert_array_equal(remove_small_regions(mask, 9, "islands")[0], [[0, 0, 1, 1, 0, 0]])


def test_of_equal_islands_opencv_s_first_stays():
    """OpenCV looks at blocks of 2x2 pixels: the island on the left comes first although its row is the second."""
    mask = np.array([[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]], dtype=bool)
    np.testing.assert_array_equal(remove_small_regions(mask, 9, "islands")[0], [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize("mode", ["holes", "islands"])
def test_nothing_to_do(mode):
    for mask in (np.zeros((3, 4), dtype=bool), np.ones((3, 4), dtype=bool), np.zeros((0, 4), dtype=bool)):
        found, changed = remove_small_regions(mask, 5, mode)
        assert found is mask
        assert not changed


def test_input_is_left_alone():
    for mode, density in (("holes", 0.8), ("islands", 0.2)):
        mask = np.random.default_rng(0).random((9, 9)) < density
        copy = mask.copy()
        assert remove_small_regions(mask, 5, mode)[1]
        np.testing.assert_array_equal(mask, copy)


def test_unknown_mode():
    with pytest.raises(ValueError, match="'islets'"):
        remove_small_regions(np.ones((2, 2), dtype=bool), 1, "islets")
