"""The Grafana dashboards as code: `python -m deploy.dashboards [--check]` writes `grafana/dashboards/*.json`.

Every panel has a unit and a description; queries use only the metrics in docs/reference/metrics.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grafana_foundation_sdk.builders.common import ReduceDataOptions, StackingConfig, VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DashboardLink, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as StatPanel
from grafana_foundation_sdk.builders.timeseries import Panel as TimeseriesPanel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    BigValueTextMode,
    DataSourceRef,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableRefresh,
    VariableSort,
)

TARGET = Path(__file__).resolve().parent / "grafana" / "dashboards"
DATASOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
Rows = Iterable[tuple[str, tuple["Chart", ...]]]
THIS_PEER = 'instance=~"$peer"'

NATS = "suffix: nats"
TOKENS = "suffix: tokens"
TOKENS_PER_SECOND = "suffix: tokens/s"
CREDITS = "suffix: credits"
PER_SECOND = "cps"
COUNT = "short"
SECONDS = "s"
BYTES = "bytes"
BYTES_PER_SECOND = "binBps"


@dataclass(frozen=True)
class Chart:
    """One panel: what it shows, in which unit, by which queries (expression, legend)."""

    title: str
    unit: str
    description: str
    queries: tuple[tuple[str, str], ...]
    kind: Literal["graph", "stack", "number", "name"] = "graph"
    width: int = 8


def quantile(fraction: float, metric: str, labels: str = "", by: str = "") -> str:
    """A quantile of a histogram over the dashboard's rate interval."""
    selector = f"{{{labels}}}" if labels else ""
    groups = f"le, {by}" if by else "le"
    buckets = f"sum by ({groups}) (rate({metric}_bucket{selector}[$__rate_interval]))"
    return f"histogram_quantile({fraction}, {buckets})"


def median_and_tail(metric: str, labels: str = "") -> tuple[tuple[str, str], ...]:
    """p50 and p95 of a histogram."""
    return ((quantile(0.5, metric, labels), "p50"), (quantile(0.95, metric, labels), "p95"))


def rate(metric: str, by: str, labels: str = "") -> str:
    """Summed rate of a counter, by some labels."""
    selector = f"{{{labels}}}" if labels else ""
    return f"sum by ({by}) (rate({metric}{selector}[$__rate_interval]))"


def increase(metric: str, by: str, labels: str = "") -> str:
    """Summed increase of a counter over the interval of one point, by some labels."""
    selector = f"{{{labels}}}" if labels else ""
    return f"sum by ({by}) (increase({metric}{selector}[$__rate_interval]))"


def per_round(metric: str, labels: str) -> str:
    """What a counter grows by per finished round, by peer."""
    rounds = f"sum by (instance) (rate(swarm_peer_rounds_total{{{labels}}}[$__rate_interval]))"
    return f"{rate(metric, 'instance', labels)} / {rounds}"


