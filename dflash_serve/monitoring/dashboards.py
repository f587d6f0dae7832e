"""Grafana dashboards as code: monitoring/dashboards/*.json are what this makes.

Three: the fleet, what speculation does, one replica closely. Needs grafana-foundation-sdk (development only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueGraphMode,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    SortOrder,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableHide,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dflash_serve import metrics as m
from dflash_serve.monitoring import queries as q
from dflash_serve.monitoring.queries import Scope
from dflash_serve.monitoring.rules import RuleParameters

TAG = "dflash-serve"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
MATCHERS = ('model=~"$model"', 'replica=~"$replica"')
MODEL = Scope("$__rate_interval", where=MATCHERS)
REPLICA = MODEL.per("replica")
STAT_HEIGHT = 4
HEIGHT = 8
RULES = RuleParameters()

Panel = stat.Panel | timeseries.Panel | bargauge.Panel | heatmap.Panel


@dataclass(frozen=True)
class Query:
    expression: str
    legend: str = "{{model}}"


def _finish(panel: Any, title: str, about: str, unit: str, width: int, height: int) -> Any:
    return panel.title(title).description(about).unit(unit).datasource(SOURCE).span(width).height(height)


def _target(query: Query, index: int, *, heat: bool = False) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(chr(ord("A") + index))
    target = target.datasource(SOURCE)
    if heat:
        target = target.format(PromQueryFormat.HEATMAP).legend_format("{{le}}")
    return target.range()


def _thresholds(*steps: tuple[float | None, str]) -> dashboard.ThresholdsConfig:
    marks = [Threshold(value, color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(marks)


PLAIN = ((None, "blue"),)


def number(
    title: str,
    about: str,
    unit: str,
    expression: str,
    *,
    width: int = 3,
    decimals: int | None = None,
    steps: tuple[tuple[float | None, str], ...] = PLAIN,
) -> stat.Panel:
    """One figure with its recent course."""
    panel = _finish(stat.Panel(), title, about, unit, width, STAT_HEIGHT)
    panel = panel.graph_mode(BigValueGraphMode.AREA).thresholds(_thresholds(*steps))
    if decimals is not None:
        panel = panel.decimals(decimals)
    result: stat.Panel = panel.with_target(_target(Query(expression, ""), 0))
    return result


def lines(
    title: str,
    about: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    top: float | None = None,
    mark: float | None = None,
) -> timeseries.Panel:
    """Course over time; `mark` draws a line at a threshold."""
    panel = _finish(timeseries.Panel(), title, about, unit, width, HEIGHT)
    panel = panel.min(0).fill_opacity(10).show_points(VisibilityMode.NEVER)
    panel = panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = panel.legend(legend.show_legend(True))
    if top is not None:
        panel = panel.max(top)
    if mark is not None:
        panel = panel.thresholds(_thresholds((None, "green"), (mark, "red")))
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    for index, query in enumerate(queries):
        panel = panel.with_target(_target(query, index))
    result: timeseries.Panel = panel
    return result


def bars(
    title: str, about: str, unit: str, query: Query, *, width: int = 8, top: float | None = None
) -> bargauge.Panel:
    """The present values side by side."""
    panel = _finish(bargauge.Panel(), title, about, unit, width, HEIGHT).min(0).thresholds(_thresholds(*PLAIN))
    panel = panel.orientation(VizOrientation.VERTICAL).display_mode(BarGaugeDisplayMode.BASIC)
    if top is not None:
        panel = panel.max(top)
    # a range, of which the bars show the last values: its series come sorted by label, an instant vector's do not
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    result: bargauge.Panel = panel.reduce_options(last).with_target(_target(query, 0))
    return result


def heat(title: str, about: str, unit: str, expression: str, *, width: int = 8) -> heatmap.Panel:
    """A histogram's buckets over time."""
    panel = _finish(heatmap.Panel(), title, about, unit, width, HEIGHT).calculate(False)
    panel = panel.y_axis(heatmap.YAxisConfig().unit(unit))
    panel = panel.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LINEAR))
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").reverse(True).steps(64)
    result: heatmap.Panel = panel.color(color).with_target(_target(Query(expression), 0, heat=True))
    return result


def _over_models(expression: str, aggregate: str = "sum") -> str:
    """One figure over the chosen models."""
    return f"{aggregate}({expression})"


