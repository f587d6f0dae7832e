"""vLLM's drafts against a plain PyTorch DFlash: a tiny Gemma-4-shaped pair, with and without our plugin, and the
bundled pair. Every token is compared; float32, greedy."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gemma4_shapes import write_pair
from benchmarks.local_server import ROOT
from dflash_serve import demo
from dflash_serve.training.drafter import DFlashDrafter
from dflash_serve.training.reference import draft_block
from tests.integration.v2_engine import WORKER as ADAPTIVE_V2_WORKER

pytestmark = pytest.mark.integration

BLOCK = 32
"""Tokens of a KV block: prefixes are cached by these."""


def gemma_prompts() -> list[list[int]]:
    """Shorter and longer than the sliding window (96) and than some blocks, so that prefixes can be cached."""
    numbers = random.Random(0)
    return [[2, *(numbers.randrange(5, 512) for _ in range(length))] for length in (9, 40, 75, 110, 140, 200)]


def run(
    folder: Path,
    target: Path,
    drafter: Path,
    prompts: list[list[int]],
    *,
    plugins: str | None = None,
    v2: bool = False,
    pad_groups: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Each prompt's answer and drafts from an engine in a process of its own (see `tests.integration.drafts`).

    Args:
        plugins: VLLM_PLUGINS, the names of those that vLLM loads; None for all that are installed.
        v2: Under vLLM's V2 model runner, which GPUs run.
        pad_groups: With few KV cache groups, padded, as Gemma-4-31B's drafter gets them.
        options: Further arguments of vllm.LLM.
    """
    num_draft_tokens = json.loads((drafter / "config.json").read_text())["block_size"] - 1
    engine = {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 512,
        "block_size": BLOCK,
        "skip_tokenizer_init": True,
        # else it does not say what was cached
        "disable_log_stats": False,
        "speculative_config": {
            "method": "dflash",
            "model": str(drafter),
            "num_speculative_tokens": num_draft_tokens,
        },
        **options,
    }
    sampling = {"temperature": 0, "max_tokens": 14, "ignore_eos": True, "detokenize": False}
    folder.mkdir(parents=True, exist_ok=True)
    requests, answers = folder / "requests.json", folder / "answers.json"
    requests.write_text(
        json.dumps({"engine": engine, "sampling": sampling, "prompts": prompts, "v2": v2, "pad_groups": pad_groups})
    )
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    result = subprocess.run(
        [sys.executable, "-m", "tests.integration.drafts", str(requests), str(answers)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    (folder / "log").write_text(result.stdout + result.stderr)
    found: list[dict[str, Any]] = json.loads(answers.read_text())
    return found


class Reference:
    """The target from transformers, and DFlash from `dflash_serve.training.reference`.

    Args:
        embedding_scale: What the target multiplies its looked-up embeddings by.
    """

    def __init__(self, target: Path, drafter: Path, *, embedding_scale: float) -> None:
        from transformers import AutoModelForCausalLM

        self.target: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        self.drafter = DFlashDrafter.load(drafter, torch.device("cpu"))
        self.head = self.target.get_output_embeddings().weight.detach()
        self.embedding = self.target.get_input_embeddings().weight.detach() * embedding_scale  # type: ignore[operator]

    @torch.no_grad()
    def drafts(self, answer: dict[str, Any], prompt: list[int]) -> list[tuple[list[int], list[int]]]:
        """(vLLM's, the reference's) draft tokens of each block whose bonus token the answer holds."""
        tokens = prompt + answer["output"]
        hidden = self.target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        features = torch.cat([hidden[i + 1][0] for i in self.drafter.config.target_layer_ids], dim=-1)
        pairs = []
        for draft in answer["drafts"]:
            position = draft["position"]
            if position < len(tokens):
                assert draft["bonus_token"] == tokens[position]
                logits = draft_block(self.drafter, self.embedding, self.head, features[:position], tokens[position])
                pairs.append((draft["tokens"], logits.argmax(dim=-1).tolist()))
        return pairs


def count_equal(pairs: list[tuple[list[int], list[int]]]) -> tuple[int, int]:
    """Draft tokens that are equal, and all of them."""
    flat = [(ours, theirs) for pair in pairs for ours, theirs in zip(*pair, strict=True)]
    return sum(ours == theirs for ours, theirs in flat), len(flat)


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("tiny"), tiny=True)


@pytest.fixture(scope="module")
def gemma_reference(tiny_pair: tuple[Path, Path]) -> Reference:
    hidden_size = json.loads((tiny_pair[0] / "config.json").read_text())["hidden_size"]
    return Reference(*tiny_pair, embedding_scale=hidden_size**0.5)


@pytest.fixture(scope="module")
def cold_then_cached(
    tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same prompts twice on one engine, our plugin active: nothing cached, then their prefixes."""
    # as in the Gemma-4 profiles: by vLLM's default DFlash finds nothing of a prompt longer than the window
    options: dict[str, Any] = {"prefix_cache_retention_interval": BLOCK}
    answers = run(tmp_path_factory.mktemp("gemma"), *tiny_pair, [*gemma_prompts(), *gemma_prompts()], **options)
    return answers[: len(answers) // 2], answers[len(answers) // 2 :]


def test_gemma_drafts_are_those_of_the_reference(
    cold_then_cached: tuple[list[dict[str, Any]], list[dict[str, Any]]], gemma_reference: Reference
) -> None:
    cold, _ = cold_then_cached
    pairs = [
        pair
        for answer, prompt in zip(cold, gemma_prompts(), strict=True)
        for pair in gemma_reference.drafts(answer, prompt)
    ]
    equal, drafted = count_equal(pairs)
    print(f"{equal} of {drafted} draft tokens equal the reference's")
    assert drafted >= 400
    assert len({token for ours, _ in pairs for token in ours}) > 20, "drafts hardly depend on the context"
    assert equal == drafted


def test_without_the_plugin_they_are_not(
    tiny_pair: tuple[Path, Path], gemma_reference: Reference, tmp_path: Path
) -> None:
    answers = run(tmp_path, *tiny_pair, gemma_prompts(), plugins="none")
    equal, drafted = count_equal(
        [
            pair
            for answer, prompt in zip(answers, gemma_prompts(), strict=True)
            for pair in gemma_reference.drafts(answer, prompt)
        ]
    )
    print(f"without the plugin: {equal} of {drafted}")
    assert drafted >= 400
    assert equal < drafted / 2, "vLLM normalises Gemma's embeddings itself now: gemma_drafter can go"


@pytest.mark.parametrize(("pad_groups", "worker"), [(False, "auto"), (True, ADAPTIVE_V2_WORKER)])
def test_under_the_runner_of_gpus_they_are_too(
    tiny_pair: tuple[Path, Path], gemma_reference: Reference, tmp_path: Path, pad_groups: bool, worker: str
) -> None:
    """With sliding and full layers in one drafter, as Gemma-4's has them. The window is longer than the prompts here,
    and vLLM is told that sliding layers see the whole block too: it makes them causal otherwise, as it takes Gemma-4's
    to have been trained. With vLLM's worker, and as a Gemma-4 profile has it: with ours and padded groups."""
    target, drafter = tiny_pair
    mixed = tmp_path / "mixed"
    shutil.copytree(drafter, mixed)
    config = json.loads((mixed / "config.json").read_text())
    config |= {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 256,
        "use_sliding_window": True,
    }
    config["dflash_config"] |= {"causal": False}
    (mixed / "config.json").write_text(json.dumps(config))
    some = gemma_prompts()[:4]
    answers = run(tmp_path, target, mixed, some, v2=True, pad_groups=pad_groups, worker_cls=worker)
    log = (tmp_path / "log").read_text()
    assert ("KV cache groups: " in log) == pad_groups
    assert ("DFlash drafter: left out" in log) == (worker == ADAPTIVE_V2_WORKER)
    equal, drafted = count_equal(
        [pair for answer, prompt in zip(answers, some, strict=True) for pair in gemma_reference.drafts(answer, prompt)]
    )
    print(f"V2: {equal} of {drafted} draft tokens equal the reference's")
    assert drafted >= 300
    assert equal == drafted


def test_cached_prefixes_change_neither_output_nor_drafts(
    cold_then_cached: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    """Draft by draft, so acceptance is the same too (vLLM issues 40624 and 47930)."""
    hits = []
    for cold, cached, prompt in zip(*cold_then_cached, gemma_prompts(), strict=True):
        assert cold["cached_tokens"] == 0
        assert cached["output"] == cold["output"]
        assert cached["drafts"] == cold["drafts"]
        hits.append((len(prompt), cached["cached_tokens"]))
    print(f"(prompt tokens, of them cached): {hits}")
    # vLLM gives back the last block or two, whose drafter keys it does not trust
    assert all(hit >= length - 3 * BLOCK for length, hit in hits)
    assert hits[-1][1] >= 4 * BLOCK


def test_the_bundled_drafter_drafts_as_the_reference(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    target, drafter = demo.ensure_target(), demo.drafter_path()
    tokenizer = AutoTokenizer.from_pretrained(target)
    questions = ("What is the capital of France?", "Count from 1 to 20.", "Write a haiku about the sea.")
    prompts: list[list[int]] = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]  # type: ignore[call-overload,index,misc]
        for question in questions
    ]
    answers = run(tmp_path, target, drafter, prompts * 2)
    reference = Reference(target, drafter, embedding_scale=1.0)
    pairs = [
        pair for answer, prompt in zip(answers, prompts * 2, strict=True) for pair in reference.drafts(answer, prompt)
    ]
    equal, drafted = count_equal(pairs)
    accepted = sum(len(answer["output"]) for answer in answers) - len(pairs)
    print(f"bundled pair: {equal} of {drafted} equal; {accepted} tokens accepted on the way")
    assert drafted >= 400
    assert accepted > 0, "no draft was accepted: contexts after acceptance were not tested"
    assert equal == drafted
