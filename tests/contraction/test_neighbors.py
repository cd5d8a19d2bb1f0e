"""Contractions and expansions."""

from __future__ import annotations

import pytest

from kornia_tinyvit.config import VARIANTS
from kornia_tinyvit.contraction import SearchSpace, contractions, expansions, smallest


class TestContractions:
    def test_one_factor_at_a_time(self):
        for factor, chain in contractions(VARIANTS["21m"], SearchSpace()).items():
            name = factor.split("[")[0]
            allowed = {name, "num_heads"} if name == "embed_dims" else {name}
            before = VARIANTS["21m"]
            for config in chain:
                changed = {field for field in vars(config) if getattr(config, field) != getattr(before, field)}
                assert name in changed <= allowed
                before = config

    def test_values(self):
        found = {name: list(chain) for name, chain in contractions(VARIANTS["5m"], SearchSpace()).items()}
        assert [each.embed_dims[2] for each in found["embed_dims[2]"]] == [128, 96, 64, 32]
        assert [each.num_heads[2] for each in found["embed_dims[2]"]] == [4, 3, 2, 1]
        assert [each.embed_dims[0] for each in found["embed_dims[0]"]] == [48, 32, 16]
        assert [each.depths[2] for each in found["depths[2]"]] == [5, 4, 3, 2, 1]
        assert [each.window_sizes[1] for each in found["window_sizes[1]"]] == [4, 2]  # of a feature map of 28
        assert [each.window_sizes[2] for each in found["window_sizes[2]"]] == [7, 2]
        assert found["window_sizes[3]"] == []  # 7 is prime
        assert [each.mlp_ratio for each in found["mlp_ratio"]] == [3.5, 3.0, 2.5, 2.0, 1.5, 1.0]

    def test_space(self):
        space = SearchSpace(min_depth=2, min_window=4, ratio_step=1.0, min_ratio=2.0)
        found = {name: list(chain) for name, chain in contractions(VARIANTS["5m"], space).items()}
        assert [each.depths[2] for each in found["depths[2]"]] == [5, 4, 3, 2]
        assert [each.window_sizes[2] for each in found["window_sizes[2]"]] == [7]
        assert [each.mbconv_expand_ratio for each in found["mbconv_expand_ratio"]] == [3.0, 2.0]

    def test_smallest(self):
        least = smallest(VARIANTS["21m"], SearchSpace())
        assert least.embed_dims == (16, 32, 32, 32)
        assert not any(list(chain) for chain in contractions(least, SearchSpace()).values())

    @pytest.mark.parametrize("wrong", [{"min_depth": 0}, {"min_window": 0}, {"ratio_step": 0.0}, {"min_ratio": -1}])
    def test_errors(self, wrong):
        with pytest.raises(ValueError, match="=".join(map(str, *wrong.items()))):
            SearchSpace(**wrong)


class TestExpansions:
    @pytest.mark.parametrize(
        "space", [SearchSpace(), SearchSpace(ratio_step=1.0), SearchSpace(min_depth=2, min_window=4, min_ratio=3.0)]
    )
    def test_expansions_reverse_contractions(self, space):
        """Expansions lead back through the same networks."""
        seed = VARIANTS["5m"]
        for factor, chain in contractions(seed, SearchSpace(ratio_step=space.ratio_step)).items():
            way = [seed, *chain]
            for position, config in enumerate(way):
                found = {name: list(more) for name, more in expansions(config, seed, space).items()}
                assert found.pop(factor) == way[:position][::-1]
                assert not any(found.values())

    def test_other_factors_stay(self):
        config = smallest(VARIANTS["5m"], SearchSpace())
        for factor, chain in expansions(config, VARIANTS["5m"], SearchSpace()).items():
            name = factor.split("[")[0]
            for more in chain:
                changed = {field for field in vars(config) if getattr(config, field) != getattr(more, field)}
                assert name in changed <= {name, "num_heads"}

    def test_values_between_steps(self):
        """A ratio that is not a whole number of steps below the maximum is not expanded; other factors are."""
        odd = VARIANTS["5m"].replace(mlp_ratio=3.3, depths=(2, 2, 5, 2))
        found = {name: list(chain) for name, chain in expansions(odd, VARIANTS["5m"], SearchSpace()).items()}
        assert found["mlp_ratio"] == []
        assert [each.depths[2] for each in found["depths[2]"]] == [6]
