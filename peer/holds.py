"""Who keeps the peer from training, and why: several may at once, and it goes on when none does. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

ORDER = ("user", "rejections", "suspension", "twin", "device", "governor", "quota", "operator")


@dataclass(frozen=True)
class Hold:
    """One reason not to train; `until_s` is a time of the wall clock at which it ends by itself, or None."""

    reason: str
    detail: str = ""
    until_s: float | None = None


@dataclass(frozen=True)
class Holds:
    """All of them, by who asked."""

    user: Hold | None = None
    rejections: Hold | None = None
    suspension: Hold | None = None
    twin: Hold | None = None
    device: Hold | None = None
    governor: Hold | None = None
    quota: Hold | None = None
    operator: Hold | None = None

    def put(self, who: str, hold: Hold | None) -> Holds:
        """With one more, or with `who`'s taken away."""
        return replace(self, **{who: hold})

    def resumed(self) -> Holds:
        """Without those that the user's word ends; one that still has its cause comes back as soon as that is seen again."""
        return replace(self, rejections=None, suspension=None, twin=None, device=None, operator=None)

    def at(self, now_s: float) -> Holds:
        """Without those that have ended by `now_s`."""
        kept = self
        for who in ORDER:
            hold: Hold | None = getattr(self, who)
            if hold is not None and hold.until_s is not None and hold.until_s <= now_s:
                kept = kept.put(who, None)
        return kept

    @property
    def first(self) -> Hold | None:
        """The one to show: the user's own word first."""
        return next((hold for who in ORDER if (hold := getattr(self, who)) is not None), None)

    @property
    def next_end_s(self) -> float | None:
        """When the earliest of them ends by itself."""
        ends = [hold.until_s for who in ORDER if (hold := getattr(self, who)) is not None and hold.until_s is not None]
        return min(ends, default=None)
