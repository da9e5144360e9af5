"""The rounds of torchrun's agents, decided by events alone: stories, and any order of anything."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raylaunch.coordinator.agent_messages import Answer, Closing, Heard, Place, Refusal, Report, Settings, Tick, Wish
from raylaunch.coordinator.agent_rendezvous import RETURN_SECONDS, AgentRendezvous

SILENCE = 10.0
JOIN = 100.0


class Agent:
    """What the handler and the process beside it do, in virtual time."""

    def __init__(self, job: Job, name: str, settings: Settings) -> None:
        self.job = job
        self.report = Report(name, name, 0, settings)
        self.wishes = self.round = 0
        self.answer = Answer(0)
        self.restarts = 0

    def say(self, **changes: object) -> Answer:
        """Another report; returns what is answered at once."""
        self.report = replace(self.report, number=self.report.number + 1, **changes)
        return self.repeat()

    def repeat(self) -> Answer:
        self.job.send(Heard(self.job.now, self.report))
        return self.look()

    def look(self) -> Answer:
        self.answer = self.job.core.answer(self.report)
        return self.answer

    def join(self, timeout: float = JOIN) -> Answer:
        """Call `next_rendezvous`."""
        self.wishes += 1
        after = self.round = self.report.place.round if self.report.place else self.round
        return self.say(wish=Wish(self.wishes, after, f"host-{self.report.agent}", self.wishes, timeout), place=None)

    def take(self) -> Answer:
        """Take the place that it has been given."""
        assert self.look().place is not None
        return self.say(wish=None, place=self.answer.place)

    def leave(self, why: str = "killed", closing: Closing | None = None) -> None:
        self.say(leaving=why, closing=closing)

    @property
    def place(self) -> Place:
        place = self.report.place or self.look().place
        assert place is not None, f"{self.report.name} has no place: {self.answer}"
        return place


class Job:
    """The core, time, and a clock that wakes it."""

    def __init__(self, low: int = 1, high: int = 4, last_call: float = 5.0) -> None:
        self.settings = Settings(low, high, last_call, 1.0, SILENCE)
        self.core = AgentRendezvous("job")
        self.now = 0.0
        self.wake = float("inf")
        self.said: list[str] = []

    def send(self, event: Heard | Tick) -> None:
        decision = self.core.handle(event)
        self.wake = decision.wake_at
        self.said += [decision.reason] if decision.reason else []

    def agent(self, name: str) -> Agent:
        return Agent(self, name, self.settings)

    def wait(self, seconds: float, *alive: Agent) -> None:
        """So much time goes by; these agents go on reporting."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1.0, max(self.wake, self.now + 0.001))
            if self.now >= self.wake:
                self.send(Tick(self.now))
            for agent in alive:
                agent.repeat()

    def round_of(self, *names: str) -> list[Agent]:
        """A formed round of new agents."""
        agents = [self.agent(name) for name in names]
        for agent in agents:
            agent.join()
        if self.core.over:
            self.wait(self.settings.last_call, *agents)
        self.settle(*agents)
        return agents

    def settle(self, *agents: Agent) -> None:
        """These agents take their places, and the round is formed."""
        for agent in agents:
            agent.take()
        assert all(agent.look().formed for agent in agents)


def ranks(*agents: Agent) -> list[tuple[int, int]]:
    """Rank and size of each, in the same round with the same store."""
    assert len({(agent.place.round, agent.place.host, agent.place.port) for agent in agents}) == 1
    return [(agent.place.rank, agent.place.size) for agent in agents]


# -- the first round ---------------------------------------------------------------------------------------------------


def test_a_full_round_forms_at_once() -> None:
    job = Job(2, 2)
    a, b = job.agent("a"), job.agent("b")
    assert a.join().place is None
    b.join()
    assert ranks(a, b) == [(0, 2), (1, 2)]
    assert a.place == Place(1, 0, 2, "host-a", 1)


