"""Every state that a peer can be in, as a code with an explanation: one list for status, log, metrics, dashboard and pages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """What a state is, whether it earns, and what ends it: `by_itself`, or what the volunteer can do."""

    explanation: str
    earning: bool = False
    by_itself: bool = True
    hint: str = ""


TABLE: dict[str, Reason] = {
    "starting": Reason("loading libraries and the model"),
    "connecting": Reason("reaching the coordinator and other peers"),
    "fetching_data": Reason("fetching the run's data from other peers"),
    "joining": Reason("asking the roster to let us in"),
    "waiting_for_peers": Reason("nobody to train with has answered yet"),
    "protocol_mismatch": Reason(
        "the peers that answer speak another version of the protocol", hint="update: pip install --upgrade swarm-train"
    ),
    "gathering": Reason("the run begins when enough peers are there"),
    "downloading": Reason("fetching the weights"),
    "following": Reason("in the roster without work this round"),
    "training": Reason("training", earning=True),
    "exchanging": Reason("exchanging updates with the others", earning=True),
    "repairing": Reason("our state differed from the majority's; fetching what differs"),
    "no_quorum": Reason("too few of the roster can be reached to go on safely"),
    "paused": Reason("paused by the user", by_itself=False, hint="swarm resume"),
    "snoozed": Reason("paused by the user for a while", hint="swarm resume ends it sooner"),
    "too_hot": Reason("the GPU is hotter than the rules allow", hint="set temperature_c, or clean the fans"),
    "power_limit": Reason("the GPU draws more power than the rules allow", hint="set power_w"),
    "fan_limit": Reason("the fan is faster than the rules allow", hint="set fan_ratio"),
    "gpu_busy": Reason("another program uses the GPU", hint="set other_programs to train beside it"),
    "user_active": Reason("somebody uses this machine", hint="set run in the rules for a machine in use"),
    "off_hours": Reason("outside the hours that the rules name", hint="set hours"),
    "on_battery": Reason("the machine runs on battery", hint="plug it in, or set on_battery"),
    "metered_link": Reason("the network link is metered", hint="set on_metered"),
    "gpu_lost": Reason("the GPU doesn't answer; it goes on when it does", hint="swarm doctor"),
    "gpu_failed": Reason("the GPU reported an error; training begins anew in a minute", hint="see `detail`, then: swarm doctor"),
    "contributions_rejected": Reason(
        "five contributions in a row were refused", by_itself=False, hint="see `detail`, then: swarm doctor, swarm resume"
    ),
    "suspended": Reason(
        "the coordinator has suspended this key",
        by_itself=False,
        hint="swarm explain --round N says what was found; swarm doctor",
    ),
    "key_used_elsewhere": Reason(
        "another machine uses this key and began later: that one counts",
        by_itself=False,
        hint="make a key for each: swarm identity new; or let this one count: swarm resume",
    ),
    "quota_used": Reason("the month's traffic quota is used up; it goes on by itself next month (UTC)"),
    "run_paused": Reason("the run's operator has paused it; asked again every five minutes", hint="swarm resume asks now"),
    "finishing": Reason("completing the round, then stopping"),
    "stopping": Reason("stopping now"),
    "run_complete": Reason("the run is over", by_itself=False, hint="join another run"),
    "disagreement": Reason(
        "our verified result differs from the majority's: alarm raised", by_itself=False, hint="tell the run's owner"
    ),
    "failed": Reason("stopped by an error", by_itself=False, hint="see the error, then: swarm doctor"),
}

EXPLANATIONS: dict[str, str] = {code: reason.explanation for code, reason in TABLE.items()}
