"""The typed model of `args` in serve_config.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dflash_serve import demo
from dflash_serve.hardware import ACCELERATORS, CPU, accelerator_named
from dflash_serve.metrics import MAX_TRAFFIC_CLASSES
from dflash_serve.speculation import step_cost

REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://")
"""A bucket URL (s3://, gs://, …); a hub name or a path has no scheme."""


class _Section(BaseModel):
    # strict: `max_n: true` is not 1, and "8" in quotes is not 8
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Speculation(_Section):
    mode: Literal["adaptive", "fixed", "off"] = "adaptive"
    """`adaptive`: each step verifies as many draft tokens as give the most tokens a second at its load, none if drafts
    do not pay. `fixed`: each verifies `max_draft_tokens`. `off`: autoregressive, no drafter is loaded."""

    max_draft_tokens: int = Field(default=15, ge=1)
    """Most draft tokens (K) that a verification checks; at most the drafter's `block_size` - 1."""

    draft_token_choices: list[int] | None = Field(default=None, min_length=1)
    """Adaptive: the K to choose from, rising; 0 leaves the drafter out. `max_draft_tokens` is always among them, and
    nothing above it. Each K has CUDA graphs of its own: name few. Null: a spread from 0 to `max_draft_tokens`."""

    step_costs: str | None = None
    """Adaptive: what an engine step takes, to begin with: the name of a bundled surface, or the path of a file that
    `dflash-serve calibrate` wrote. The engine's own steps correct it. Null: a guess."""

    exploration: float = Field(default=0.005, ge=0, le=0.1)
    """Adaptive: share of the engine's time that may be lost to trying other K."""

    attention_backend: str | None = None
    """The drafter's attention backend (vLLM's name); it must do non-causal attention. Null: vLLM chooses."""

    options: dict[str, Any] = {}
    """Any further field of vLLM's `speculative_config`, such as `rejection_sample_method`: `standard` and `block` keep
    the target's distribution, `synthetic` accepts at a given rate whatever was drafted, for load tests alone."""

    @field_validator("draft_token_choices")
    @classmethod
    def _rises(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (value != sorted(set(value)) or value[0] < 0 or value[-1] < 1):
            raise ValueError("must rise from 0 or more to 1 or more, such as [0, 3, 7, 15]; sort it")
        return value

    @field_validator("step_costs")
    @classmethod
    def _is_a_surface(cls, value: str | None) -> str | None:
        if value is not None:
            step_cost.load(value)
        return value

    @field_validator("mode", mode="before")
    @classmethod
    def _yaml_off(cls, value: object) -> object:
        # YAML 1.1 reads a bare `off` as false
        return "off" if value is False else value


class Hardware(_Section):
    accelerator: str = CPU
    """`cpu`, or the GPU by Ray's name: B300, B200, H200, H100, …; `gpu` takes any GPU."""

    gpus_per_replica: int = Field(default=1, ge=1)
    """GPUs of one replica, on one node (tensor parallel size); not used on CPU."""

    cpus_per_replica: float = Field(default=1, gt=0)
    """CPUs that Ray reserves for one replica; may be a fraction. A reservation, not a limit on threads."""

    kv_cache_gib: int | None = Field(default=None, ge=1)
    """CPU only: memory of one replica's KV cache in GiB (`VLLM_CPU_KVCACHE_SPACE`, which takes whole numbers). Null:
    vLLM takes a large share of the machine's memory."""

    omp_threads: int | None = Field(default=None, ge=1)
    """CPU only: threads of one replica's engine. Null: one a core."""

    @field_validator("accelerator")
    @classmethod
    def _known_accelerator(cls, value: str) -> str:
        known = accelerator_named(value)
        if known is None:
            raise ValueError(f"unknown accelerator; set one of {', '.join(ACCELERATORS)}")
        return known

    @property
    def is_cpu(self) -> bool:
        return self.accelerator == CPU


class Autoscaling(_Section):
    min_replicas: int = Field(default=1, ge=0)
    """Replicas kept when idle. 0: the first request after a pause waits for a cold start."""

    max_replicas: int = Field(default=1, ge=1)
    """Most replicas. Ray adds nodes for them only where its autoscaler runs."""

    initial_replicas: int | None = Field(default=None, ge=0)
    """Replicas at the start. Null: `min_replicas`, but at least one."""

    target_ongoing_requests: float = Field(default=24, gt=0)
    """Requests in flight a replica, averaged, above which replicas are added and below which they are taken away."""

    upscale_delay_s: float = Field(default=15, ge=0)
    """Seconds that load must stay high before replicas are added."""

    downscale_delay_s: float = Field(default=600, ge=0)
    """Seconds that load must stay low before replicas are taken away; loading a model again is slow."""

    max_surge_percent: int = Field(default=0, ge=0, le=100)
    """Replicas added while others are replaced after a change, in percent of those that run, rounded up. Each takes a
    GPU of its own for that time; without a free one the change waits. 0: one stops before its successor starts."""

    @property
    def replicas_at_start(self) -> int:
        return max(self.min_replicas, 1) if self.initial_replicas is None else self.initial_replicas


class Routing(_Section):
    policy: Literal["load_aware", "prefix_aware"] = "load_aware"
    """`load_aware`: the replica with the fewest requests in flight, as the proxy that has the request knows it: HAProxy
    counts its own, Serve's proxy hears from the replicas each second. `prefix_aware` is refused: Ray 2.60's router for
    it is not told what it needs."""


class Limits(_Section):
    max_concurrent_requests: int = Field(default=128, ge=1)
    """Requests in flight in one replica; above it clients get 429 with Retry-After."""

    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)
    """Largest request body in bytes; above it 413."""

    max_output_tokens: int | None = Field(default=None, ge=1)
    """Most output tokens of a request, also of one that names none. Null: what the context leaves."""

    max_n: int = Field(default=8, ge=1)
    """Most choices (`n`) of a request."""

    max_stream_seconds: float = Field(default=900, gt=0)
    """The longest that a request may run when its replica is being stopped: how long draining waits for it."""


class Auth(_Section):
    keys_env: str | None = None
    """Name of the environment variable that holds the API keys, separated by commas or line breaks."""

    keys_file: str | None = None
    """Path of the file that holds the API keys, one a line; read again when it changes."""

    anonymous: Literal["loopback", "anywhere"] = "loopback"
    """Without keys: who is served. `loopback`: this machine alone. `anywhere`: anybody who can connect."""

    @field_validator("keys_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("must be the name of an environment variable, not the keys; set the keys in that variable")
        return value

    @property
    def has_keys(self) -> bool:
        return self.keys_env is not None or self.keys_file is not None


class Metrics(_Section):
    acceptance_window_seconds: float = Field(default=60, ge=1)
    """Window of the acceptance-length gauge, in seconds."""

    traffic_classes: list[str] = Field(default=[], max_length=MAX_TRAFFIC_CLASSES)
    """Names by which metrics and the access log tell requests apart, such as `[chat, batch]`. Each multiplies the
    series of a request metric; a request that names none of them is `other`."""

    traffic_class_header: str = "x-dflash-traffic-class"
    """The request header, in lower case, that names the class."""

    traffic_class_keys: dict[str, str] = {}
    """SHA-256 of an API key, in hex, to the class of all requests with that key, whatever their header says:
    `printf %s "$KEY" | sha256sum`."""

    otlp_traces_endpoint: str | None = None
    """OpenTelemetry collector that gets a span for each request from the engine, such as `http://collector:4317`.
    Null: no traces."""

    otlp_traces_protocol: Literal["grpc", "http/protobuf"] = "grpc"
    """How the collector is spoken to: `grpc` (port 4317 by custom) or `http/protobuf` (port 4318 and the path
    `/v1/traces`)."""

    @field_validator("traffic_classes")
    @classmethod
    def _are_labels(cls, value: list[str]) -> list[str]:
        if not all(re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name) for name in value):
            raise ValueError("each must begin with a letter and hold at most 32 of a-z, 0-9, _ and -; rename it")
        return value

    @field_validator("traffic_class_header")
    @classmethod
    def _is_a_header(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", value):
            raise ValueError("must be a header's name in lower case (a-z, 0-9, -); rename it")
        return value

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/\s]+\S*", value):
            raise ValueError("must be a URL such as http://collector:4317; mend it")
        return value

    @field_validator("traffic_class_keys")
    @classmethod
    def _are_digests(cls, value: dict[str, str]) -> dict[str, str]:
        if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in value):
            raise ValueError('every name must be a SHA-256 in hex, not a key; use `printf %s "$KEY" | sha256sum`')
        return value


