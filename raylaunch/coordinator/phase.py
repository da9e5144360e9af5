"""What a run, or the launcher that holds its workers, is doing. What may follow what: the table of `machine.py`."""

from __future__ import annotations

import enum


class Phase(str, enum.Enum):
    """What the run as a whole is doing."""

    NEW = "new"
    HELD = "held"  # a launcher between its runs: it keeps its groups, and a warm spare in every seat
    RENDEZVOUS = "rendezvous"  # gathering ready seats until the bounds hold
    ROLL_CALL = "roll call"  # finding out which spares are still there
    FORMING = "forming"  # promoted workers load the function and join the process group
    RUNNING = "running"  # every rank is in train_fn, or past it
    SETTLING = "settling"  # the run has failed; its root cause is being settled
    STOPPING = "stopping"  # somebody asked the run to end; workers have time to do so
    DONE = "done"


#: Phases in which a generation is live, that is, not fenced.
LIVE_PHASES = frozenset({Phase.FORMING, Phase.RUNNING, Phase.STOPPING})
