import re

from dflash_serve import metrics


def test_names_are_unique_and_carry_no_type_suffix() -> None:
    names = [metric.name for metric in metrics.CATALOGUE]
    assert len(set(names)) == len(names) >= 11
    for name in names:
        assert re.fullmatch(r"dflash_[a-z_]+", name)
        assert not name.endswith("_total"), "Ray adds _total to counters"


def test_histograms_alone_have_boundaries() -> None:
    for metric in metrics.CATALOGUE:
        assert bool(metric.boundaries) == (metric.kind == "histogram"), metric.name
        assert list(metric.boundaries) == sorted(metric.boundaries)


def test_exported_names() -> None:
    assert metrics.ACCEPTED_TOKENS.exported_name == "ray_dflash_accepted_tokens_total"
    assert metrics.ACCEPTANCE_LENGTH.exported_name == "ray_dflash_acceptance_length"