def test_a_round_is_formed_when_all_have_taken_their_places() -> None:
    job = Job(2, 2)
    a, b = job.agent("a"), job.agent("b")
    a.join()
    b.join()
    assert not a.take().formed
    assert b.take().formed
    assert a.look().formed


def test_the_last_call_is_kept_for_more_than_the_minimum() -> None:
    job = Job(1, 3, last_call=5.0)
    a, b = job.agent("a"), job.agent("b")
    a.join()
    job.wait(4.0, a)
    assert a.look().place is None
    b.join()  # doesn't prolong it
    job.wait(0.9, a, b)
    assert a.look().place is None
    job.wait(0.2, a, b)
    assert ranks(a, b) == [(0, 2), (1, 2)]


def test_without_a_last_call_the_minimum_forms_at_once() -> None:
    job = Job(1, 3, last_call=0.0)
    a = job.agent("a")
    assert a.join().place == Place(1, 0, 1, "host-a", 1)


def test_the_last_call_begins_anew_when_the_minimum_is_lost() -> None:
    job = Job(2, 3)
    a, b, c = map(job.agent, "abc")
    a.join()
    b.join()
    job.wait(4.0, a, b)
    b.leave()
    c.join()
    job.wait(4.0, a, c)
    assert a.look().place is None
    job.wait(1.1, a, c)
    assert ranks(a, c) == [(0, 2), (1, 2)]


def test_who_waits_in_vain_is_told_what_for() -> None:
    job = Job(3, 4)
    a, b = job.agent("a"), job.agent("b")
    a.join(timeout=20)
    job.wait(5, a)
    b.join(timeout=20)
    job.wait(14.9, a, b)
    assert a.look().refusal is None
    job.wait(0.2, a, b)
    assert (a.look().refusal, b.look().refusal) == (Refusal.TIMEOUT, None)
    assert a.answer.reason == "2 of at least 3 nodes have come: a, b"


def test_the_minimum_forms_rather_than_that_one_of_it_waits_in_vain() -> None:
    job = Job(1, 2, last_call=50.0)
    a = job.agent("a")
    a.join(timeout=10)
    job.wait(10.1, a)
    assert ranks(a) == [(0, 1)]


def test_an_agent_with_other_bounds_is_refused() -> None:
    job = Job(2, 4)
    a = job.agent("a")
    b = Agent(job, "b", replace(job.settings, min_agents=1, last_call=7.5))
    a.join()
    assert b.join().refusal is Refusal.DISAGREES
    differ = "min_agents=1, the others 2; last_call=7.5, the others 5"
    assert b.answer.reason == f"this node's settings are not those of the others: {differ}"
    b.leave()
    job.agent("c").join()
    job.wait(5.1, a)
    assert a.place.size == 2


# -- the next round ----------------------------------------------------------------------------------------------------


def test_a_lost_member_ends_the_round_though_nobody_waits() -> None:
    job = Job(1, 2)
    a, b = job.round_of("a", "b")
    a.leave("its torchrun agent has ended")
    assert b.look().reform
    assert b.answer.reason == "a is gone: its torchrun agent has ended"
    b.join()
    assert ranks(b) == [(0, 1)]  # at once: nobody else is on the way
    assert b.place.host == "host-b"


def test_a_silent_member_is_lost() -> None:
    job = Job(1, 2)
    _a, b = job.round_of("a", "b")
    job.wait(SILENCE - 1.5, b)
    assert not b.look().reform
    job.wait(4.5, b)
    assert b.look().reform
    assert b.answer.reason == "a is gone: nothing was heard of it for 10 s"


def test_who_has_not_listened_calls_nobody_silent() -> None:
    """The actor's process was stopped for a minute: everybody's reports lie in its queue."""
    job = Job(2, 2)
    a, b = job.round_of("a", "b")
    job.now += 60
    job.send(Tick(job.now))
    a.repeat()
    b.repeat()
    assert not a.look().reform
    assert not job.core.over


