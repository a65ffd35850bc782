"""Several guards asked about the same text, and their risks combined.

    mean   what the paper does with several guards (arXiv 2505.17196): a single false alarm weighs less
    max    the strictest member decides: harm that one of them sees counts in full

A cut that one member left unscored is unscored, since the mean or the maximum of the others is another guard's
opinion: it would jump whenever a server is down.

Shape letters: N exchanges, K cuts of one, M members.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ballast.errors import GuardError
from ballast.guardrails.engines.server_state import ServerHealth
from ballast.guardrails.registry import NestedGuardOptions, load_guardrail
from ballast.guardrails.remote import servers_of
from ballast.guardrails.types import Exchange, Guardrail, RiskTrace


class EnsembleOptions(BaseModel):
    """Options of several guards that judge together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["ensemble"] = "ensemble"
    members: tuple[NestedGuardOptions, ...] = Field(
        description="options of two or more guards, of any type, each a different one"
    )
    combine: Literal["mean", "max"] = Field(
        default="mean", description="mean: the average risk; max: the highest, so that the strictest member decides"
    )
    on_unscored: Literal["unscored", "others"] = Field(
        default="unscored",
        description="a cut that a member left unscored: `unscored` leaves it so, `others` combines the members that scored it",
    )
    concurrent: bool = Field(
        default=True,
        description="ask the members at the same time; false takes one after the other, for members on one CPU",
    )

    @model_validator(mode="after")
    def _members_differ(self) -> "EnsembleOptions":
        if len(self.members) < 2:
            raise ValueError(f"members holds {len(self.members)} guards; give two or more, or use the one by itself")
        for number, member in enumerate(self.members):
            if member in self.members[:number]:
                raise ValueError(
                    f"members {self.members.index(member)} and {number} are the same guard, which would count twice; remove one"
                )
        return self


class EnsembleGuard:
    """The mean or the highest risk of several guards.

    Args:
        options: how to combine; `options.members` are built here unless `members` are given.
        members: (M,) ready-made guards in place of those, for guards without options.
    """

    def __init__(self, options: EnsembleOptions, members: Sequence[Guardrail] | None = None) -> None:
        self.options = options
        self.members = tuple(members or (load_guardrail(member) for member in options.members))
        self.name = f"{options.combine}({', '.join(member.name for member in self.members)})"

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Judge each response at each of its cuts by every member; see `Guardrail.assess`.

        The category at a cut is that of the member with the highest risk there; `label_mass` is the lowest.

        Raises:
            GuardError: a member returned other traces than it was asked for, or failed its self-check.
        """
        if self.options.concurrent:
            with ThreadPoolExecutor(len(self.members)) as pool:
                asked = [pool.submit(member.assess, exchanges, cuts) for member in self.members]
                answers = [answer.result() for answer in asked]
        else:
            answers = [member.assess(exchanges, cuts) for member in self.members]
        for member, traces in zip(self.members, answers, strict=True):
            self._check(member, traces, cuts)
        return [
            self._combine(tuple(row_cuts), [traces[number] for traces in answers])
            for number, row_cuts in enumerate(cuts)
        ]

    def servers(self) -> tuple[ServerHealth, ...]:
        """(S,) the servers of all members, in their order."""
        return tuple(server for member in self.members for server in servers_of(member))

    def _check(self, member: Guardrail, traces: Sequence[RiskTrace], cuts: Sequence[Sequence[int]]) -> None:
        if [trace.cuts for trace in traces] != [tuple(row_cuts) for row_cuts in cuts]:
            raise GuardError(
                f"guardrail '{self.name}': its member '{member.name}' did not return one trace with the cuts asked for to each of "
                f"{len(cuts)} exchanges; run `ballast guard check` on that member"
            )

    def _combine(self, cuts: tuple[int, ...], traces: Sequence[RiskTrace]) -> RiskTrace:
        risks: list[float | None] = []
        categories: list[str | None] = []
        missing: set[int] = set()  # members that left a cut unscored
        for k in range(len(cuts)):
            scored = {m: risk for m, trace in enumerate(traces) if (risk := trace.risk[k]) is not None}
            missing |= set(range(len(traces))) - set(scored)
            if not scored or (len(scored) < len(traces) and self.options.on_unscored == "unscored"):
                risks.append(None)
                categories.append(None)
                continue
            highest = max(scored, key=lambda m: scored[m])
            total = sum(scored.values()) / len(scored)
            risks.append(scored[highest] if self.options.combine == "max" else min(total, 1.0))
            categories.append(traces[highest].category[k] if traces[highest].category else None)
        masses = [trace.label_mass for trace in traces if trace.label_mass is not None]
        return RiskTrace(
            cuts=cuts,
            risk=tuple(risks),
            reason="; ".join(f"member '{self.members[m].name}': {traces[m].reason}" for m in sorted(missing)) or None,
            label_mass=min(masses, default=None),
            category=tuple(categories) if any(trace.category for trace in traces) else (),
        )
