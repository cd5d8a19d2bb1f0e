"""Search results."""

from tests.contraction.conftest import FOUND


def test_pareto_front():
    assert [each.number for each in FOUND.pareto_front("macs")] == [4, 2]
    assert [each.number for each in FOUND.pareto_front("throughput")] == [4, 2]