PROGRESS = (
    Chart(
        "Confirmed round",
        COUNT,
        "Newest round whose state root the majority of the reported results agree on.",
        (("max(swarm_coordinator_confirmed_round)", "round"),),
        "number",
        4,
    ),
    Chart(
        "Peers alive",
        COUNT,
        "Peers that announced themselves to the coordinator within their interval.",
        (("max(swarm_coordinator_peers_alive)", "peers"),),
        "number",
        4,
    ),
    Chart(
        "Training loss",
        NATS,
        "Mean training loss of the newest confirmed round, weighted by samples; nats per token.",
        (("max(swarm_coordinator_train_loss_nats)", "loss"),),
        "number",
        4,
    ),
    Chart(
        "Verified tokens",
        TOKENS,
        "Tokens behind all contributions of the run that were confirmed.",
        (("sum(swarm_coordinator_tokens_verified_total)", "tokens"),),
        "number",
        4,
    ),
    Chart(
        "Verified work",
        CREDITS,
        "Verified training FLOPs of the run / 10^15; 1 credit = 10^15 FLOPs.",
        (("sum(swarm_coordinator_flops_verified_total) / 1e15", "credits"),),
        "number",
        4,
    ),
    Chart(
        "Ledger entries",
        COUNT,
        "Size of the append-only ledger. It never shrinks.",
        (("max(swarm_coordinator_ledger_entries)", "entries"),),
        "number",
        4,
    ),
    Chart(
        "Loss",
        NATS,
        "Training loss, and the held-out loss on which quorums of peers agree, the newest and the best; nats per token.",
        (
            ("max(swarm_coordinator_train_loss_nats)", "training"),
            ("max(swarm_coordinator_evaluation_loss_nats) > 0", "held-out"),
            ("max(swarm_coordinator_best_evaluation_loss_nats) > 0", "held-out, best"),
        ),
        width=12,
    ),
    Chart(
        "Training speed",
        TOKENS_PER_SECOND,
        "Tokens that each peer trains on per second.",
        ((rate("swarm_peer_tokens_total", "instance"), "{{instance}}"),),
        "stack",
        12,
    ),
    Chart(
        "Round duration",
        SECONDS,
        "Wall time of a whole round over all peers, training included.",
        median_and_tail("swarm_peer_round_duration_seconds"),
        width=12,
    ),
    Chart(
        "Round overhead",
        SECONDS,
        "Wall time of a round minus the longest training time in it: what working together costs.",
        median_and_tail("swarm_peer_round_overhead_seconds"),
        width=12,
    ),
)
SWARM = (
    Chart(
        "Round by peer",
        COUNT,
        "The round that each peer works on. Lines that stay behind are peers that repair themselves.",
        (("swarm_peer_round", "{{instance}}"),),
    ),
    Chart(
        "States",
        COUNT,
        "Number of peers by the reason code of their state.",
        (("count by (state) (swarm_peer_state == 1)", "{{state}}"),),
        "stack",
    ),
    Chart(
        "Roster size",
        COUNT,
        "Peers in the roster as each peer sees it; all lines coincide.",
        (("swarm_peer_roster_size", "{{instance}}"),),
    ),
    Chart(
        "Upload",
        BYTES_PER_SECOND,
        "Bytes per second that each peer sends to other peers.",
        ((rate("swarm_peer_sent_bytes_total", "instance"), "{{instance}}"),),
    ),
    Chart(
        "Download",
        BYTES_PER_SECOND,
        "Bytes per second that each peer receives from other peers.",
        ((rate("swarm_peer_received_bytes_total", "instance"), "{{instance}}"),),
    ),
    Chart(
        "Rounds by outcome",
        COUNT,
        "Rounds that peers contributed to, followed without contributing, or missed, per interval.",
        ((increase("swarm_peer_rounds_total", "outcome"), "{{outcome}}"),),
        "stack",
    ),
    Chart(
        "Repairs",
        COUNT,
        "Times that a peer fetched chunks because its state root was not the agreed one. Normally zero.",
        ((increase("swarm_peer_repairs_total", "instance"), "{{instance}}"),),
    ),
    Chart(
        "Rounds skipped",
        COUNT,
        "Rounds whose loss jumped, as each peer decided: they change nobody's weights (strategy.skip_spikes). Normally zero.",
        ((increase("swarm_peer_rounds_skipped_total", "instance"), "{{instance}}"),),
    ),
    Chart(
        "Messages rejected by peers",
        PER_SECOND,
        "Messages from other peers that broke a rule, by reason.",
        ((rate("swarm_peer_rejected_messages_total", "reason"), "{{reason}}"),),
    ),
)
COORDINATOR = (
    Chart(
        "Requests",
        PER_SECOND,
        "gRPC requests per second by method.",
        ((rate("swarm_coordinator_request_duration_seconds_count", "method"), "{{method}}"),),
    ),
    Chart(
        "Request duration, p95",
        SECONDS,
        "95th percentile of the time that a request takes, by method.",
        ((quantile(0.95, "swarm_coordinator_request_duration_seconds", by="method"), "{{method}}"),),
    ),
    Chart(
        "Commit duration",
        SECONDS,
        "Time to make ledger entries durable; receipts wait for it.",
        median_and_tail("swarm_coordinator_commit_duration_seconds"),
    ),
    Chart(
        "Reports",
        PER_SECOND,
        "Reports from peers by outcome.",
        ((rate("swarm_coordinator_reports_total", "outcome"), "{{outcome}}"),),
    ),
    Chart(
        "Audits",
        PER_SECOND,
        "What peers found about each other's work. `failed` and `withheld` mean that somebody cheats, or can't be reached.",
        ((rate("swarm_coordinator_audits_total", "outcome"), "{{outcome}}"),),
    ),
    Chart(
        "Admissions",
        PER_SECOND,
        "Announcements that asked for admission, by outcome.",
        ((rate("swarm_coordinator_admissions_total", "outcome"), "{{outcome}}"),),
    ),
    Chart(
        "Messages rejected by the coordinator",
        PER_SECOND,
        "Messages that were malformed, wrongly signed, stale or replayed, by reason.",
        ((rate("swarm_coordinator_rejected_messages_total", "reason"), "{{reason}}"),),
    ),
)
CONTROL_NOW = (
    Chart(
        "Writers",
        COUNT,
        "Replicas that write the ledger: one. A coordinator alone is its own writer.",
        (("sum(swarm_coordinator_writer)", "writers"),),
        "number",
        4,
    ),
    Chart(
        "Replicas",
        COUNT,
        "Coordinators that answer Prometheus.",
        (('sum(up{job="coordinator"})', "replicas"),),
        "number",
        4,
    ),
    Chart(
        "Ledger",
        COUNT,
        "Entries in the ledger.",
        (("max(swarm_coordinator_ledger_entries)", "entries"),),
        "number",
        4,
    ),
    Chart(
        "Waiting",
        COUNT,
        "Events that wait for the ledger; at 4096 the coordinator sends callers away.",
        (("sum(swarm_coordinator_queue_events)", "events"),),
        "number",
        4,
    ),
    Chart(
        "Failed commits",
        COUNT,
        "Groups of entries that the store didn't take in the last hour.",
        (("sum(increase(swarm_coordinator_commit_failures_total[1h]))", "groups"),),
        "number",
        4,
    ),
    Chart(
        "Version",
        COUNT,
        "Version of the program that each replica runs.",
        (("count by (version) (swarm_coordinator_build_info)", "{{version}}"),),
        "name",
        4,
    ),
)
CONTROL_CALLS = (
    Chart(
        "Calls by method",
        PER_SECOND,
        "gRPC calls per second by method.",
        ((rate("swarm_coordinator_calls_total", "method"), "{{method}}"),),
        "stack",
    ),
    Chart(
        "Calls by status",
        PER_SECOND,
        "gRPC calls per second by status; everything but OK is a refusal or a failure.",
        ((rate("swarm_coordinator_calls_total", "code"), "{{code}}"),),
        "stack",
    ),
    Chart(
        "Calls in progress",
        COUNT,
        "Calls that are being answered, by replica; above its ceiling (max_calls) a replica sends callers away.",
        (("swarm_coordinator_calls_in_progress", "{{instance}}"),),
    ),
    Chart(
        "Latency, median",
        SECONDS,
        "Median time to answer a call, by method.",
        ((quantile(0.5, "swarm_coordinator_request_duration_seconds", by="method"), "{{method}}"),),
    ),
    Chart(
        "Latency, p99",
        SECONDS,
        "99th percentile of the time to answer a call, by method.",
        ((quantile(0.99, "swarm_coordinator_request_duration_seconds", by="method"), "{{method}}"),),
    ),
    Chart(
        "Refusals by reason",
        PER_SECOND,
        "Messages that were malformed, wrongly signed, stale, too many or against a rule, by reason.",
        ((rate("swarm_coordinator_rejected_messages_total", "reason"), "{{reason}}"),),
    ),
)
CONTROL_LEDGER = (
    Chart(
        "Reports",
        PER_SECOND,
        "Reports per second by outcome; `duplicate` are peers that didn't get their receipt the first time.",
        ((rate("swarm_coordinator_reports_total", "outcome"), "{{outcome}}"),),
        "stack",
    ),
    Chart(
        "Commit duration",
        SECONDS,
        "Time to make a group of entries durable; receipts wait for it.",
        (
            *median_and_tail("swarm_coordinator_commit_duration_seconds"),
            (quantile(0.99, "swarm_coordinator_commit_duration_seconds"), "p99"),
        ),
    ),
    Chart(
        "Backlog",
        COUNT,
        "Events that wait for the ledger, by replica.",
        (("swarm_coordinator_queue_events", "{{instance}}"),),
    ),
    Chart(
        "Ledger entries",
        COUNT,
        "Entries of the ledger as each replica knows it. A line below the others is a replica that falls behind.",
        (("swarm_coordinator_ledger_entries", "{{instance}}"),),
    ),
    Chart(
        "Ledger growth",
        "suffix: entries/s",
        "Entries that are appended per second.",
        (("max(deriv(swarm_coordinator_ledger_entries[$__rate_interval]))", "growth"),),
    ),
    Chart(
        "Writer",
        COUNT,
        "1 for the replica that writes, 0 for those that follow it.",
        (("swarm_coordinator_writer", "{{instance}}"),),
    ),
    Chart(
        "Admissions",
        PER_SECOND,
        "Announcements by outcome.",
        ((rate("swarm_coordinator_admissions_total", "outcome"), "{{outcome}}"),),
        width=12,
    ),
    Chart(
        "Grants",
        PER_SECOND,
        "Requests to go on without a quorum, by outcome. Normally none.",
        ((rate("swarm_coordinator_grants_total", "outcome"), "{{outcome}}"),),
        width=12,
    ),
)
CONTROL_PROCESS = (
    Chart(
        "Processor",
        "suffix: cores",
        "Processor time per second, by replica.",
        (('rate(process_cpu_seconds_total{job="coordinator"}[$__rate_interval])', "{{instance}}"),),
    ),
    Chart(
        "Memory",
        BYTES,
        "Resident memory, by replica.",
        (('process_resident_memory_bytes{job="coordinator"}', "{{instance}}"),),
    ),
    Chart(
        "Open files",
        COUNT,
        "File descriptors in use, connections included, and how many there may be.",
        (
            ('process_open_fds{job="coordinator"}', "open {{instance}}"),
            ('process_max_fds{job="coordinator"}', "limit {{instance}}"),
        ),
    ),
)
TRUST_NOW = (
    Chart(
        "Audited share",
        "percentunit",
        "Share of the contributions of keys that aren't new that is drawn for an audit; of a new key's first ones all are.",
        (("max(swarm_coordinator_audit_ratio)", "share"),),
        "number",
        6,
    ),
    Chart(
        "Open audits",
        COUNT,
        "Contributions whose audit isn't decided.",
        (("max(swarm_coordinator_audits_open)", "open"),),
        "number",
        6,
    ),
    Chart(
        "Suspended by audits",
        COUNT,
        "Keys that the ledger suspends.",
        (('max(swarm_coordinator_suspended_keys{by="audits"})', "keys"),),
        "number",
        6,
    ),
    Chart(
        "Suspended by the operator",
        COUNT,
        "Keys that the operator suspends.",
        (('max(swarm_coordinator_suspended_keys{by="operator"})', "keys"),),
        "number",
        6,
    ),
)
TRUST_AUDITS = (
    Chart(
        "Audits drawn",
        PER_SECOND,
        "Contributions per second that are drawn for an audit.",
        (("sum(rate(swarm_coordinator_audits_drawn_total[$__rate_interval]))", "drawn"),),
    ),
    Chart(
        "Findings",
        PER_SECOND,
        "What auditors told the coordinator. `failed` and `withheld` mean that somebody cheats, or can't be reached.",
        ((rate("swarm_coordinator_audits_total", "outcome"), "{{outcome}}"),),
        "stack",
    ),
    Chart(
        "Evaluations",
        PER_SECOND,
        "Held-out losses that evaluators told, by outcome; rounds whose evaluators have all spoken and differ.",
        (
            (rate("swarm_coordinator_evaluations_total", "outcome"), "{{outcome}}"),
            ("sum(rate(swarm_coordinator_evaluations_disputed_total[$__rate_interval]))", "rounds disputed"),
        ),
        "stack",
    ),
    Chart(
        "Audits by these peers",
        PER_SECOND,
        "What the peers that are watched here found when they audited others.",
        ((rate("swarm_peer_audits_total", "finding"), "{{finding}}"),),
        "stack",
    ),
    Chart(
        "Open and overdue",
        COUNT,
        "Audits that aren't decided, and those whose first auditor was given up waiting for.",
        (
            ("max(swarm_coordinator_audits_open)", "open"),
            ("max(swarm_coordinator_audits_overdue)", "overdue"),
        ),
    ),
    Chart(
        "Chance of escape",
        "percentunit",
        "At the present rate: how likely none of so many false contributions of a key that isn't new is drawn.",
        tuple((f"(1 - max(swarm_coordinator_audit_ratio)) ^ {count}", f"{count}") for count in (1, 10, 50)),
    ),
    Chart(
        "Suspensions",
        COUNT,
        "Keys that are suspended, by whom.",
        (("max by (by) (swarm_coordinator_suspended_keys)", "{{by}}"),),
    ),
)
TRUST_MERGES = (
    Chart(
        "Merge checks",
        PER_SECOND,
        "Others' merged parts that these peers merged again. `wrong` is followed by a proof, `unable` had not all that it takes.",
        ((rate("swarm_peer_merge_checks_total", "outcome"), "{{outcome}}"),),
        "stack",
    ),
    Chart(
        "Proofs of fraud",
        COUNT,
        "Proofs that these peers hold: every peer that has checked one counts it.",
        (("sum by (kind) (swarm_peer_proofs_total)", "{{kind}}"),),
    ),
    Chart(
        "Messages rejected",
        PER_SECOND,
        "Messages that broke a rule, by reason, at the peers and at the coordinator.",
        (
            (rate("swarm_peer_rejected_messages_total", "reason"), "peers: {{reason}}"),
            (rate("swarm_coordinator_rejected_messages_total", "reason"), "coordinator: {{reason}}"),
        ),
    ),
    Chart(
        "Parts clipped",
        "percentunit",
        "Share of the contributors' parts that the merge rule scaled down, by the peer that merged them.",
        (
            (
                rate("swarm_peer_clipped_parts_total", "instance") + " / " + rate("swarm_peer_merged_parts_total", "instance"),
                "{{instance}}",
            ),
        ),
        width=12,
    ),
    Chart(
        "Weight clipped",
        "percentunit",
        "Share of the contributed weight that the merge rule took away, by the peer that merged.",
        (
            (
                rate("swarm_peer_clipped_weight_samples_total", "instance")
                + " / "
                + rate("swarm_peer_merged_weight_samples_total", "instance"),
                "{{instance}}",
            ),
        ),
        width=12,
    ),
)
PEER_NOW = (
    Chart(
        "State",
        COUNT,
        "Reason code of the peer's present state.",
        ((f"swarm_peer_state{{{THIS_PEER}}} == 1", "{{state}}"),),
        "name",
        6,
    ),
    Chart(
        "Round",
        COUNT,
        "The round that the peer works on.",
        ((f"swarm_peer_round{{{THIS_PEER}}}", "{{instance}}"),),
        "number",
        6,
    ),
    Chart(
        "Credits",
        CREDITS,
        "Credits of this peer by state, as the coordinator last reported them.",
        ((f"swarm_peer_credits{{{THIS_PEER}}}", "{{state}}"),),
        "number",
        6,
    ),
    Chart(
        "Version",
        COUNT,
        "Version of the program that the peer runs.",
        ((f"swarm_peer_build_info{{{THIS_PEER}}}", "{{version}}"),),
        "name",
        6,
    ),
)
PEER_TRAINING = (
    Chart(
        "Loss",
        NATS,
        "Training loss of this peer's own samples and validation loss of the agreed weights; nats per token.",
        (
            (f"swarm_peer_train_loss_nats{{{THIS_PEER}}}", "training {{instance}}"),
            (f"swarm_peer_validation_loss_nats{{{THIS_PEER}}}", "validation {{instance}}"),
        ),
    ),
    Chart(
        "Training speed",
        TOKENS_PER_SECOND,
        "Tokens per second, averaged over training and exchange.",
        ((rate("swarm_peer_tokens_total", "instance", THIS_PEER), "{{instance}}"),),
    ),
    Chart(
        "Samples",
        "suffix: samples/s",
        "Samples per second that went into contributions.",
        ((rate("swarm_peer_samples_total", "instance", THIS_PEER), "{{instance}}"),),
    ),
    Chart(
        "Where a round's time goes",
        SECONDS,
        "Mean time of each phase of a round.",
        (
            (
                rate("swarm_peer_phase_duration_seconds_sum", "phase", THIS_PEER)
                + " / "
                + rate("swarm_peer_phase_duration_seconds_count", "phase", THIS_PEER),
                "{{phase}}",
            ),
        ),
        "stack",
    ),
    Chart(
        "Round duration",
        SECONDS,
        "Wall time of a whole round on this peer.",
        median_and_tail("swarm_peer_round_duration_seconds", THIS_PEER),
    ),
    Chart(
        "Round overhead",
        SECONDS,
        "Wall time of a round minus the longest training time in it.",
        median_and_tail("swarm_peer_round_overhead_seconds", THIS_PEER),
    ),
)
PEER_EXPERTS = (
    Chart(
        "Load of experts",
        "suffix: x an even share",
        "Of a mixture: visits of the busiest and the idlest expert of any layer in the last round; 1 is an even share.",
        ((f"swarm_peer_expert_load_ratio{{{THIS_PEER}}}", "{{expert}} {{instance}}"),),
        width=12,
    ),
    Chart(
        "Experts without a token",
        COUNT,
        "Of a mixture: how many experts, over all layers, no token of this peer's last round visited.",
        ((f"swarm_peer_experts_unused{{{THIS_PEER}}}", "{{instance}}"),),
        width=12,
    ),
)
PEER_NETWORK = (
    Chart(
        "Traffic",
        BYTES_PER_SECOND,
        "Bytes per second exchanged with other peers, framing and headers included.",
        (
            (rate("swarm_peer_sent_bytes_total", "instance", THIS_PEER), "sent {{instance}}"),
            (rate("swarm_peer_received_bytes_total", "instance", THIS_PEER), "received {{instance}}"),
        ),
    ),
    Chart(
        "Traffic by kind",
        BYTES_PER_SECOND,
        "Blobs (bulk), messages (control), and what encryption, multiplexing, the DHT and headers add (framing).",
        (
            (rate("swarm_peer_sent_bytes_total", "kind", THIS_PEER), "sent, {{kind}}"),
            (rate("swarm_peer_received_bytes_total", "kind", THIS_PEER), "received, {{kind}}"),
        ),
        "stack",
    ),
    Chart(
        "Uplink",
        BYTES_PER_SECOND,
        "Measured speed of the uplink, at most the volunteer's cap. The spans that a peer merges follow it.",
        ((f"swarm_peer_upload_bytes_per_second{{{THIS_PEER}}}", "{{instance}}"),),
    ),
    Chart(
        "Traffic per round",
        BYTES,
        "Bytes exchanged per finished round, framing and headers included.",
        (
            (per_round("swarm_peer_sent_bytes_total", THIS_PEER), "sent {{instance}}"),
            (per_round("swarm_peer_received_bytes_total", THIS_PEER), "received {{instance}}"),
        ),
    ),
    Chart(
        "Traffic per day",
        BYTES,
        "Bytes exchanged in the 24 hours before each point.",
        (
            (f"sum by (instance) (increase(swarm_peer_sent_bytes_total{{{THIS_PEER}}}[1d]))", "sent {{instance}}"),
            (f"sum by (instance) (increase(swarm_peer_received_bytes_total{{{THIS_PEER}}}[1d]))", "received {{instance}}"),
        ),
    ),
    Chart(
        "Traffic this month",
        BYTES,
        "Bytes in this calendar month (UTC) by direction, and what the monthly quota leaves, if there is one.",
        (
            (f"swarm_peer_month_bytes{{{THIS_PEER}}}", "{{direction}} {{instance}}"),
            (f"swarm_peer_quota_left_bytes{{{THIS_PEER}}} < +Inf", "left {{instance}}"),
        ),
    ),
    Chart(
        "Rounds by outcome",
        COUNT,
        "Rounds that this peer contributed to, followed or missed, per interval.",
        ((increase("swarm_peer_rounds_total", "outcome", THIS_PEER), "{{outcome}}"),),
        "stack",
    ),
    Chart(
        "Messages rejected",
        PER_SECOND,
        "Messages from other peers that broke a rule, by reason.",
        ((rate("swarm_peer_rejected_messages_total", "reason", THIS_PEER), "{{reason}}"),),
    ),
    Chart(
        "Reports",
        PER_SECOND,
        "Reports sent to the coordinator, by outcome.",
        ((rate("swarm_peer_reports_total", "outcome", THIS_PEER), "{{outcome}}"),),
    ),
    Chart(
        "Reports waiting",
        COUNT,
        "Reports on disk that the coordinator has not acknowledged yet. Grows while the coordinator is down.",
        ((f"swarm_peer_outbox_reports{{{THIS_PEER}}}", "{{instance}}"),),
    ),
    Chart(
        "Repairs",
        COUNT,
        "Times that this peer fetched chunks because its state root differed from the agreed one.",
        ((increase("swarm_peer_repairs_total", "instance", THIS_PEER), "{{instance}}"),),
    ),
)
PEER_MACHINE = (
    Chart(
        "GPU temperature",
        "celsius",
        "Temperature of the device; no data without a GPU.",
        ((f"swarm_peer_gpu_temperature_celsius{{{THIS_PEER}}}", "{{instance}}"),),
        width=6,
    ),
    Chart(
        "GPU power",
        "watt",
        "Power that the device draws; no data without a GPU.",
        ((f"swarm_peer_gpu_power_watts{{{THIS_PEER}}}", "{{instance}}"),),
        width=6,
    ),
    Chart(
        "GPU memory",
        BYTES,
        "Memory of the device by kind; no data without a GPU.",
        ((f"swarm_peer_gpu_memory_bytes{{{THIS_PEER}}}", "{{kind}} {{instance}}"),),
        width=6,
    ),
    Chart(
        "Clock offset",
        SECONDS,
        "This machine's clock minus the coordinator's. Messages too old or from the future are rejected.",
        ((f"swarm_peer_clock_offset_seconds{{{THIS_PEER}}}", "{{instance}}"),),
        width=6,
    ),
)


