"""Metrics of the adaptive choice of draft length that are agreed on and not exported yet.

Rules and panels use them by name through `metric()`; they light up when `dflash_serve.metrics` has them. Then this list
goes.
"""

from __future__ import annotations

from dflash_serve.metrics import CATALOGUE, Metric

AWAITED: tuple[Metric, ...] = (
    Metric(
        "dflash_chosen_draft_tokens",
        "histogram",
        "Draft tokens (K) chosen for an engine step that decodes.",
        boundaries=(0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15),
    ),
    Metric("dflash_expected_tokens", "counter", "Tokens that the choices of K expected."),
    Metric("dflash_realised_tokens", "counter", "Tokens that the same steps gave."),
    Metric("dflash_step_cost_error_ratio", "gauge", "Relative error of the step-cost model, a decayed mean."),
    Metric(
        "dflash_autoregressive_seconds", "counter", "Engine time in steps at K = 0 while speculation is configured."
    ),
    Metric("dflash_estimated_speedup_ratio", "gauge", "Estimated tokens/s over autoregressive at the present load."),
    Metric("dflash_drafter_unprofitable", "gauge", "1 while the best choice is K = 0: the drafter does not pay."),
)


def metric(name: str) -> Metric:
    """A metric of the catalogue, or an awaited one, by name; KeyError for any other."""
    return {known.name: known for known in (*AWAITED, *CATALOGUE)}[name]


def is_awaited(query: str) -> bool:
    """Whether a query uses a metric that nothing exports yet."""
    exported = {known.name for known in CATALOGUE}
    return any(known.name in query for known in AWAITED if known.name not in exported)