def test_below_the_minimum_it_waits_for_another() -> None:
    job = Job(2, 2)
    a, b = job.round_of("a", "b")
    b.leave()
    a.join()
    job.wait(50, a)
    assert a.look().place is None
    c = job.agent("c")
    c.join()
    assert ranks(a, c) == [(0, 2), (1, 2)]
    assert a.place.round == 2


def test_a_member_that_starts_anew_takes_the_others_along() -> None:
    job = Job(1, 3)
    a, b, c = job.round_of("a", "b", "c")
    b.join()
    assert (a.look().reform, a.answer.reason) == (True, "b starts its workers anew")
    assert c.look().reform
    job.wait(3, a, b, c)  # they are stopping their workers
    assert b.look().place is None
    c.join()
    a.join()
    assert ranks(a, b, c) == [(0, 3), (1, 3), (2, 3)]  # as before
    assert a.place.port == 2  # of another store


def test_who_does_not_come_back_is_not_waited_for_for_ever() -> None:
    job = Job(1, 3)
    a, b, _c = job.round_of("a", "b", "c")
    b.join()
    a.join()
    job.wait(RETURN_SECONDS - 1, a, b, _c)
    assert a.look().place is None
    job.wait(1.1, a, b, _c)
    assert ranks(a, b) == [(0, 2), (1, 2)]
    assert _c.look().reform  # it is still told


def test_a_newcomer_is_taken_in() -> None:
    job = Job(1, 2)
    (a,) = job.round_of("a")
    b = job.agent("b")
    b.join()
    assert (a.look().reform, a.answer.reason) == (True, "b has come")
    assert b.look().place is None
    a.join()
    assert ranks(a, b) == [(0, 2), (1, 2)]


def test_more_than_the_maximum_are_spares() -> None:
    job = Job(1, 2)
    a, b = job.round_of("a", "b")
    c = job.agent("c")
    c.join(timeout=10)
    job.wait(100, a, b, c)
    assert not a.look().reform
    assert c.look() == Answer(1)  # no place, and no refusal however long it waits
    b.leave()
    a.join()
    assert ranks(a, c) == [(0, 2), (1, 2)]


def test_a_spare_takes_the_place_of_one_that_is_slow_to_come_back() -> None:
    job = Job(1, 2)
    a, b = job.round_of("a", "b")
    c = job.agent("c")
    c.join()
    b.join()
    assert ranks(b, c) == [(0, 2), (1, 2)]
    a.join()
    assert a.look() == Answer(a.report.number)  # the spare now
    assert not b.take().reform


def test_a_member_lost_while_the_round_forms_breaks_it_up() -> None:
    job = Job(1, 3)
    a, b, c = map(job.agent, "abc")
    a.join()
    b.join()
    c.join()
    b.take()
    a.leave()  # rank 0, whose store the others were told of
    assert b.look().reform
    assert c.look().place is None  # it has not taken its place, and waits on with the same wish
    b.join()
    assert ranks(b, c) == [(0, 2), (1, 2)]
    job.settle(b, c)


def test_a_place_of_a_round_that_is_over_is_taken_too_late() -> None:
    job = Job(1, 3)
    a, b, c = map(job.agent, "abc")
    for agent in (a, b, c):
        agent.join()
    late = c.look().place
    a.leave()
    b.look()
    assert c.say(wish=None, place=late).reform
    c.join()
    assert ranks(b, c) == [(0, 2), (1, 2)]


# -- the end -----------------------------------------------------------------------------------------------------------


def test_a_member_that_has_finished_closes_and_lets_the_others_finish() -> None:
    job = Job(1, 3)
    a, b = job.round_of("a", "b")
    a.leave("has finished", Closing("has finished", at_once=False))
    assert (b.look().reform, b.answer.closed) == (False, True)
    c = job.agent("c")
    assert (c.join().refusal, c.answer.reason) == (Refusal.CLOSED, "a has finished")
    assert b.join().refusal is Refusal.CLOSED
    assert not job.core.deserted
    b.leave()
    c.leave()
    assert job.core.deserted


