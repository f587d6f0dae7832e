"""The Gemma-4 profile on one GPU: the true shapes, no downloaded weights.

    python -m benchmarks.gemma4_gpu --out FOLDER [--profile gemma4-31b-h200] [--part serve|engine]
    python -m benchmarks.gemma4_gpu --out FOLDER --tiny        the same on a CPU, with a tiny pair

serve: `dflash-serve up` with the profile, dummy weights and synthetic acceptance; a chat with thinking over HTTP; how
long each phase of the start took; how many requests of 4k and 32k tokens stream at once, and the same prompts cold and
cached.
engine: the same engine in a process, random weights: the drafter's normaliser and logit cap, memory and KV cache
beside what `preflight` estimates, how many requests of 4k and 32k tokens run at once, and the same prompts cold, cached
and cold again.
Works from a checkout that is not installed. Prints as it goes; FOLDER/result.json holds all that was found so far.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SYNTHETIC_ACCEPTANCE_LENGTH = 4.0
START_SECONDS = 420.0
FIT_SECONDS = 45.0
OUTPUT_TOKENS = 40
GIB = 1024**3

PHASES = {
    "model_load_s": r"Model loading took .*? and ([\d.]+) seconds",
    "model_load_gib": r"Model loading took ([\d.]+) GiB",
    "torch_compile_s": r"torch\.compile (?:took|and initial profiling/warmup run together took) ([\d.]+) s",
    "graph_capture_s": r"Graph capturing finished in ([\d.]+) secs",
    "graph_capture_gib": r"Graph capturing finished in .*?took ([\d.]+) GiB",
    "engine_init_s": r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+)",
    "kv_cache_gib": r"Available KV cache memory: ([\d.]+) GiB",
    "kv_cache_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "max_concurrency": r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x",
}
"""What vLLM's log says of the start, and how."""


class Result:
    """FOLDER/result.json, whole after every step."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "result.json"
        self.values: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def put(self, part: str, **values: Any) -> None:
        self.values.setdefault(part, {}).update(values)
        self._path.write_text(json.dumps(self.values, indent=1) + "\n")
        for name, value in values.items():
            print(f"{part}.{name}: {json.dumps(value)}", flush=True)


def settings_args(folder: Path, *, profile: str, tiny: bool) -> dict[str, Any]:
    """What stands under `args` in serve_config.yaml: the profile with folders of ours for its models."""
    from benchmarks.gemma4_shapes import write_pair
    from dflash_serve.settings.profiles import MEASURED_WITH_TARGET, load_profile

    target, drafter = write_pair(folder, tiny=tiny)
    args: dict[str, Any] = {"profile": profile, "model_id": "gemma-4", "target": str(target), "drafter": str(drafter)}
    if not tiny:
        # the profile's own, which hold for its target alone
        speculation = load_profile(profile).get("speculation", {})
        own = {name: speculation[name] for name in MEASURED_WITH_TARGET if name in speculation}
        return args | {"engine": {"load_format": "dummy"}, "speculation": own}
    engine = {
        "dtype": "float32",
        "max_model_len": 1024,
        "gpu_memory_utilization": 0.3,
        "block_size": 32,
        "prefix_cache_retention_interval": 32,
        "reasoning_parser": "gemma4",
        "tool_call_parser": "gemma4",
        "enable_auto_tool_choice": True,
    }
    return args | {"profile": "smollm2-cpu", "engine": engine}


def plugin_path(folder: Path) -> str:
    """PYTHONPATH with which vLLM finds our plugins, also from a checkout that is not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return python_path(folder, "dflash-serve", project["version"], project["entry-points"])