def _percentiles(metric: m.Metric, scope: Scope) -> list[Query]:
    return [Query(q.quantile(x, metric, scope), f"{{{{model}}}} p{x * 100:.0f}") for x in (0.5, 0.95, 0.99)]


ACCEPTANCE_STEPS = ((None, "red"), (RULES.acceptance_floor, "orange"), (1.5, "green"))
ACCEPTANCE_ABOUT = (
    "Tokens per verification, the bonus token included: 1 means that every draft token was rejected. "
    "Dashed: below it no drafter pays."
)
WAIT_ABOUT = (
    "How long requests waited in the engine before they ran. vLLM's first bucket ends at 0.3 s: a value below that "
    "means 0.3 s at most."
)
NOTHING = Scope("$__rate_interval", by=(), where=MATCHERS)
"""Over all chosen models and replicas."""


def fleet() -> dashboard.Dashboard:
    error_steps = ((None, "green"), (RULES.error_ratio, "red"))
    shed_steps = ((None, "green"), (RULES.shed_ratio, "red"))
    kv_steps = ((None, "green"), (0.8, "orange"), (RULES.kv_cache_usage_ratio, "red"))
    result = _dashboard("dflash-fleet", "DFlash / Fleet", "Is the fleet well, and what does it serve?")
    return _with(
        result,
        (
            "",
            number(
                "Replicas running", "Replicas that publish metrics.", "short", _over_models(q.running_replicas(MODEL))
            ),
            number("Replicas wanted", "What the autoscaler asks for.", "short", _over_models(q.wanted_replicas())),
            number("Output", "Tokens that the engines make.", "tok/s", q.output_tokens(NOTHING), decimals=1),
            number(
                "Requests", "Requests that ended, however they did.", "reqps", q.rate(m.REQUESTS, NOTHING), decimals=2
            ),
            number(
                "Errors",
                "Share of requests that ended with a 5xx or a broken stream.",
                "percentunit",
                q.outcome_ratio("error", NOTHING),
                decimals=1,
                steps=error_steps,
            ),
            number(
                "Shed",
                "Share of requests refused with 429 because the replica was full.",
                "percentunit",
                q.outcome_ratio("shed", NOTHING),
                decimals=1,
                steps=shed_steps,
            ),
            number(
                "Acceptance length",
                ACCEPTANCE_ABOUT,
                "short",
                q.acceptance_length(NOTHING),
                decimals=2,
                steps=ACCEPTANCE_STEPS,
            ),
            number(
                "Alerts firing",
                "Alerts of dflash-serve that fire now.",
                "short",
                q.firing_alerts(),
                steps=((None, "green"), (1, "red")),
            ),
        ),
        (
            "Traffic",
            lines("Output tokens", "Tokens that the engines make.", "tok/s", Query(q.output_tokens(MODEL))),
            lines("Prompt tokens", "Prompt tokens that the engines read.", "tok/s", Query(q.prompt_tokens(MODEL))),
            lines(
                "Requests by outcome",
                "ok; shed: 429, the replica was full; rejected: another 4xx; error: 5xx or a broken stream; "
                "disconnected: the client left.",
                "reqps",
                Query(q.rate(m.REQUESTS, Scope(MODEL.window, ("outcome",), MATCHERS)), "{{outcome}}"),
            ),
            lines(
                "Output by traffic class",
                "Tokens of ended requests, by the classes of metrics.traffic_classes.",
                "tok/s",
                Query(
                    q.rate(m.COMPLETION_TOKENS, Scope(MODEL.window, ("traffic_class",), MATCHERS)), "{{traffic_class}}"
                ),
            ),
            lines(
                "Time to first token by traffic class, p95",
                "Streams: arrival at the replica to the first output.",
                "s",
                Query(q.quantile(0.95, m.TTFT, Scope(MODEL.window, ("traffic_class",), MATCHERS)), "{{traffic_class}}"),
            ),
            lines(
                "Estimated speed-up",
                "Tokens/s over what the target alone would give at the present load, as the replicas estimate it.",
                "short",
                Query(q.estimated_speedup(MODEL)),
                mark=1,
            ),
        ),
        (
            "Latency",
            lines(
                "Time to first token",
                "Streams: arrival at the replica to the first output.",
                "s",
                *_percentiles(m.TTFT, MODEL),
            ),
            lines(
                "Time per output token",
                "Streams: mean time between tokens, the first apart.",
                "s",
                *_percentiles(m.TPOT, MODEL),
            ),
            lines(
                "Wait for the engine",
                WAIT_ABOUT,
                "s",
                *_percentiles(m.VLLM_QUEUE_TIME, MODEL),
            ),
        ),
        (
            "Capacity",
            lines(
                "Replicas",
                "Wanted by the autoscaler, healthy by Ray Serve.",
                "short",
                Query(q.wanted_replicas(), "{{deployment}} wanted"),
                Query(q.healthy_replicas(), "{{deployment}} healthy"),
                width=6,
            ),
            lines(
                "Requests in the engines",
                "Running: in the batch. Waiting: for a place in it.",
                "short",
                Query(q.now(m.RUNNING_REQUESTS, MODEL), "{{model}} running"),
                Query(q.now(m.WAITING_REQUESTS, MODEL), "{{model}} waiting"),
                width=6,
            ),
            lines(
                "KV cache in use",
                "The fullest replicas come first to their limit.",
                "percentunit",
                Query(q.now(m.KV_CACHE_USAGE, REPLICA, "max"), "{{replica}}"),
                width=6,
                top=1,
                mark=kv_steps[-1][0],
            ),
            lines(
                "Start of a replica",
                "From a replica's constructor to its loaded engine.",
                "s",
                Query(q.now(m.START_SECONDS, REPLICA, "max"), "{{replica}}"),
                width=6,
            ),
        ),
    )


