import re

from dflash_serve import metrics


def test_names_are_unique_and_carry_no_type_suffix() -> None:
    names = [metric.name for metric in (*metrics.CATALOGUE, *metrics.RELIED_ON)]
    assert len(set(names)) == len(names)
    assert len(metrics.CATALOGUE) >= 17
    for metric in metrics.CATALOGUE:
        assert re.fullmatch(r"dflash_[a-z_]+", metric.name)
        assert not metric.name.endswith("_total"), "Ray adds _total to counters"


def test_histograms_of_ours_alone_have_boundaries() -> None:
    for metric in metrics.CATALOGUE:
        assert bool(metric.boundaries) == (metric.kind == "histogram"), metric.name
        assert list(metric.boundaries) == sorted(metric.boundaries)


def test_labels_are_those_that_are_bounded() -> None:
    bounded = {"model", "replica", "outcome", "position", "traffic_class"}
    for metric in metrics.CATALOGUE:
        assert {"model", "replica"} <= set(metric.labels) <= bounded, metric.name


def test_exported_names_and_units() -> None:
    assert metrics.ACCEPTED_TOKENS.exported_name == "ray_dflash_accepted_tokens_total"
    assert metrics.ACCEPTANCE_LENGTH.exported_name == "ray_dflash_acceptance_length"
    assert metrics.TTFT.series_name == "ray_dflash_time_to_first_token_seconds_count"
    units = {metric.name: metric.unit for metric in (*metrics.CATALOGUE, *metrics.RELIED_ON)}
    assert units["dflash_request_acceptance_length"] == "tokens per verification"
    assert units["dflash_kv_cache_usage_ratio"] == "ratio"
    assert units["dflash_requests"] == "requests"
    assert units["dflash_verifications"] == units["dflash_request_verifications"] == "verifications"
    assert units["vllm_num_preemptions"] == "preemptions"