def python_path(folder: Path, name: str, version: str, entry_points: Mapping[str, Mapping[str, str]]) -> str:
    """PYTHONPATH with the checkout, and a distribution of these entry points by group, written into `folder`."""
    site = folder / "site"
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    info.joinpath("METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{point} = {value}" for point, value in points.items())]
    info.joinpath("entry_points.txt").write_text("\n".join(lines) + "\n")
    return os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def first_gpu() -> str:
    """The CUDA device that this process would take."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def phases(text: str) -> dict[str, float]:
    """The figures of PHASES in a log, where they stand."""
    found = {name: re.findall(pattern, text) for name, pattern in PHASES.items()}
    return {name: float(values[-1].replace(",", "")) for name, values in found.items() if values}


def serve_part(folder: Path, args: dict[str, Any], result: Result, *, tiny: bool) -> None:
    from benchmarks.local_server import serving, session_folder, tail
    from dflash_serve.settings.profiles import merge

    # vLLM's CPU sampler has no synthetic acceptance
    speculation = (
        {}
        if tiny
        else {
            "options": {
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_length": SYNTHETIC_ACCEPTANCE_LENGTH,
            }
        }
    )
    keep = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
    environment = keep | {"PYTHONPATH": plugin_path(folder)}
    (folder / "serve").mkdir(exist_ok=True)
    with serving(
        folder / "serve",
        merge(args, {"speculation": speculation}),
        environment=environment,
        start_seconds=START_SECONDS,
    ) as server:
        result.put("serve", seconds_to_first_answer=round(server.start_seconds, 1))
        logs = session_folder(server) / "logs"
        text = "\n".join(
            path.read_text(errors="replace")
            for path in logs.rglob("*")
            if path.suffix in (".log", ".err", ".out") and path.is_file()
        )
        said = sorted(set(re.findall(r"(DFlash drafter[^\n]*|preflight: [^\n]*)", text)))
        result.put("serve", phases=phases(text), plugin_says=said)
        with server.client() as client:
            for thinking in (False, True):
                started = time.monotonic()
                answer = client.chat.completions.create(
                    model="gemma-4",
                    messages=[{"role": "user", "content": "What is the capital of France?"}],
                    max_tokens=64,
                    temperature=0,
                    extra_body={"chat_template_kwargs": {"enable_thinking": thinking}, "ignore_eos": True},
                )
                assert answer.usage is not None
                result.put(
                    "serve",
                    **{
                        f"answer_thinking_{str(thinking).lower()}": {
                            "seconds": round(time.monotonic() - started, 2),
                            "usage": answer.usage.model_dump(exclude_none=True),
                        }
                    },
                )
            result.put("serve", prefix_cache=_cold_and_cached(client, _prefix_lengths(tiny=tiny)))
        for tokens, requests in ((100, 4), (300, 3)) if tiny else ((4096, 42), (32768, 8)):
            with server.client(timeout=FIT_SECONDS * 4) as client:
                result.put("serve", **{f"at_once_{tokens}": _streams_at_once(client, tokens, requests)})
    result.put("serve", log_ends=tail(server.log, 400))


def random_prompt(length: int, numbers: random.Random) -> list[int]:
    """So many token ids: Gemma's first, then any that are no special tokens."""
    return [2, *(numbers.randrange(300, 500) for _ in range(length - 1))]


def _prefix_lengths(*, tiny: bool) -> tuple[int, ...]:
    """Tokens of the prompts that are asked cold and cached."""
    return (40, 150, 300) if tiny else (500, 1500, 3000, 4400, 6000, 9000)


