"""The rendezvous of torchrun's agents (`torchrun --rdzv-backend=ray`): who is in which round. Pure.

Not a part of a run's coordinator, but made like it: events in, time inside the event, no clock, nothing awaited.

Every `Report` (see `agent_messages.py`) says all that an agent is and wants, and is repeated. So one may come late, or
twice, or never, and a core that has lost its memory learns from them what the round is that goes on.

A round is live from its forming until it is over: until a member asks for the next one, is gone, or there is room for
an agent that waits. Then the members are told, come back, and the next round forms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from raylaunch.coordinator.agent_messages import (
    Answer,
    Closing,
    Decision,
    Heard,
    Place,
    Refusal,
    Report,
    Settings,
    Tick,
)

#: How long agents that are known to come back are waited for, in seconds, once the minimum is there: torch 2.13 gives
#: workers 30 s after SIGTERM, and waits 30 s more for those that SIGKILL doesn't end at once.
RETURN_SECONDS = 60.0
#: How long a core that has lost its memory waits for agents that it has forgotten, in reports that each should send.
RECALL_REPORTS = 3


@dataclass(slots=True, eq=False)
class _Agent:
    report: Report
    order: int  # in which the agents came
    heard: float
    since: float  # when its wish was first heard
    served: int = 0  # the last wish that has got a place
    overdue: str = ""  # what it has waited for in vain

    @property
    def waits(self) -> bool:
        wish = self.report.wish
        return wish is not None and wish.number > self.served and not self.overdue


@dataclass(slots=True, eq=False)
class AgentRendezvous:
    """Decides the rounds of one job (`--rdzv-id`). `handle` notes and decides; `answer` says what it means to one."""

    job: str
    now: float = float("-inf")
    settings: Settings | None = None  # the first agent's
    closed: Closing | None = None
    #: The number of the newest round, its size, and the places of its members, as long as they are in contact.
    round: int = 0
    size: int = 0
    places: dict[str, Place] = field(default_factory=dict)
    #: Why the newest round is over; empty while it is live.
    over: str = "there was none yet"
    formed: bool = False
    _store: tuple[str, int] = ("", 0)  # of the newest round
    _agents: dict[str, _Agent] = field(default_factory=dict)
    _arrivals: int = 0
    _gathering_since: float = float("-inf")
    _minimum_since: float | None = None
    _learnt_at: float = float("-inf")  # when a core without memory learnt of the live round
    _reasons: list[str] = field(default_factory=list)
    _wake: float = float("inf")

    @property
    def deserted(self) -> bool:
        """Whether all agents that there were are gone."""
        return self.settings is not None and not self._agents

    def handle(self, event: Heard | Tick) -> Decision:
        """Take one fact."""
        self._listen(event.at)
        self._reasons = []
        if isinstance(event, Heard) and not self._hear(event.report):
            return Decision(changed=False, reason="", wake_at=self._wake)
        assert self.settings is not None, "somebody has reported"
        self._wake = self.now + self.settings.silence / 4
        if isinstance(event, Tick):
            for agent in [a for a in self._agents.values() if self.now - a.heard >= self.settings.silence]:
                self._lose(agent, f"nothing was heard of it for {self.settings.silence:g} s")
        self._decide()
        return Decision(changed=True, reason="; ".join(self._reasons), wake_at=self._wake)

    def answer(self, report: Report) -> Answer:
        """What the state of things means to the agent that has sent this report."""
        number, closed = report.number, self.closed is not None
        if self.settings not in (None, report.settings):
            return Answer(number, closed=closed, refusal=Refusal.DISAGREES, reason=self._disagreement(report.settings))
        agent = self._agents.get(report.agent)
        if agent is None:
            return Answer(number, closed=closed)
        if report.place is not None:
            return self._answer_member(report, report.place)
        if agent.overdue:
            return Answer(number, closed=closed, refusal=Refusal.TIMEOUT, reason=agent.overdue)
        if agent.waits and self.closed is not None:
            return Answer(number, closed=True, refusal=Refusal.CLOSED, reason=self.closed.reason)
        place = None if agent.waits or self.over else self.places.get(report.agent)
        return Answer(number, place=place, closed=closed)

    def _answer_member(self, report: Report, place: Place) -> Answer:
        number = report.number
        if self.closed is not None and (self.over or not self.formed):
            return Answer(number, reform=True, closed=True, refusal=Refusal.CLOSED, reason=self.closed.reason)
        if self.closed is not None:  # what is left of the last round may come to its end
            return Answer(number, formed=True, reform=self.closed.at_once, closed=True, reason=self.closed.reason)
        if self.over or self.places.get(report.agent) != place:
            return Answer(number, reform=True, reason=self.over or "another round has formed")
        return Answer(number, formed=self.formed)

    # -- facts -------------------------------------------------------------------------------------------------------

    def _listen(self, at: float) -> None:
        """Time goes on. Whoever hasn't listened for long can't say that others were silent."""
        assert at >= self.now, f"time runs backwards: {at} after {self.now}"
        if self.settings is not None and at - self.now > self.settings.silence / 2:
            for agent in self._agents.values():
                agent.heard += at - self.now
        self.now = at

    def _hear(self, report: Report) -> bool:
        """Note a report; whether it said anything new."""
        if self.settings is None and not report.leaving:
            self.settings = report.settings
        if report.settings != self.settings:
            return False
        agent = self._agents.get(report.agent)
        if agent is None:
            if report.leaving:
                return False
            self._arrivals += 1
            agent = self._agents[report.agent] = _Agent(report, self._arrivals, self.now, self.now)
        else:
            agent.heard = self.now
            if report.number <= agent.report.number:
                return False
            if report.wish is not None and report.wish != agent.report.wish:
                agent.since = self.now
            agent.report = report
        if report.closing is not None and self.closed is None:
            self.closed = Closing(f"{report.name} {report.closing.reason}", report.closing.at_once)
            self._reasons.append(f"closed: {self.closed.reason}")
        if report.leaving:
            self._lose(agent, report.leaving)
        elif report.place is not None:
            self._learn(report.agent, report.place)
        elif report.wish is not None and report.wish.after > self.round:
            self._remember(report.wish.after, f"{report.name} starts its workers anew")
        return True

    def _remember(self, number: int, over: str) -> None:
        """This core has lost its memory, and is told of a round; of its members only as they report."""
        self.round, self.size, self.places, self.over = number, 0, {}, over
        self._learnt_at = self._gathering_since = self.now
        self._reasons.append(f"there was a round {number}")
        self._take_back()

    def _learn(self, agent: str, place: Place) -> None:
        """An agent has taken its place."""
        if place.round > self.round:
            self._remember(place.round, "")
        if place.round == self.round and self.size == 0:
            self.size, self._store = place.size, (place.host, place.port)
        same = (place.round, place.size, place.host, place.port) == (self.round, self.size, *self._store)
        if same and agent not in self.places and all(place.rank != other.rank for other in self.places.values()):
            self.places[agent] = place

    def _lose(self, agent: _Agent, why: str) -> None:
        """An agent is gone."""
        name = agent.report.agent
        del self._agents[name]
        self._reasons.append(f"{agent.report.name} is gone: {why}")
        if self.places.pop(name, None) is not None and not self.over and self.closed is None:
            self._end_round(f"{agent.report.name} is gone: {why}")

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        assert self.settings is not None
        if self.closed is not None:
            return
        if not self.over:
            self._look_at_round(self.settings)
        if self.over:
            self._gather(self.settings)
        members = [self._agents[name].report.place == place for name, place in self.places.items()]
        self.formed = not self.over and len(members) == self.size and all(members)

    def _look_at_round(self, settings: Settings) -> None:
        """Whether the live round is over."""
        waiting = self._waiting()
        again = [agent for agent in waiting if agent.report.agent in self.places]
        if again:
            self._end_round(f"{again[0].report.name} starts its workers anew")
        elif waiting and self.size < settings.max_agents:
            self._end_round(f"{waiting[0].report.name} has come")
        elif len(self.places) < self.size:  # the others' reports may be on their way
            if self.now - self._learnt_at >= settings.silence:
                self._end_round(f"{self.size - len(self.places)} of its {self.size} nodes have not reported")
            else:
                self._wake_at(self._learnt_at + settings.silence)

    def _end_round(self, why: str) -> None:
        self.over = why
        self._gathering_since, self._minimum_since = self.now, None
        self._reasons.append(f"round {self.round} is over: {why}")
        self._take_back()

    def _take_back(self) -> None:
        """Places that have not been taken yet are given no more: those wishes wait again."""
        for agent in self._agents.values():
            if agent.report.wish is not None:
                agent.served = min(agent.served, agent.report.wish.number - 1)

    def _gather(self, settings: Settings) -> None:
        """Form the next round, or wait for more."""
        waiting = self._waiting()
        if len(waiting) < settings.min_agents:
            self._minimum_since = None
            lacks = self._lacks()
            for agent in waiting:
                if self._deadline(agent) <= self.now:
                    agent.overdue = lacks
                    self._reasons.append(f"{agent.report.name} has waited long enough: {lacks}")
                else:
                    self._wake_at(self._deadline(agent))
            return
        if self._minimum_since is None:
            self._minimum_since = self.now
        until = self.now
        if len(waiting) < settings.max_agents:
            if self.round == 0:  # nobody knows who else will come
                until = self._minimum_since + settings.last_call
            elif self._away():  # stopping their workers
                until = self._gathering_since + max(RETURN_SECONDS, settings.last_call)
            until = max(until, self._learnt_at + RECALL_REPORTS * settings.keep_alive)
            until = min([until, *map(self._deadline, waiting)])
        if self.now < until:
            self._wake_at(until)
        else:
            self._form(waiting[: settings.max_agents])

    def _form(self, chosen: list[_Agent]) -> None:
        first = chosen[0].report.wish
        assert first is not None
        self.round, self.size, self.over, self.places = self.round + 1, len(chosen), "", {}
        self._store, self._minimum_since = (first.host, first.port), None
        for rank, agent in enumerate(chosen):
            assert agent.report.wish is not None
            agent.served = agent.report.wish.number
            self.places[agent.report.agent] = Place(self.round, rank, self.size, first.host, first.port)
        self._reasons.append(f"round {self.round}: {', '.join(agent.report.name for agent in chosen)}")

    def _waiting(self) -> list[_Agent]:
        """Who waits for the next round: the members of the last one by rank, then the others as they came."""

        def position(agent: _Agent) -> tuple[int, int]:
            place = self.places.get(agent.report.agent)
            return (self.size if place is None else place.rank, agent.order)

        return sorted((agent for agent in self._agents.values() if agent.waits), key=position)

    def _away(self) -> list[_Agent]:
        """The members of the last round that have not come back from it, and may."""
        members = [self._agents[name] for name in self.places]
        return [agent for agent in members if not agent.waits and not agent.overdue]

    def _deadline(self, agent: _Agent) -> float:
        """Until when an agent waits. While a full round goes on, it waits as a spare, without a limit."""
        assert agent.report.wish is not None
        return max(agent.since, self._gathering_since) + agent.report.wish.timeout

    def _wake_at(self, at: float) -> None:
        self._wake = min(self._wake, at)

    # -- words -------------------------------------------------------------------------------------------------------

    def _lacks(self) -> str:
        """What the agents that wait, wait for."""
        assert self.settings is not None
        waiting = self._waiting()
        names = ", ".join(agent.report.name for agent in waiting[:8])
        away = [agent.report.name for agent in self._away()]
        text = f"{len(waiting)} of at least {self.settings.min_agents} nodes have come: {names}"
        return f"{text}; not back from round {self.round}: {', '.join(away[:8])}" if away else text

    def _disagreement(self, other: Settings) -> str:
        assert self.settings is not None
        names = ("min_agents", "max_agents", "last_call", "keep_alive", "silence")
        ours, theirs = self.settings, other
        differ = [
            f"{name}={getattr(theirs, name):g}, the others {getattr(ours, name):g}"
            for name in names
            if getattr(theirs, name) != getattr(ours, name)
        ]
        return f"this node's settings are not those of the others: {'; '.join(differ)}"