def test_a_member_that_has_failed_for_good_ends_the_others() -> None:
    job = Job(1, 3)
    a, b = job.round_of("a", "b")
    a.leave("has failed", Closing("has failed", at_once=True))
    assert (b.look().reform, b.answer.reason) == (True, "a has failed")
    assert b.join().refusal is Refusal.CLOSED


def test_a_round_that_was_over_before_the_closing_does_not_go_on() -> None:
    job = Job(1, 3)
    a, b, c = job.round_of("a", "b", "c")
    a.join()
    b.leave("has finished", Closing("has finished", at_once=False))
    assert a.look().refusal is Refusal.CLOSED
    assert c.look().reform


def test_a_round_that_was_forming_when_it_was_closed_does_not_form() -> None:
    job = Job(2, 2)
    a, b = job.agent("a"), job.agent("b")
    a.join()
    b.join()
    a.take()
    b.say(closing=Closing("has closed it", at_once=False))
    assert a.look().refusal is Refusal.CLOSED
    assert b.take().refusal is Refusal.CLOSED


# -- an actor without memory -------------------------------------------------------------------------------------------


def forget(job: Job) -> None:
    """Ray has started the actor anew."""
    job.core = AgentRendezvous("job")
    job.wake = float("inf")


def test_a_new_core_learns_of_the_round_that_goes_on() -> None:
    job = Job(1, 3)
    a, b = job.round_of("a", "b")
    b.join()
    a.join()
    job.settle(a, b)
    forget(job)
    job.wait(30, a, b)
    assert a.look() == Answer(a.report.number, formed=True)
    b.leave()
    assert a.look().reform
    a.join()
    assert a.place == Place(3, 0, 1, "host-a", 3)


def test_a_member_lost_together_with_the_core_is_missed() -> None:
    job = Job(1, 2)
    a, _b = job.round_of("a", "b")
    forget(job)
    job.wait(SILENCE - 1, a)
    assert not a.look().reform
    job.wait(2, a)
    assert (a.look().reform, a.answer.reason) == (True, "1 of its 2 nodes have not reported")


def test_a_member_that_starts_anew_is_the_first_that_a_new_core_hears_of() -> None:
    job = Job(1, 4)
    a, b, _c = job.round_of("a", "b", "c")
    forget(job)
    b.join()  # and _c is gone
    assert b.look().place is None  # nobody knows that there is an a
    a.repeat()
    assert (a.answer.reform, a.answer.reason) == (True, "b starts its workers anew")
    job.wait(5, a, b)
    assert b.look().place is None
    a.join()
    assert ranks(a, b) == [(0, 2), (1, 2)]
    assert a.place.round == 2


def test_a_new_core_does_not_wait_for_ever_for_what_it_has_forgotten() -> None:
    job = Job(1, 4)
    a, _b = job.round_of("a", "b")
    forget(job)
    a.join()
    job.wait(2.9, a)
    assert a.look().place is None
    job.wait(0.2, a)
    assert ranks(a) == [(0, 1)]


def test_a_newcomer_that_a_new_core_hears_of_first() -> None:
    job = Job(1, 3, last_call=0.0)
    (a,) = job.round_of("a")
    forget(job)
    b = job.agent("b")
    b.join()  # a round 1 of its own, for a moment
    assert a.repeat().reform
    a.join()
    assert ranks(b, a) == [(0, 2), (1, 2)]


def test_time_does_not_run_backwards() -> None:
    job = Job()
    job.agent("a").join()
    with pytest.raises(AssertionError, match="backwards"):
        job.core.handle(Tick(-1.0))