def speculation() -> dashboard.Dashboard:
    scope = Scope(MODEL.window, (), MATCHERS)
    result = _dashboard(
        "dflash-speculation", "DFlash / Speculation", "What does drafting bring, and what does it cost?"
    )
    return _with(
        result,
        (
            "",
            number(
                "Acceptance length",
                ACCEPTANCE_ABOUT,
                "short",
                q.acceptance_length(scope),
                width=4,
                decimals=2,
                steps=ACCEPTANCE_STEPS,
            ),
            number(
                "Accepted",
                "Share of the draft tokens that the target accepted.",
                "percentunit",
                q.draft_acceptance_ratio(scope),
                width=4,
                decimals=1,
            ),
            number(
                "Rejected",
                "Draft tokens checked for nothing, a second.",
                "tok/s",
                q.rejected_tokens(scope),
                width=4,
                decimals=0,
            ),
            number(
                "Draft tokens per verification",
                "K, as it came out on average.",
                "short",
                q.draft_tokens_per_verification(scope),
                width=4,
                decimals=1,
            ),
            number(
                "Estimated speed-up",
                "Tokens/s over what the target alone would give at the present load.",
                "short",
                _over_models(q.estimated_speedup(MODEL), "avg"),
                width=4,
                decimals=2,
                steps=((None, "red"), (1, "orange"), (1.2, "green")),
            ),
            number(
                "Drafter does not pay",
                "Share of the replicas whose best choice is not to draft.",
                "percentunit",
                f"avg({q.now(m.DRAFTER_UNPROFITABLE, MODEL, 'avg')})",
                width=4,
                steps=((None, "green"), (0.5, "red")),
            ),
        ),
        (
            "Acceptance",
            bars(
                "Acceptance by position",
                "Of the verifications that had a draft token at a position, the share that accepted it.",
                "percentunit",
                Query(
                    f"sort(sum by (position) ({q.position_acceptance_ratio(Scope('5m', (), MATCHERS))}))",
                    "{{position}}",
                ),
                top=1,
            ),
            lines(
                "Acceptance length",
                ACCEPTANCE_ABOUT,
                "short",
                Query(q.acceptance_length(MODEL)),
                mark=RULES.acceptance_floor,
            ),
            heat(
                "Acceptance length of requests",
                "Finished requests by their acceptance length.",
                "short",
                q.buckets(m.REQUEST_ACCEPTANCE_LENGTH, MODEL),
            ),
            lines(
                "Acceptance by position over time",
                "A fall at 01 points to a drafter that does not fit; later positions fall first on hard text.",
                "percentunit",
                Query(q.position_acceptance_ratio(scope), "{{position}}"),
                top=1,
            ),
            lines(
                "Acceptance length by traffic class",
                "Of ended requests, by the classes of metrics.traffic_classes.",
                "short",
                Query(q.class_acceptance_length(scope), "{{traffic_class}}"),
            ),
            lines(
                "Acceptance length by replica",
                "One replica apart from the others has other weights or other traffic.",
                "short",
                Query(q.acceptance_length(REPLICA), "{{replica}}"),
            ),
        ),
        (
            "Work",
            lines(
                "Draft tokens",
                "Proposed, accepted, rejected. Rejected ones were computed for nothing.",
                "tok/s",
                Query(q.rate(m.DRAFT_TOKENS, scope), "proposed"),
                Query(f"{q.rate(m.ACCEPTED_TOKENS, scope)} or 0 * {q.rate(m.DRAFT_TOKENS, scope)}", "accepted"),
                Query(q.rejected_tokens(scope), "rejected"),
            ),
            lines(
                "Tokens and verifications",
                "Output tokens over verifications is what a target pass yields.",
                "short",
                Query(q.output_tokens(scope), "output tokens/s"),
                Query(q.rate(m.VERIFICATIONS, scope), "verifications/s"),
            ),
            lines(
                "Draft tokens per verification",
                "K, as it came out on average.",
                "short",
                Query(q.draft_tokens_per_verification(MODEL)),
            ),
        ),
        (
            "Choice of K",
            heat(
                "Chosen K",
                "Engine steps by the draft length that was chosen.",
                "short",
                q.buckets(m.CHOSEN_DRAFT_TOKENS, MODEL),
            ),
            lines(
                "Estimated speed-up",
                "Tokens/s over what the target alone would give at the present load. Dashed: nothing gained.",
                "short",
                Query(q.estimated_speedup(MODEL)),
                mark=1,
            ),
            lines(
                "Time without drafting",
                "Share of time in steps at K = 0 while speculation is configured.",
                "percentunit",
                Query(q.autoregressive_share(MODEL)),
                top=1,
            ),
            lines(
                "Realised over expected tokens",
                "Tokens that the choices of K gave, over those that they expected: 1 is a good estimate.",
                "short",
                Query(q.realised_ratio(MODEL)),
            ),
            lines(
                "Step-cost error",
                "Relative error of the step-cost model that the choice rests on.",
                "percentunit",
                Query(q.now(m.STEP_COST_ERROR, REPLICA, "max"), "{{replica}}"),
            ),
        ),
    )