def _output_of(tokens: int) -> int:
    """Of a request of so many tokens, those of its answer."""
    return min(400, tokens // 2)


def _cold_and_cached(client: Any, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Each prompt twice: tokens found in the prefix cache."""
    rows = []
    for length in lengths:
        prompt = random_prompt(length, random.Random(length))
        answers = [
            client.completions.create(
                model="gemma-4", prompt=prompt, max_tokens=OUTPUT_TOKENS, temperature=0, extra_body={"ignore_eos": True}
            )
            for _ in range(2)
        ]
        rows.append(
            {
                "prompt_tokens": length,
                "cached_tokens": [
                    (answer.usage.prompt_tokens_details and answer.usage.prompt_tokens_details.cached_tokens) or 0
                    for answer in answers
                ],
            }
        )
    return rows


def _streams_at_once(client: Any, tokens: int, requests: int) -> dict[str, Any]:
    """Of `requests` of so many tokens, prompt and output, sent together: how many had begun and not ended, at most.

    One that vLLM stopped for want of cache, to compute it anew later, counts as begun: `engine`'s count knows better.
    """
    output = _output_of(tokens)
    lock = threading.Lock()
    live = most = 0
    failed: list[str] = []

    def one(index: int) -> None:
        nonlocal live, most
        prompt = random_prompt(tokens - output - 1, random.Random(tokens + index))
        begun = False
        try:
            stream = client.completions.create(
                model="gemma-4", prompt=prompt, max_tokens=output, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in stream:
                if not begun:
                    begun = True
                    with lock:
                        live += 1
                        most = max(most, live)
        except Exception as error:
            failed.append(repr(error)[:200])
        if begun:
            with lock:
                live -= 1

    started = time.monotonic()
    threads = [threading.Thread(target=one, args=(index,)) for index in range(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "asked": requests,
        "streaming_at_once": most,
        "failed": failed,
        "seconds": round(time.monotonic() - started, 1),
    }


def engine_part(folder: Path, args: dict[str, Any], result: Result, *, tiny: bool) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from benchmarks.draft_recorder import record_drafts
    from dflash_serve.preflight.memory import estimate
    from dflash_serve.settings import Cluster, resolve
    from dflash_serve.settings.translate import engine_args

    settings = resolve(args, Cluster(cpus=1, gpus={})).settings
    arguments = engine_args(settings)
    started = time.monotonic()
    llm = LLM(model=settings.target, disable_log_stats=False, **arguments)
    result.put("engine", start_seconds=round(time.monotonic() - started, 1))

    core: Any = llm.llm_engine.engine_core
    core = core.engine_core
    cache = llm.llm_engine.vllm_config.cache_config
    kv = core.scheduler.kv_cache_manager.kv_cache_config
    # random weights draft badly, and the scheduler would soon have none of it
    core.scheduler.draft_length.force(settings.speculation.max_draft_tokens)
    result.put(
        "engine",
        memory=llm.collective_rpc(_memory)[0],
        kv_cache={
            "num_blocks": kv.num_blocks,
            "groups": len(kv.kv_cache_groups),
            "block_tokens": sorted({group.kv_cache_spec.block_size for group in kv.kv_cache_groups}),
            "page_bytes": kv.kv_cache_groups[0].kv_cache_spec.page_size_bytes,
            # groups share one pool
            "pool_bytes": kv.kv_cache_tensors[0].size,
            "vllm_tokens": cache.kv_cache_size_tokens,
            "vllm_max_concurrency": round(cache.kv_cache_max_concurrency or 0, 2),
        },
        runner="V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1",
    )
    gpu_bytes = llm.collective_rpc(_memory)[0]["total_bytes"]
    configs = [json.loads((Path(p) / "config.json").read_text()) for p in (settings.target, settings.drafter or "")]
    if gpu_bytes:
        result.put("engine", estimate=asdict(estimate(settings, configs[0], configs[1], gpu_bytes)))

    if not tiny:
        llm.collective_rpc(_randomise)
    result.put("engine", drafter=llm.collective_rpc(_conventions)[0])
    drafts = record_drafts(llm)
    _prefix_cache(llm, drafts, result, tiny=tiny)
    drafts.clear()
    for tokens, requests in ((100, 6), (300, 3)) if tiny else ((4096, 64), (32768, 10)):
        result.put("engine", **{f"fit_{tokens}": _fit(llm, tokens, requests)})


def _runner_and_drafter(worker: Any) -> tuple[Any, Any]:
    runner = worker.model_runner
    proposer = getattr(runner, "speculator", None) or runner.drafter
    return runner, proposer.model


def _memory(worker: Any) -> dict[str, int]:
    import torch

    if not torch.cuda.is_available():
        return {"total_bytes": 0}
    free, total = torch.cuda.mem_get_info()
    return {
        "total_bytes": total,
        "free_bytes": free,
        "allocated_bytes": torch.cuda.memory_allocated(),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "model_bytes": int(getattr(worker.model_runner, "model_memory_usage", 0)),
    }


def _randomise(worker: Any) -> None:
    """Weights that make outputs and drafts depend on the whole context; vLLM's dummy ones only repeat a token."""
    import torch

    runner, drafter = _runner_and_drafter(worker)
    generator = torch.Generator(device="cuda").manual_seed(0)
    seen = set()
    with torch.no_grad():
        for module in (runner.model, drafter):
            for name, parameter in module.named_parameters():
                if parameter.data_ptr() in seen:
                    continue
                seen.add(parameter.data_ptr())
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02, generator=generator)
                else:
                    # Gemma-4 does not scale its attention logits: small norms of queries and keys stand for that
                    small = module is runner.model and ("q_norm" in name or "k_norm" in name)
                    parameter.fill_(0.25 if small else 1.0)
            for name, buffer in module.named_buffers():
                if name.endswith("layer_scalar"):
                    buffer.fill_(1.0)
    drafter.model._build_fused_kv_buffers()


def _conventions(worker: Any) -> dict[str, Any]:
    """The drafter's embeddings over the looked-up ones, and its largest logit where the head alone gives more."""
    import torch

    _, drafter = _runner_and_drafter(worker)
    inner, embedding = drafter.model, drafter.model.embed_tokens
    device = embedding.weight.device
    ids = torch.arange(5, 205, device=device)
    with torch.inference_mode():
        looked_up = embedding(ids).float()
        ratio = (inner.embed_input_ids(ids).float() / looked_up)[looked_up.abs() > 1e-3]
        hidden = torch.randn(8, embedding.weight.shape[1], device=device).to(embedding.weight.dtype) * 100
        raw = (hidden.float() @ drafter.lm_head.weight[:4096].float().T).abs().max()
        capped = drafter.compute_logits(hidden).float().abs().max()
    return {
        "class": type(drafter).__module__ + "." + type(drafter).__qualname__,
        "model_class": type(inner).__qualname__,
        "shares_the_targets_embedding": any(
            p.data_ptr() == embedding.weight.data_ptr() for p in worker.model_runner.model.parameters()
        ),
        "embedding_ratio": [
            round(float(ratio.min()), 3),
            round(float(ratio.median()), 3),
            round(float(ratio.max()), 3),
        ],
        "sqrt_hidden_size": round(embedding.weight.shape[1] ** 0.5, 3),
        "normalizer": float(inner.normalizer),
        "largest_logit_of_the_head_alone": round(float(raw), 1),
        "largest_logit_of_the_drafter": round(float(capped), 3),
    }


def _prefix_cache(llm: Any, drafts: list[Any], result: Result, *, tiny: bool) -> None:
    """The same prompts cold, cached, and cold again; the third says what rounding alone changes."""
    from vllm import SamplingParams

    numbers = random.Random(0)
    lengths = _prefix_lengths(tiny=tiny)
    prompts = [random_prompt(length + 1, numbers) for length in lengths]
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False)
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in ("cold", "cached", "cold_again"):
        if name != "cached":
            llm.reset_prefix_cache()
        runs[name] = []
        for prompt in prompts:
            drafts.clear()
            (answer,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
            output = list(answer.outputs[0].token_ids)
            first = next(draft for draft in drafts if draft.position >= len(prompt))
            runs[name].append(
                {
                    "cached_tokens": answer.num_cached_tokens or 0,
                    "output": output,
                    "first_draft": first.tokens,
                    "verifications": sum(draft.position >= len(prompt) for draft in drafts),
                }
            )
    cold = runs["cold"]
    for name in ("cached", "cold_again"):
        rows = [
            {
                "prompt_tokens": length,
                "cached_tokens": other["cached_tokens"],
                "same_output_tokens": _common(one["output"], other["output"]),
                "output_tokens": len(one["output"]),
                "same_first_draft_tokens": sum(
                    a == b for a, b in zip(one["first_draft"], other["first_draft"], strict=True)
                ),
                "verifications": [one["verifications"], other["verifications"]],
            }
            for length, one, other in zip(lengths, cold, runs[name], strict=True)
        ]
        result.put("engine", **{f"prefix_cache_{name}": rows})


def _common(one: list[int], other: list[int]) -> int:
    """Tokens until the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _fit(llm: Any, tokens: int, requests: int) -> dict[str, Any]:
    """How many requests of so many tokens, prompt and output, run at once when `requests` come together."""
    from vllm import SamplingParams

    numbers = random.Random(tokens)
    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    llm.reset_prefix_cache()
    output = _output_of(tokens)
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    names = [f"fit-{tokens}-{index}" for index in range(requests)]
    for name in names:
        prompt = random_prompt(tokens - output - 1, numbers)
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    started, most, usage, all_running_at = time.monotonic(), 0, 0.0, None
    while engine.has_unfinished_requests() and time.monotonic() - started < FIT_SECONDS:
        engine.step()
        if len(scheduler.running) > most:
            most = len(scheduler.running)
            all_running_at = time.monotonic() - started
        usage = max(usage, scheduler.kv_cache_manager.usage)
    left = [name for name in names if any(name in str(request) for request in scheduler.requests)]
    engine.abort_request(list(left))
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "asked": requests,
        "most_at_once": most,
        "reached_after_s": round(all_running_at or 0, 1),
        "largest_kv_usage": round(usage, 3),
        "unfinished_after_limit": len(left),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", default="gemma4-31b-h200")
    parser.add_argument("--part", choices=("serve", "engine"), help="default: both, each in a process of its own")
    parser.add_argument("--tiny", action="store_true", help="a tiny pair on a CPU")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not options.here:
        failed = 0
        for part in [options.part] if options.part else ["serve", "engine"]:
            command = [sys.executable, "-m", "benchmarks.gemma4_gpu", *sys.argv[1:], "--part", part, "--here"]
            environment = os.environ | {"PYTHONPATH": plugin_path(folder)}
            failed |= subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        sys.exit(failed)
    result = Result(folder)
    args = settings_args(folder / "models", profile=options.profile, tiny=options.tiny)
    if options.part == "serve":
        serve_part(folder, args, result, tiny=options.tiny)
    else:
        engine_part(folder, args, result, tiny=options.tiny)


if __name__ == "__main__":
    main()