def panel(chart: Chart) -> StatPanel | TimeseriesPanel:
    """The Grafana panel of a chart."""
    if chart.kind in ("number", "name"):
        built = (
            StatPanel()
            .graph_mode(BigValueGraphMode.NONE)
            .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
            .text_mode(BigValueTextMode.NAME if chart.kind == "name" else BigValueTextMode.AUTO)
            .height(4)
        )
    else:
        built = (
            TimeseriesPanel()
            .legend(VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM))
            .fill_opacity(30 if chart.kind == "stack" else 8)
            .height(8)
        )
        if chart.kind == "stack":
            built = built.stacking(StackingConfig().mode(StackingMode.NORMAL))
    built = built.title(chart.title).description(chart.description).unit(chart.unit).datasource(DATASOURCE).span(chart.width)
    for position, (expression, legend) in enumerate(chart.queries):
        built = built.with_target(Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + position)))
    return built


def dashboard(uid: str, title: str, description: str, rows: Rows) -> Dashboard:
    """A dashboard without variables."""
    builder = (
        Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["swarm"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(DashboardLink("Swarm").type(DashboardLinkType.DASHBOARDS).tags(["swarm"]))
        .readonly()
    )
    for name, charts in rows:
        builder = builder.with_row(Row(name))
        for chart in charts:
            builder = builder.with_panel(panel(chart))
    return builder


def overview() -> Dashboard:
    """The run as a whole."""
    rows = (("Progress", PROGRESS), ("Peers", SWARM), ("Coordinator", COORDINATOR))
    return dashboard("swarm-overview", "Swarm: the run", "Progress, peers and coordinator of one run.", rows)


def peer() -> Dashboard:
    """One peer, or several side by side."""
    rows = (
        ("Now", PEER_NOW),
        ("Training", PEER_TRAINING),
        ("Experts", PEER_EXPERTS),
        ("Network", PEER_NETWORK),
        ("Machine", PEER_MACHINE),
    )
    choice = (
        QueryVariable("peer")
        .label("Peer")
        .description("Scrape address of the peer.")
        .datasource(DATASOURCE)
        .query("label_values(swarm_peer_build_info, instance)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
    )
    description = "What one volunteer's peer does, and why."
    return dashboard("swarm-peer", "Swarm: a peer", description, rows).with_variable(choice)


def coordinator() -> Dashboard:
    """The coordinator and its replicas."""
    rows = (("Now", CONTROL_NOW), ("Calls", CONTROL_CALLS), ("Ledger", CONTROL_LEDGER), ("Process", CONTROL_PROCESS))
    return dashboard("swarm-coordinator", "Swarm: the coordinator", "Calls, ledger, replicas and their processes.", rows)


def trust() -> Dashboard:
    """Who cheats, and whether it would be found out."""
    rows = (("Now", TRUST_NOW), ("Audits", TRUST_AUDITS), ("Merges and messages", TRUST_MERGES))
    return dashboard("swarm-trust", "Swarm: trust", "Audits, suspensions, proofs of fraud and what was refused.", rows)


def render() -> dict[str, str]:
    """File name to JSON text of every dashboard."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    dashboards = {
        "coordinator.json": coordinator(),
        "overview.json": overview(),
        "peer.json": peer(),
        "trust.json": trust(),
    }
    return {name: encoder.encode(builder.build()) + "\n" for name, builder in dashboards.items()}


def stale() -> list[str]:
    """Names of dashboards that differ from what the code gives now."""
    present = {path.name: path.read_text() for path in TARGET.glob("*.json")}
    fresh = render()
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def main() -> int:
    """Write the dashboards, or with `--check` fail when one is stale."""
    if "--check" in sys.argv[1:]:
        names = stale()
        sys.stdout.writelines(f"stale: {TARGET / name} (run: make dashboards)\n" for name in names)
        return 1 if names else 0
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, text in render().items():
        (TARGET / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
