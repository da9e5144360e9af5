"""`ElasticLauncher` and what belongs to it: an in-code launcher in the style that people know, on top of a run.

    launcher = raylaunch.ElasticLauncher("cuda:*").freeze()
    values = launcher(worker, launcher)

The map: `devices` reads device strings, `params` knows the parameters, `launcher` is the launcher, with `standing` and
`current`; `launch` makes a run of it, `call` is what a rank calls, `eager` a launch without Ray; `events` and `steps`
are what driver and ranks tell one another between the steps, `progress` what the driver shows of it; `batch`, `debug`
and `remote_pdb` help. Neither Ray nor torch is imported with it.
"""

from raylaunch.elastic.batch import split_batch
from raylaunch.elastic.current import get_current_launcher
from raylaunch.elastic.debug import set_trace
from raylaunch.elastic.events import Events
from raylaunch.elastic.launcher import ElasticLauncher

__all__ = ["ElasticLauncher", "Events", "get_current_launcher", "set_trace", "split_batch"]
