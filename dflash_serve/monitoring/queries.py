"""PromQL for what one wants to know; rules, dashboards and `dflash-serve top` ask in these words.

A `Scope` says of what: which series, over which window, grouped by which labels. What Ray does to metrics decides how
they are written: a counter that never moved does not exist (`or 0 * …` stands in), a histogram's sum is an
approximation (means come from counters), denominators are guarded with `> 0`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dflash_serve import metrics as m
from dflash_serve.metrics import Metric

SERVER_DEPLOYMENTS = 'deployment=~"DFlashServer.*"'
"""Serve's deployments that are replicas of ours; Ray names one `DFlashServer:` and the model id."""


@dataclass(frozen=True)
class Scope:
    window: str
    """Range of a rate, such as `5m`."""
    by: tuple[str, ...] = ("model",)
    where: tuple[str, ...] = ()
    """Label matchers, such as `model=~"x"`, in our names; vLLM's stand in where its metrics are asked."""

    def per(self, *labels: str) -> Scope:
        """Grouped by more labels."""
        return replace(self, by=(*self.by, *labels))

    @property
    def grouping(self) -> str:
        return f" by ({', '.join(self.by)})" if self.by else ""


def rate(metric: Metric, scope: Scope, *more: str) -> str:
    """A counter's increase a second, summed; `more` are further label matchers."""
    return f"sum{scope.grouping} ({_over_window('rate', metric.exported_name, metric, scope, *more)})"


def now(metric: Metric, scope: Scope, aggregate: str = "sum") -> str:
    """A gauge's present value, aggregated."""
    return f"{aggregate}{scope.grouping} ({metric.exported_name}{_selector(metric, scope)})"


def quantile(q: float, metric: Metric, scope: Scope) -> str:
    rates = _over_window("rate", f"{metric.exported_name}_bucket", metric, scope)
    return f"histogram_quantile({q}, sum{scope.per('le').grouping} ({rates}))"


def buckets(metric: Metric, scope: Scope) -> str:
    """Increases of a histogram's buckets, for a heatmap."""
    return f"sum by (le) ({_over_window('increase', f'{metric.exported_name}_bucket', metric, scope)})"


def ratio(part: str, whole: str) -> str:
    """part / whole: zero where the part does not exist, nothing where the whole is zero."""
    return f"({part} or 0 * {whole}) / ({whole} > 0)"


def acceptance_length(scope: Scope) -> str:
    """Tokens per verification, bonus token included."""
    return f"1 + {ratio(rate(m.ACCEPTED_TOKENS, scope), rate(m.VERIFICATIONS, scope))}"


def class_acceptance_length(scope: Scope) -> str:
    """The same, of ended requests, by traffic class."""
    scope = scope.per("traffic_class")
    return f"1 + {ratio(rate(m.REQUEST_ACCEPTED_TOKENS, scope), rate(m.REQUEST_VERIFICATIONS, scope))}"


def draft_acceptance_ratio(scope: Scope) -> str:
    """Share of the proposed draft tokens that the target accepted."""
    return ratio(rate(m.ACCEPTED_TOKENS, scope), rate(m.DRAFT_TOKENS, scope))


def position_acceptance_ratio(scope: Scope) -> str:
    """Of the verifications that had a draft token at a position, the share that accepted it."""
    scope = scope.per("position")
    return ratio(rate(m.POSITION_ACCEPTED_TOKENS, scope), rate(m.POSITION_DRAFT_TOKENS, scope))


def rejected_tokens(scope: Scope) -> str:
    """Draft tokens a second that were checked for nothing."""
    drafted = rate(m.DRAFT_TOKENS, scope)
    return f"{drafted} - ({rate(m.ACCEPTED_TOKENS, scope)} or 0 * {drafted})"


def draft_tokens_per_verification(scope: Scope) -> str:
    """K, as it came out on average."""
    return ratio(rate(m.DRAFT_TOKENS, scope), rate(m.VERIFICATIONS, scope))


def outcome_ratio(outcome: str, scope: Scope) -> str:
    """Share of the requests that ended so."""
    return ratio(rate(m.REQUESTS, scope, f'outcome="{outcome}"'), rate(m.REQUESTS, scope))


def output_tokens(scope: Scope) -> str:
    """Tokens a second as the engine makes them."""
    return rate(m.VLLM_GENERATION_TOKENS, scope)


def prompt_tokens(scope: Scope) -> str:
    """Prompt tokens a second as the engine reads them."""
    return rate(m.VLLM_PROMPT_TOKENS, scope)


def preemptions(scope: Scope) -> str:
    """Preemptions a second."""
    return f"{rate(m.VLLM_PREEMPTIONS, scope)} or 0 * {rate(m.VLLM_GENERATION_TOKENS, scope)}"


def prefix_hit_ratio(scope: Scope) -> str:
    """Share of the prompt tokens that the prefix cache had."""
    return ratio(rate(m.VLLM_PREFIX_HITS, scope), rate(m.VLLM_PREFIX_QUERIES, scope))


def running_replicas(scope: Scope) -> str:
    """Replicas that publish: alive, with an engine."""
    return now(m.RUNNING_REQUESTS, scope, "count")


def wanted_replicas() -> str:
    return f"sum by (deployment) ({m.SERVE_TARGET_REPLICAS.exported_name}{{{SERVER_DEPLOYMENTS}}})"


def healthy_replicas() -> str:
    return f"sum by (deployment) ({m.SERVE_REPLICA_HEALTHY.exported_name}{{{SERVER_DEPLOYMENTS}}})"


def estimated_speedup(scope: Scope) -> str:
    return now(m.ESTIMATED_SPEEDUP, scope, "avg")


def autoregressive_share(scope: Scope) -> str:
    """Share of wall time that the engines spent in steps without drafting, averaged over replicas."""
    each = replace(scope, by=("model", "replica"))
    return f"avg{scope.grouping} ({rate(m.AUTOREGRESSIVE_SECONDS, each)} or 0 * {now(m.RUNNING_REQUESTS, each)})"


def realised_ratio(scope: Scope) -> str:
    """Tokens that the choices of K gave over those that they expected."""
    return ratio(rate(m.REALISED_TOKENS, scope), rate(m.EXPECTED_TOKENS, scope))


def firing_alerts() -> str:
    return 'count(ALERTS{alertname=~"DFlash.*", alertstate="firing"}) or vector(0)'


_VLLM_NAMES = {"model": "model_name", "replica": "ReplicaId"}


def _over_window(function: str, series: str, metric: Metric, scope: Scope, *more: str) -> str:
    query = f"{function}({series}{_selector(metric, scope, *more)}[{scope.window}])"
    if metric.origin == "vLLM":
        for label in scope.by:
            if label in _VLLM_NAMES:
                query = f'label_replace({query}, "{label}", "$1", "{_VLLM_NAMES[label]}", "(.*)")'
    return query


def _selector(metric: Metric, scope: Scope, *more: str) -> str:
    """`{…}` of the scope, in the words of the metric's exporter; empty when there is nothing to match."""
    matchers = [*scope.where, *more]
    if metric.origin == "vLLM":
        matchers = [re.sub(r"^\w+", lambda name: _VLLM_NAMES.get(name[0], name[0]), matcher) for matcher in matchers]
    return f"{{{', '.join(matchers)}}}" if matchers else ""
