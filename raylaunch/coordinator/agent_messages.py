"""What torchrun's agents and their rendezvous say to each other, and what its core takes and gives. Plain, frozen data.

Every `Report` says all that an agent is and wants, and an agent repeats it while nothing changes. Every `Answer` says
all that there is to say to one. An agent that changes its mind numbers the new report higher.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What all agents of a job must agree on. Times are in seconds."""

    min_agents: int
    max_agents: int
    #: How long the first round waits for more agents once the minimum is there.
    last_call: float
    #: An agent repeats its report this often ...
    keep_alive: float
    #: ... and is gone when nothing has been heard of it for this long.
    silence: float


@dataclass(frozen=True, slots=True)
class Wish:
    """An agent wants to be in the next round. Its store is open there already, in case that it becomes rank 0."""

    number: int  # counts the agent's wishes
    after: int  # the round that the agent was in last; 0: in none
    host: str
    port: int
    timeout: float


@dataclass(frozen=True, slots=True)
class Place:
    """An agent's place in a round, and where the store of rank 0 is."""

    round: int
    rank: int
    size: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Closing:
    """An agent closes the rendezvous: no other round will form. `at_once`: the live round is to end, too."""

    reason: str
    at_once: bool


@dataclass(frozen=True, slots=True)
class Report:
    """All that an agent is and wants. It has a wish, or a place that it has taken, or neither and leaves."""

    agent: str
    name: str  # for people
    number: int
    settings: Settings
    wish: Wish | None = None
    place: Place | None = None
    closing: Closing | None = None
    leaving: str = ""  # why, if it is


class Refusal(str, enum.Enum):
    """Why an agent gets no place, ever."""

    CLOSED = "closed"
    DISAGREES = "disagrees"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent is told: always all that there is to say to its report."""

    number: int  # the report's
    place: Place | None = None  # for its wish
    formed: bool = False  # every member of its round has taken its place
    reform: bool = False  # its round is over
    closed: bool = False
    refusal: Refusal | None = None
    reason: str = ""  # of the refusal, or of the round's end


@dataclass(frozen=True, slots=True)
class Connected:
    """The process between an agent and its rendezvous: it has reached Ray, which knows the agent's node as `host`."""

    host: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The process between an agent and its rendezvous: there is no contact, and there will be none."""

    reason: str


@dataclass(frozen=True, slots=True)
class Heard:
    """A report has come."""

    at: float
    report: Report


@dataclass(frozen=True, slots=True)
class Tick:
    """It is as late as `Decision.wake_at`."""

    at: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What one event led to. `changed`: answers may have."""

    changed: bool
    reason: str
    wake_at: float
