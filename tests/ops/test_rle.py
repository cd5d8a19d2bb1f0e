import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kornia_tinyvit.ops.rle import compress_rle, decode_rle, encode_rle, rle_area, uncompress_rle


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    return random.random((height, width)) < draw(st.sampled_from([0, 0.02, 0.5, 0.98, 1]))


def disc(height, width):
    rows, columns = np.mgrid[:height, :width]
    return (rows - height / 2) ** 2 + (columns - width / 3) ** 2 < (min(height, width) / 3) ** 2


class TestEncode:
    @given(masks())
    def test_definition(self, mask):
        counts = encode_rle(mask)["counts"]
        column_after_column = mask.T.ravel()
        position, value = 0, False
        for count in counts:
            assert (column_after_column[position : position + count] == value).all()
            position, value = position + count, not value
        assert position == mask.size
        assert all(counts[1:])  # runs are as long as they can be; only the first may be empty

    @given(masks())
    def test_round_trip(self, mask):
        rle = encode_rle(mask)
        compressed = compress_rle(rle)
        assert encode_rle(mask, compressed=True) == compressed
        assert json.loads(json.dumps(compressed)) == compressed
        assert uncompress_rle(compressed) == rle
        for each in (rle, compressed, {**compressed, "counts": compressed["counts"].encode()}):
            decoded = decode_rle(each)
            assert decoded.dtype == bool
            np.testing.assert_array_equal(decoded, mask)
            assert rle_area(each) == mask.sum()

    def test_tensors_and_views(self):
        mask = torch.from_numpy(disc(20, 30))
        assert encode_rle(mask) == encode_rle(mask.numpy()) == encode_rle(np.asfortranarray(mask.numpy()))
        assert encode_rle(mask.T) == encode_rle(mask.T.contiguous())

    def test_no_pixels(self):
        assert encode_rle(np.zeros((0, 5), dtype=bool)) == {"size": [0, 5], "counts": [0]}
        assert encode_rle(np.zeros((0, 5), dtype=bool), compressed=True) == {"size": [0, 5], "counts": "0"}
        assert decode_rle({"size": [0, 5], "counts": [0]}).shape == (0, 5)


class TestPycocotools:
    """Strings that pycocotools 2.0.11 wrote, with ``encode(np.asfortranarray(mask, np.uint8))``."""

    @pytest.mark.parametrize(
        ("mask", "expected"),
        [
            (disc(20, 30), "h25=4M2O0O2O00000001N101N3Ln7"),
            (disc(300, 40)[:, 5:22], "\\4e0f82O0O2O000O2O0000000001N10001N2NeK"),
            (~disc(1000, 1200)[::-40, ::40], "0m14eN5M3M2O0O2O000000000001N101N2M5KZ8"),
            (np.ones((5, 7), dtype=bool), "0S1"),
            (np.zeros((5, 7), dtype=bool), "S1"),
        ],
    )
    def test_strings(self, mask, expected):
        assert compress_rle(encode_rle(mask)) == {"size": list(mask.shape), "counts": expected}

    @pytest.mark.parametrize(
        ("counts", "expected"),
        [
            ([0, 5], "05"),
            ([16, 15, 1], "`0?1"),
            ([70000, 3, 100000, 1, 50, 2000000], "`[T23PeQ3Nb\\nLoSQm1"),
            ([0, 1, 32, 1, 1, 1, 1023, 1024, 1025, 512, 511], "01P10QO0no0oo02P@n_O"),
        ],
    )
    def test_lists(self, counts, expected):
        """Written with ``frPyObjects({"size": [1, sum(counts)], "counts": counts}, 1, sum(counts))``."""
        size = [1, sum(counts)]
        assert compress_rle({"size": size, "counts": counts}) == {"size": size, "counts": expected}
        assert uncompress_rle({"size": size, "counts": expected.encode()}) == {"size": size, "counts": counts}


class TestInstalledPycocotools:
    """The package itself, where it is installed."""

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its own, of NumPy 2
    @given(masks())
    def test_both_ways(self, mask):
        coco = pytest.importorskip("pycocotools.mask")
        theirs = coco.encode(np.asfortranarray(mask, np.uint8))
        ours = compress_rle(encode_rle(mask))
        assert ours == {"size": theirs["size"], "counts": theirs["counts"].decode()}
        np.testing.assert_array_equal(coco.decode(ours), mask)
        np.testing.assert_array_equal(decode_rle(theirs), mask)
        assert coco.area(ours) == rle_area(theirs) == mask.sum()
        assert coco.frPyObjects(encode_rle(mask), *mask.shape) == theirs


class TestExceptions:
    @pytest.mark.parametrize("mask", [np.zeros((2, 2)), np.zeros(4, dtype=bool), torch.zeros(1, 2, 2).bool()])
    def test_no_mask(self, mask):
        with pytest.raises(ValueError, match="must be boolean"):
            encode_rle(mask)

    @pytest.mark.parametrize("counts", [[3, 2], [3, 4], "32"])
    def test_wrong_length(self, counts):
        with pytest.raises(ValueError, match="2x3"):
            decode_rle({"size": [2, 3], "counts": counts})

    @pytest.mark.parametrize("counts", [[-1, 7], [2**32]])
    def test_impossible_runs(self, counts):
        with pytest.raises(ValueError, match="Run lengths must be"):
            compress_rle({"size": [2, 3], "counts": counts})

    @pytest.mark.parametrize("counts", ["", "P", "2P", "2 1", "2é", "z", "PPPPPPPPP0"])
    def test_no_text_of_coco(self, counts):
        with pytest.raises(ValueError, match="not COCO's"):
            decode_rle({"size": [2, 3], "counts": counts})

    @pytest.mark.parametrize("rle", [None, 3, [1], {}, {"size": [2, 3]}])
    def test_no_runs(self, rle):
        with pytest.raises(ValueError, match="has 'size' and 'counts'"):
            decode_rle(rle)

    @pytest.mark.parametrize("size", [None, 6, "23", [6], [2, 3, 1], [2.0, 3], [-2, -3], [2**31, 1], [[2], [3]]])
    def test_no_size(self, size):
        with pytest.raises(ValueError, match="The size of a mask is two integers"):
            decode_rle({"size": size, "counts": [6]})

    @pytest.mark.parametrize("counts", [None, 6, ["6"], [6.0], [[6]], [[1], [2, 3]], {"a": 6}, [10**30], [None]])
    def test_no_list_of_runs(self, counts):
        with pytest.raises(ValueError, match="Run lengths must be a list of integers, or text"):
            decode_rle({"size": [2, 3], "counts": counts})

    def test_nothing(self):
        assert decode_rle({"size": [0, 5], "counts": []}).shape == (0, 5)
