"""The typed model of `args` in serve_config.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class SettingsError(ValueError):
    """One line a problem: `field: what is wrong; how to mend it`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class Speculation(_Section):
    mode: Literal["fixed", "off"] = "fixed"
    """`fixed`: every step drafts `num_draft_tokens`. `off`: autoregressive, no drafter is loaded."""

    num_draft_tokens: int = Field(15, ge=1)
    """Draft tokens (K) that a verification checks; at most the drafter's `block_size` - 1."""

    attention_backend: str | None = None
    """The drafter's attention backend (vLLM's name); it must do non-causal attention. Null: vLLM chooses."""

    options: dict[str, Any] = {}
    """Any further field of vLLM's `speculative_config`, such as `rejection_sample_method`."""


class Hardware(_Section):
    accelerator: str = "cpu"
    """`cpu`, or a GPU by Ray's name: B300, B200, H200, H100, …"""

    gpus_per_replica: int = Field(1, ge=1)
    """GPUs of one replica (tensor parallel size); not used on CPU."""

    cpus_per_replica: float = Field(1, gt=0)
    """CPUs that Ray reserves for one replica; may be a fraction."""

    kv_cache_gib: float | None = Field(None, gt=0)
    """CPU only: memory of one replica's KV cache in GiB (`VLLM_CPU_KVCACHE_SPACE`)."""

    omp_threads: int | None = Field(None, ge=1)
    """CPU only: threads of one replica's engine."""

    @property
    def is_cpu(self) -> bool:
        return self.accelerator == "cpu"


class Autoscaling(_Section):
    min_replicas: int = Field(1, ge=0)
    """Replicas kept when idle. 0: the first request after a pause waits for a cold start."""

    max_replicas: int = Field(1, ge=1)
    """Most replicas, one an accelerator."""

    initial_replicas: int | None = Field(None, ge=0)
    """Replicas at the start; null: `min_replicas`."""

    target_ongoing_requests: float = Field(24, gt=0)
    """Requests in flight a replica above which another one starts, below which one stops."""

    upscale_delay_s: float = Field(15, ge=0)
    """Seconds that load must stay high."""

    downscale_delay_s: float = Field(600, ge=0)
    """Seconds that load must stay low."""

    @model_validator(mode="after")
    def _bounds(self) -> Autoscaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas}); raise the one or "
                "lower the other"
            )
        return self


class Routing(_Section):
    policy: Literal["load_aware", "prefix_aware"] = "load_aware"
    """`load_aware`: the replica with the fewest requests in flight. `prefix_aware`: the one that has seen the longest
    prefix of the prompt, while load is even (Ray's PrefixCacheAffinityRouter)."""


class Limits(_Section):
    max_concurrent_requests: int = Field(128, ge=1)
    """Requests in flight in one replica; above it clients get 429 with Retry-After."""

    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024)
    """Largest request body in bytes; above it 413."""

    max_output_tokens: int | None = Field(None, ge=1)
    """Most output tokens of a request, also of one that names none. Null: what the context leaves."""

    max_n: int = Field(8, ge=1)
    """Most choices (`n`) of a request."""

    max_stream_seconds: float = Field(900, gt=0)
    """The longest that a request may run when its replica is being stopped: how long draining waits for it."""


class Auth(_Section):
    keys_env: str | None = None
    """Environment variable that holds the API keys, separated by commas or line breaks."""

    keys_file: str | None = None
    """File that holds the API keys, one a line; read again when it changes."""

    anonymous: Literal["loopback", "anywhere"] = "loopback"
    """Without keys: who is served. `loopback`: this machine alone. `anywhere`: anybody who can connect."""

    @property
    def has_keys(self) -> bool:
        return self.keys_env is not None or self.keys_file is not None


class Metrics(_Section):
    acceptance_window_seconds: float = Field(60, ge=1)
    """Window of the acceptance-length gauge, in seconds."""