def replica() -> dashboard.Dashboard:
    result = _dashboard("dflash-replica", "DFlash / Replica", "One replica, or a few side by side.")
    each = "{{replica}}"
    nodes = (
        f'label_replace({m.RUNNING_REQUESTS.exported_name}{{{", ".join(MATCHERS)}}}, "ip", "$1", "NodeAddress", "(.*)")'
    )

    def node(metric: m.Metric) -> Query:
        return Query(f"max by (ip) ({metric.exported_name} and on (ip) {nodes})", "{{ip}}")

    return _with(
        result,
        (
            "",
            number("Running", "Requests in the batch.", "short", q.now(m.RUNNING_REQUESTS, NOTHING), width=4),
            number(
                "Waiting", "Requests that wait for the engine.", "short", q.now(m.WAITING_REQUESTS, NOTHING), width=4
            ),
            number(
                "KV cache",
                "Share in use; the fullest of the chosen replicas.",
                "percentunit",
                q.now(m.KV_CACHE_USAGE, NOTHING, "max"),
                width=4,
                decimals=1,
                steps=((None, "green"), (0.8, "orange"), (RULES.kv_cache_usage_ratio, "red")),
            ),
            number("Output", "Tokens that the engine makes.", "tok/s", q.output_tokens(NOTHING), width=4, decimals=1),
            number(
                "Acceptance length",
                ACCEPTANCE_ABOUT,
                "short",
                q.acceptance_length(NOTHING),
                width=4,
                decimals=2,
                steps=ACCEPTANCE_STEPS,
            ),
            number(
                "Start",
                "From the constructor to a loaded engine; the slowest of the chosen replicas.",
                "s",
                q.now(m.START_SECONDS, NOTHING, "max"),
                width=4,
                decimals=0,
            ),
        ),
        (
            "Load",
            lines("Output tokens", "Tokens that the engine makes.", "tok/s", Query(q.output_tokens(REPLICA), each)),
            lines(
                "Requests in the engine",
                "Running and waiting.",
                "short",
                Query(q.now(m.RUNNING_REQUESTS, REPLICA), f"{each} running"),
                Query(q.now(m.WAITING_REQUESTS, REPLICA), f"{each} waiting"),
            ),
            lines(
                "Requests by outcome",
                "As they ended.",
                "reqps",
                Query(q.rate(m.REQUESTS, REPLICA.per("outcome")), f"{each} {{{{outcome}}}}"),
            ),
            lines(
                "KV cache in use",
                "1 is full.",
                "percentunit",
                Query(q.now(m.KV_CACHE_USAGE, REPLICA, "max"), each),
                top=1,
                mark=RULES.kv_cache_usage_ratio,
            ),
            lines(
                "Preemptions",
                "Requests put back to wait because the KV cache was full; they are computed twice.",
                "ops",
                Query(q.preemptions(REPLICA), each),
            ),
            lines(
                "Prefix cache",
                "Share of the prompt tokens that were there already.",
                "percentunit",
                Query(q.prefix_hit_ratio(REPLICA), each),
                top=1,
            ),
        ),
        (
            "Latency",
            lines(
                "Time to first token, p95",
                "Streams: arrival at the replica to the first output.",
                "s",
                Query(q.quantile(0.95, m.TTFT, REPLICA), each),
                width=6,
            ),
            lines(
                "Time per output token, p95",
                "Streams: mean time between tokens, the first apart.",
                "s",
                Query(q.quantile(0.95, m.TPOT, REPLICA), each),
                width=6,
            ),
            lines(
                "Wait for the engine, p95",
                WAIT_ABOUT,
                "s",
                Query(q.quantile(0.95, m.VLLM_QUEUE_TIME, REPLICA), each),
                width=6,
            ),
            lines(
                "Whole request, p95",
                "From arrival at the engine to the last token.",
                "s",
                Query(q.quantile(0.95, m.VLLM_E2E_LATENCY, REPLICA), each),
                width=6,
            ),
        ),
        (
            "Speculation and node",
            lines(
                "Acceptance length",
                ACCEPTANCE_ABOUT,
                "short",
                Query(q.acceptance_length(REPLICA), each),
                width=6,
                mark=RULES.acceptance_floor,
            ),
            lines(
                "Draft tokens per verification",
                "K, as it came out on average.",
                "short",
                Query(q.draft_tokens_per_verification(REPLICA), each),
                width=6,
            ),
            lines("Node CPU", "Of the nodes that the replicas are on.", "percent", node(m.NODE_CPU), width=6, top=100),
            lines("Node memory", "Of the nodes that the replicas are on.", "bytes", node(m.NODE_MEMORY_USED), width=6),
        ),
    )