# -- any order ---------------------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Agents do what handlers do, at any time, and die at any time; reports come late and twice; memory is lost."""

    @initialize(low=st.integers(1, 3), more=st.integers(0, 2), last_call=st.sampled_from([0.0, 5.0]))
    def begin(self, low: int, more: int, last_call: float) -> None:
        self.job = Job(low, low + more, last_call)
        self.agents: list[Agent] = []
        self.old: list[Report] = []
        self.names = 0

    def act(self, agent: Agent) -> None:
        """What a handler does next with the newest answer."""
        answer = agent.look()
        if answer.refusal is not None:
            agent.leave()
            self.agents.remove(agent)
        elif agent.report.place is None and answer.place is not None:
            agent.take()
        elif agent.report.place is not None and answer.reform:
            agent.join()

    @rule()
    def an_agent_comes(self) -> None:
        if len(self.agents) < 6:
            self.names += 1
            agent = self.job.agent(f"n{self.names}")
            self.agents.append(agent)
            agent.join()

    @precondition(lambda self: self.agents)
    @rule(data=st.data())
    def an_agent_goes_on(self, data: st.DataObject) -> None:
        agent = data.draw(st.sampled_from(self.agents))
        self.old.append(agent.report)
        self.act(agent)

    @precondition(lambda self: self.agents)
    @rule(data=st.data())
    def workers_fail(self, data: st.DataObject) -> None:
        agent = data.draw(st.sampled_from(self.agents))
        if agent.report.place is not None and agent.look().formed:
            agent.join()

    @precondition(lambda self: self.agents)
    @rule(data=st.data(), quietly=st.booleans())
    def an_agent_dies(self, data: st.DataObject, quietly: bool) -> None:
        agent = data.draw(st.sampled_from(self.agents))
        self.agents.remove(agent)
        self.old.append(agent.report)
        if not quietly:
            agent.leave()

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def a_report_comes_late(self, data: st.DataObject) -> None:
        late = data.draw(st.sampled_from(self.old[-6:]))
        if any(agent.report.agent == late.agent for agent in self.agents):  # of the dead, a new core may believe it
            self.job.send(Heard(self.job.now, late))

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0, 12.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.job.wait(seconds, *self.agents)

    @precondition(lambda self: self.agents)
    @rule(really=st.integers(0, 5))
    def memory_is_lost(self, really: int) -> None:
        if really == 0:
            forget(self.job)
            self.agents[0].repeat()

    @invariant()
    def holds(self) -> None:
        job, core = self.job, self.job.core
        low, high = job.settings.min_agents, job.settings.max_agents
        taken = [agent for agent in self.agents if agent.report.place]
        formed = [agent for agent in taken if agent.look().formed and not agent.answer.reform]
        rounds = {(agent.place.round, agent.place.host, agent.place.port, agent.place.size) for agent in formed}
        assert len(rounds) <= 1, "two rounds at once"
        assert len({agent.place.rank for agent in formed}) == len(formed), "two agents with one rank"
        for agent in formed:
            assert low <= agent.place.size <= high
            assert 0 <= agent.place.rank < agent.place.size
        assert set(core.places) <= set(core._agents)
        for agent in self.agents:
            answer = agent.look()
            assert answer.place is None or answer.place.rank < answer.place.size
            assert not (answer.place and answer.refusal)
            assert not answer.reform or answer.reason, "a reason is always told"

    def teardown(self) -> None:
        """Left alone, everybody who may be in a round is in one, or has been told why not. Then all go."""
        job = self.job
        for _ in range(60):
            for agent in list(self.agents):
                self.act(agent)
            job.wait(3.0, *self.agents)
        training = [agent for agent in self.agents if agent.report.place and agent.look().formed]
        if len(self.agents) >= job.settings.min_agents:
            assert len(training) == min(len(self.agents), job.settings.max_agents), [a.look() for a in self.agents]
            assert not any(agent.look().reform for agent in training)
        for agent in self.agents:
            agent.leave()
        job.wait(2 * SILENCE)
        assert job.core.deserted or job.core.settings is None


AnyOrder.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnyOrder = AnyOrder.TestCase
