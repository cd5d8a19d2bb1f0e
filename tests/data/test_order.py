import numpy as np
import pytest
import torch

from kornia_tinyvit.data.order import EpochOrder, keyed_words, philox


class TestPhilox:
    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [  # the known answers of Random123's kat_vectors
            ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
            ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
            (
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                (0xA4093822, 0x299F31D0),
                [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
            ),
        ],
    )
    def test_known_answers(self, counter, key, expected):
        words = philox(np.array(counter, dtype=np.uint64)[:, None], key)
        assert words[:, 0].tolist() == expected


class TestKeyedWords:
    def test_rows_depend_only_on_their_key(self):
        whole = keyed_words(9, 4, np.arange(100), stream=2, blocks=3)
        assert whole.shape == (100, 12)
        assert np.array_equal(whole[[77, 3]], keyed_words(9, 4, np.array([77, 3]), stream=2, blocks=3))
        assert np.array_equal(whole[:, :4], keyed_words(9, 4, np.arange(100), stream=2, blocks=1))

    @pytest.mark.parametrize("other", [(10, 4, 2), (9 + 2**32, 4, 2), (9, 5, 2), (9, 4, 3)])
    def test_seed_epoch_and_stream_change_everything(self, other):
        seed, epoch, stream = other
        first = keyed_words(9, 4, np.arange(50), stream=2)
        assert (first != keyed_words(seed, epoch, np.arange(50), stream)).mean() > 0.99

    def test_uniform(self):
        words = keyed_words(0, 0, np.arange(50_000), stream=1)
        unit = words * 2.0**-32
        assert abs(unit.mean() - 0.5) < 0.003
        assert abs(unit.var() - 1 / 12) < 0.001
        assert np.abs(np.corrcoef(unit.T) - np.eye(4)).max() < 0.02

    def test_global_random_states_are_unchanged(self):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        state = np.random.get_state()[1].copy()
        keyed_words(0, 0, np.arange(5), stream=1)
        assert torch.equal(before, torch.get_rng_state())
        assert np.array_equal(state, np.random.get_state()[1])


class TestEpochOrder:
    def test_permutation_and_positions(self):
        order = EpochOrder(1001, seed=5)
        permutation = order.permutation(2).copy()
        assert np.array_equal(np.sort(permutation), np.arange(1001))
        assert np.array_equal(order.positions(2, permutation), np.arange(1001))
        assert not np.array_equal(permutation, order.permutation(3))
        assert not np.array_equal(permutation, EpochOrder(1001, seed=6).permutation(2))
        assert np.array_equal(permutation, order.permutation(2))

    def test_independent_of_the_chunks(self, monkeypatch):
        whole = EpochOrder(1000, seed=1).permutation(0)
        monkeypatch.setattr("kornia_tinyvit.data.order._CHUNK", 7)
        assert np.array_equal(whole, EpochOrder(1000, seed=1).permutation(0))

    def test_partners(self):
        order = EpochOrder(7, seed=0)
        permutation = order.permutation(1)
        partners = order.partners(1, permutation)
        assert partners.tolist() == [*permutation[[1, 0, 3, 2, 5, 4]].tolist(), permutation[6]]

    @pytest.mark.parametrize(("count", "seed"), [(0, 0), (2**32, 0), (5, -1), (5, 2**64)])
    def test_rejects_settings(self, count, seed):
        with pytest.raises(ValueError, match="must be in"):
            EpochOrder(count, seed)

    def test_rejects_samples_and_epochs(self):
        order = EpochOrder(5)
        with pytest.raises(IndexError, match=r"\[0, 5\)"):
            order.positions(0, np.array([5]))
        with pytest.raises(ValueError, match="epoch must be"):
            order.permutation(-1)