def _dashboard(uid: str, title: str, about: str) -> dashboard.Dashboard:
    result = dashboard.Dashboard(title).uid(uid).description(about).tags([TAG]).readonly()
    result = result.timezone("browser").refresh("30s").time("now-1h", "now").tooltip(DashboardCursorSync.CROSSHAIR)
    links = dashboard.DashboardLink("DFlash").type(DashboardLinkType.DASHBOARDS).tags([TAG])
    result = result.link(links.as_dropdown(True).include_vars(True).keep_time(True))
    source = dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    result = result.with_variable(source)
    alive = m.RUNNING_REQUESTS.exported_name
    result = result.with_variable(_choice("model", f"label_values({alive}, model)"))
    return result.with_variable(_choice("replica", f'label_values({alive}{{model=~"$model"}}, replica)'))


def _choice(name: str, values: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(name.capitalize()).datasource(SOURCE).query(values)
    variable = variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    return variable.multi(True).include_all(True).all_value(".*").hide(VariableHide.DONT_HIDE)


def _with(result: dashboard.Dashboard, *rows: tuple[Any, ...]) -> dashboard.Dashboard:
    """Rows of panels; the first of each is its title, empty for none."""
    number_of_panel = 0
    for title, *panels in rows:
        if title:
            result = result.with_row(dashboard.Row(title))
        for panel in panels:
            number_of_panel += 1
            result = result.with_panel(panel.id(number_of_panel))
    return result


def render() -> dict[str, str]:
    """File name -> JSON."""
    built = {"fleet.json": fleet(), "speculation.json": speculation(), "replica.json": replica()}
    encoder = JSONEncoder(sort_keys=True, indent=2)
    return {name: encoder.encode(board.build()) + "\n" for name, board in built.items()}
