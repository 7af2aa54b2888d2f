"""What a peer tells Prometheus. Names follow the conventions; units are base units."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class PeerMetrics:
    """Metrics of one peer in an injected registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.rounds = Counter("swarm_peer_rounds", "Rounds by outcome.", ["outcome"], registry=registry)
        self.skipped = Counter(
            "swarm_peer_rounds_skipped", "Rounds that were spikes of the loss and changed no weights.", registry=registry
        )
        self.tokens = Counter("swarm_peer_tokens", "Tokens trained on in counted contributions.", registry=registry)
        self.samples = Counter("swarm_peer_samples", "Samples trained on in counted contributions.", registry=registry)
        self.sent = Counter(
            "swarm_peer_sent_bytes", "Bytes sent to other peers: bulk, control, framing.", ["kind"], registry=registry
        )
        self.received = Counter(
            "swarm_peer_received_bytes",
            "Bytes received from other peers: bulk, control, framing; and from a mirror: web.",
            ["kind"],
            registry=registry,
        )
        self.month = Gauge(
            "swarm_peer_month_bytes", "Bytes in this calendar month (UTC), by direction.", ["direction"], registry=registry
        )
        self.quota_left = Gauge(
            "swarm_peer_quota_left_bytes", "What the monthly quota leaves; infinite without one.", registry=registry
        )
        self.upload_rate = Gauge(
            "swarm_peer_upload_bytes_per_second", "Measured speed of the uplink, at most the cap.", registry=registry
        )
        self.rejected = Counter(
            "swarm_peer_rejected_messages", "Messages that broke a rule, by reason.", ["reason"], registry=registry
        )
        self.merged_parts = Counter(
            "swarm_peer_merged_parts", "Contributors' parts that this peer merged itself.", registry=registry
        )
        self.clipped_parts = Counter(
            "swarm_peer_clipped_parts", "Of these, parts that the merge rule scaled down.", registry=registry
        )
        self.merged_weight = Counter(
            "swarm_peer_merged_weight_samples", "Weight of the parts that this peer merged itself.", registry=registry
        )
        self.clipped_weight = Counter(
            "swarm_peer_clipped_weight_samples", "Of this weight, what the merge rule took away.", registry=registry
        )
        self.merge_checks = Counter(
            "swarm_peer_merge_checks", "Others' merged parts that were merged again, by outcome.", ["outcome"], registry=registry
        )
        self.proofs = Counter("swarm_peer_proofs", "Proofs of fraud that were checked and hold.", ["kind"], registry=registry)
        self.audits = Counter(
            "swarm_peer_audits", "Audits of others' contributions by this peer, by finding.", ["finding"], registry=registry
        )
        self.evaluations = Counter(
            "swarm_peer_evaluations",
            "Held-out losses that this peer was to measure, by outcome.",
            ["outcome"],
            registry=registry,
        )
        self.history_gaps = Counter("swarm_peer_history_gaps", "Rounds that couldn't be kept in the history.", registry=registry)
        self.repairs = Counter("swarm_peer_repairs", "Times the state was repaired.", registry=registry)
        self.reports = Counter("swarm_peer_reports", "Reports by outcome.", ["outcome"], registry=registry)
        self.round = Gauge("swarm_peer_round", "The last finished round.", registry=registry)
        self.roster_size = Gauge("swarm_peer_roster_size", "Peers in the present roster.", registry=registry)
        self.train_loss = Gauge(
            "swarm_peer_train_loss_nats", "Mean training loss of the last round, per token.", registry=registry
        )
        self.validation_loss = Gauge("swarm_peer_validation_loss_nats", "Last held-out loss, per token.", registry=registry)
        self.expert_load = Gauge(
            "swarm_peer_expert_load_ratio",
            "Visits of a mixture's busiest and idlest expert in the last round, over an even share.",
            ["expert"],
            registry=registry,
        )
        self.experts_unused = Gauge(
            "swarm_peer_experts_unused", "Experts, over all layers, that no token of the last round visited.", registry=registry
        )
        self.state = Gauge("swarm_peer_state", "1 for the reason code of the present state.", ["state"], registry=registry)
        self.credits = Gauge("swarm_peer_credits", "Credits of this peer by state.", ["state"], registry=registry)
        self.outbox = Gauge("swarm_peer_outbox_reports", "Reports that wait for the coordinator.", registry=registry)
        self.temperature = Gauge("swarm_peer_gpu_temperature_celsius", "Temperature of the GPU.", registry=registry)
        self.power = Gauge("swarm_peer_gpu_power_watts", "Power that the GPU draws.", registry=registry)
        self.memory = Gauge("swarm_peer_gpu_memory_bytes", "Memory of the GPU.", ["kind"], registry=registry)
        self.clock_offset = Gauge(
            "swarm_peer_clock_offset_seconds", "Coordinator's clock minus this machine's.", registry=registry
        )
        self.round_duration = Histogram(
            "swarm_peer_round_duration_seconds", "Wall time of a round.", buckets=SECONDS, registry=registry
        )
        self.round_overhead = Histogram(
            "swarm_peer_round_overhead_seconds",
            "Wall time of a round minus the longest training time in it.",
            buckets=SECONDS,
            registry=registry,
        )
        self.phase = Histogram(
            "swarm_peer_phase_duration_seconds", "Duration of a round's phases.", ["phase"], buckets=SECONDS, registry=registry
        )
        self.build = Gauge("swarm_peer_build_info", "Always 1; the version is the label.", ["version"], registry=registry)
