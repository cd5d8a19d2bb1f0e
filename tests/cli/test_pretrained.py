import json

import pytest

from kornia_tinyvit import list_pretrained
from tests.helpers import error_of, run


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


@pytest.mark.parametrize("variant", [None, "1m", "5m", "11m", "21m"])
class TestPretrained:
    def test_json(self, variant):
        rows = json.loads(run("pretrained", "--json", *(["--variant", variant] if variant else [])))
        catalog = list_pretrained(variant)
        assert [(row["variant"], row["name"]) for row in rows] == [(each.variant, each.name) for each in catalog]
        for row, each in zip(rows, catalog, strict=True):
            assert (row["img_size"], row["top1"], row["license"]) == (each.img_size, each.top1, each.license)
            assert tuple(row["urls"]) == each.urls

    def test_table(self, variant):
        output = run("pretrained", *(["--variant", variant] if variant else []))
        rows = [line.split() for line in output.splitlines() if line.strip() and line.split()[0].endswith("m")]
        catalog = list_pretrained(variant)
        assert [row[:3] for row in rows] == [[each.variant, each.name, str(each.img_size)] for each in catalog]
        for line, each in zip(rows, catalog, strict=True):
            if each.top1 is not None:
                assert line[3:6] == [str(each.num_classes), f"{each.top1:.1f}", f"{each.top5:.1f}"]
            assert each.license in " ".join(line)
            assert each.trained_on in " ".join(line)


def test_narrow_terminals_cut_no_number(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = run("pretrained")
    assert max(map(len, output.splitlines())) <= 80
    for each in list_pretrained():
        assert each.name in output


def test_unknown_variant(capfd, monkeypatch):
    error = error_of(capfd, monkeypatch, "pretrained", "--variant", "9m")
    assert "no weights for a variant '9m'; try 1m, 5m, 11m or 21m" in error
