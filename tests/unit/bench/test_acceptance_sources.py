"""Accepted draft tokens out of responses and out of /metrics."""

from __future__ import annotations

import pytest

from dflash_serve.bench.acceptance import Counters, accepted_per_position, between, from_response, parse_metrics


def test_vllms_own_figures_come_first() -> None:
    speculation = {
        "num_spec_steps": 10,
        "num_draft_tokens": 30,
        "num_accepted_draft_tokens": 12,
        "acceptance_histogram": [3, 4, 1, 2],
    }
    counts = from_response({"metrics": {"speculative_decoding": speculation}, "usage": {"completion_tokens": 99}})
    assert counts is not None
    assert counts.accepted_per_position == [7, 3, 2]
    assert sum(counts.accepted_per_position) == counts.accepted_tokens
    assert counts.acceptance_length == 2.2


def test_openais_usage_alone_tells_the_acceptance_length() -> None:
    # the prompt's pass gives 1 token, 10 verifications give 10 and the 12 that they accept
    details = {"accepted_prediction_tokens": 12, "rejected_prediction_tokens": 18}
    counts = from_response({"usage": {"completion_tokens": 23, "completion_tokens_details": details}})
    assert counts is not None
    assert (counts.verifications, counts.draft_tokens, counts.acceptance_length) == (10, 30, 2.2)


@pytest.mark.parametrize(
    "usage",
    [
        {"completion_tokens": 5},
        {"completion_tokens": 5, "completion_tokens_details": None},
        # as OpenAI's own API says it
        {
            "completion_tokens": 5,
            "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
        },
    ],
)
def test_without_speculation_there_is_nothing(usage: dict[str, object]) -> None:
    assert from_response({"usage": usage}) is None


def test_a_histogram_of_lengths_becomes_counts_by_position() -> None:
    assert accepted_per_position([5, 0, 0, 2]) == [2, 2, 2]
    assert accepted_per_position([]) == []


VLLM = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafts}
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {drafted}
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="0"}} {first}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="1"}} {second}
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="m"}} 12345
"""


def test_vllms_counters_between_two_readings() -> None:
    before = parse_metrics(VLLM.format(drafts=100, drafted=200, accepted=50, first=40, second=10))
    after = parse_metrics(VLLM.format(drafts=110, drafted=220, accepted=59, first=47, second=12))
    counts = between(before, after, num_requests=3)
    assert counts is not None
    assert (counts.verifications, counts.draft_tokens, counts.accepted_tokens) == (10, 20, 9)
    assert counts.accepted_per_position == [7, 2]
    assert counts.acceptance_length == 1.9


def test_rays_agent_has_the_same_counters_by_another_name_and_by_replica() -> None:
    text = """\
# TYPE ray_vllm_spec_decode_num_drafts_total counter
ray_vllm_spec_decode_num_drafts_total{ReplicaId="a"} 4
ray_vllm_spec_decode_num_drafts_total{ReplicaId="b"} 6
# TYPE ray_vllm_spec_decode_num_accepted_tokens_total counter
ray_vllm_spec_decode_num_accepted_tokens_total{ReplicaId="a"} 3
ray_vllm_spec_decode_num_accepted_tokens_total{ReplicaId="b"} 9
"""
    counts = between(Counters(), parse_metrics(text), num_requests=1)
    assert counts is not None
    assert counts.acceptance_length == 2.2


def test_sglang_counts_verifications_and_tokens() -> None:
    text = """\
# TYPE sglang:spec_verify_calls_total counter
sglang:spec_verify_calls_total{{model_name="m"}} {calls}
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{{model_name="m"}} {tokens}
"""
    before, after = (parse_metrics(text.format(calls=c, tokens=t)) for c, t in ((100, 1000), (110, 1024)))
    counts = between(before, after, num_requests=2)
    assert counts is not None
    # 24 tokens, 2 of them by the prompts' passes, 10 one a verification
    assert counts.accepted_tokens == 12
    assert counts.acceptance_length == 2.2


def test_a_page_without_speculation_and_an_idle_one_say_nothing() -> None:
    assert parse_metrics("# TYPE up gauge\nup 1\n") == Counters()
    page = parse_metrics(VLLM.format(drafts=1, drafted=2, accepted=1, first=1, second=0))
    assert between(page, page, num_requests=0) is None


def test_a_page_that_is_not_of_metrics_is_said_to_be_none() -> None:
    with pytest.raises(ValueError, match="html"):
        parse_metrics("<html>no metrics here</html>\n")