class Settings(_Section):
    """Everything that may stand under `args`, `profile` apart."""

    model_id: str | None = None
    """The name that clients use; null: `target`."""

    target: Annotated[str, Field(min_length=1)]
    """The model: a Hugging Face name, a local folder, a bucket URL, or `demo:smollm2-135m-instruct`."""

    target_revision: str | None = None
    """Branch, tag or commit of the target on the hub; pin a commit in production."""

    drafter: str | None = None
    """The target's DFlash drafter: a Hugging Face name, a local folder, or `demo:smollm2-135m-dflash`."""

    drafter_revision: str | None = None
    """Branch, tag or commit of the drafter on the hub."""

    speculation: Speculation = Speculation()
    """How the drafter is used."""

    hardware: Hardware = Hardware()
    """What one replica runs on."""

    autoscaling: Autoscaling = Autoscaling()
    """How many replicas."""

    routing: Routing = Routing()
    """Which replica a request goes to."""

    limits: Limits = Limits()
    """What one request, and all of them together, may ask for."""

    auth: Auth = Auth()
    """Who may call."""

    metrics: Metrics = Metrics()
    """What is measured."""

    engine: dict[str, Any] = {}
    """Any vLLM engine argument, by its Python name."""

    @property
    def served_name(self) -> str:
        return self.model_id or self.target

    @property
    def speculates(self) -> bool:
        return self.speculation.mode != "off"


MENDS = {
    "api_key": "keys do not belong into a configuration; name the variable that holds them in auth.keys_env",
    "auth.api_key": "keys do not belong into a configuration; name the variable that holds them in auth.keys_env",
    "auth.api_keys": "keys do not belong into a configuration; name the variable that holds them in auth.keys_env",
    "auth.keys": "keys do not belong into a configuration; name the variable that holds them in auth.keys_env",
    "num_speculative_tokens": "it is speculation.num_draft_tokens here",
    "speculative_config": "use drafter and speculation",
    "model": "it is target here",
}
"""Settings that people try and that live elsewhere."""

OWNED_ENGINE_ARGUMENTS = {
    "model": "set target",
    "tokenizer": "the target's is used",
    "served_model_name": "set model_id",
    "revision": "set target_revision",
    "speculative_config": "set drafter and speculation",
    "api_key": "name the variable that holds the keys in auth.keys_env",
    "middleware": "the gateway is the middleware; see limits and auth",
    "tensor_parallel_size": "set hardware.gpus_per_replica",
    "override_generation_config.max_new_tokens": "set limits.max_output_tokens",
}
"""Engine arguments that other settings stand for, and which."""


def parse(values: Mapping[str, Any]) -> Settings:
    """Validate settings. Raises SettingsError with every problem."""
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError([_explain(dict(problem)) for problem in error.errors()]) from None
    problems = [
        f"engine.{name}: not here; {mend}"
        for name, mend in OWNED_ENGINE_ARGUMENTS.items()
        if _has(settings.engine, name)
    ]
    if settings.speculates and settings.drafter is None:
        problems.append("drafter: missing; name the target's DFlash drafter or set speculation.mode: off")
    if settings.hardware.is_cpu and settings.hardware.gpus_per_replica != 1:
        problems.append("hardware.gpus_per_replica: not used with accelerator: cpu; leave it out")
    if not settings.hardware.is_cpu and settings.hardware.kv_cache_gib is not None:
        problems.append("hardware.kv_cache_gib: for accelerator: cpu only; set engine.gpu_memory_utilization instead")
    if problems:
        raise SettingsError(problems)
    return settings


def _has(values: Mapping[str, Any], dotted: str) -> bool:
    head, _, rest = dotted.partition(".")
    if head not in values:
        return False
    return not rest or (isinstance(values[head], Mapping) and _has(values[head], rest))


def _explain(problem: dict[str, Any]) -> str:
    """One of pydantic's errors in our words."""
    path = ".".join(str(part) for part in problem["loc"]) or "args"
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown setting; {MENDS.get(path) or _nearest(problem['loc'])}"
    if problem["type"] == "missing":
        return f"{path}: missing; set it, or name a profile that has it"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict) else f"; it is {problem['input']!r}"
    return f"{path}: {message[0].lower()}{message[1:]}{given}"


def _nearest(location: tuple[str | int, ...]) -> str:
    section: Any = Settings
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation
    names = list(section.model_fields) + (["profile"] if section is Settings else [])
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(names)}"