class Settings(_Section):
    """Everything that may stand under `args`, `profile` apart."""

    model_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@+-]*$")
    """The name that clients use. Null: the target's hub name, or the last part of its path."""

    target: Annotated[str, Field(min_length=1)]
    """The model: a Hugging Face name, a local folder, a bucket URL, or `demo:smollm2-135m-instruct`. Another target
    than the profile's needs its own `drafter`."""

    target_revision: str | None = None
    """Branch, tag or commit of the target on the hub; pin a commit in production."""

    drafter: str | None = None
    """The target's DFlash drafter: a Hugging Face name, a local folder, or `demo:smollm2-135m-dflash`."""

    drafter_revision: str | None = None
    """Branch, tag or commit of the drafter on the hub; pin a commit in production."""

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
    """Any vLLM engine argument, by its Python name, laid over the profile's; null takes out what the profile sets."""

    @property
    def served_name(self) -> str:
        """The name that clients use."""
        if self.model_id is not None:
            return self.model_id
        if self.target.startswith(("/", ".")) or REMOTE.match(self.target):
            return self.target.rstrip("/").rsplit("/", 1)[-1]
        return self.target.removeprefix(demo.PREFIX)

    @property
    def speculates(self) -> bool:
        return self.speculation.mode != "off"

    @property
    def adapts(self) -> bool:
        """Whether the draft length is chosen at each step."""
        return self.speculation.mode == "adaptive"
