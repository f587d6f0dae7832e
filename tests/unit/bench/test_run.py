"""Stages, loads and settings of the servers that are started; the card."""

from __future__ import annotations

import pytest

from dflash_serve.bench.card import CARD, acceptance_length
from dflash_serve.bench.run import Load, ordered, pair_stages, request_body, synthetic_options
from dflash_serve.bench.servers import vllm_config
from dflash_serve.hardware import Cluster
from dflash_serve.settings import resolve


def test_the_card_agrees_with_itself() -> None:
    assert len(CARD) == 15
    for published in CARD.values():
        # whole tokens/s and one decimal are printed: the ratio lies between those of what they may have been
        low = (published.dflash - 0.5) / (published.autoregressive + 0.5) - 0.05
        high = (published.dflash + 0.5) / (published.autoregressive - 0.5) + 0.05
        assert low <= published.speedup <= high


def test_sides_of_a_pair_and_their_order() -> None:
    stages = pair_stages(["gsm8k", "mbpp"], {}, [5, 7], plain=False, synthetic=False)
    assert [stage.side for stage in stages] == ["AR", "DFlash K=5", "DFlash K=7"]
    assert [stage.side for stage in ordered(stages, 1)] == ["DFlash K=7", "DFlash K=5", "AR"]


def test_forced_acceptance_takes_a_server_a_task() -> None:
    stages = pair_stages(["gsm8k", "mbpp"], {}, [], plain=False, synthetic=True)
    assert [(stage.side, stage.tasks) for stage in stages] == [
        ("AR", ("gsm8k", "mbpp")),
        ("DFlash", ("gsm8k",)),
        ("DFlash", ("mbpp",)),
    ]
    assert synthetic_options("gsm8k")["synthetic_acceptance_length"] == acceptance_length("gsm8k") == 7.53
    with pytest.raises(ValueError, match="no acceptance length for 'sample'"):
        pair_stages(["sample"], {}, [], plain=False, synthetic=True)


def test_a_load_sends_at_least_one_conversation_a_stream() -> None:
    (stage,) = pair_stages(["t"], {}, [], plain=False, synthetic=False)[:1]
    tasks = {"t": [["a"], ["b"], ["c"]]}
    assert Load(tasks, 2, (1, 8)).conversations(stage) == 2 + 8
    assert Load(tasks, 9, (1, 8)).conversations(stage) == 3 + 8, "no more than the task has"
    assert Load(tasks, 2, (1, 8), per_stream=4).conversations(stage) == 4 + 32


def test_thinking_is_the_templates_own_unless_said() -> None:
    assert request_body(9, thinking=None, ignore_eos=False) == {"max_tokens": 9, "temperature": 0}
    assert request_body(9, thinking=True, ignore_eos=False)["chat_template_kwargs"] == {"enable_thinking": True}


def test_vllm_serve_gets_the_engine_settings_of_our_replica() -> None:
    settings = resolve({"profile": "smollm2-cpu", "speculation": {"mode": "off"}}, Cluster(cpus=2, gpus={})).settings
    options = vllm_config(settings.model_copy(update={"target": "some/model"}), 1234)
    assert options["max-num-seqs"] == settings.engine["max_num_seqs"]
    assert options["enforce-eager"] is True
    assert options["port"] == 1234
    assert options["model"] == "some/model"
    assert "speculative-config" not in options
    assert None not in options.values()
