"""Launches of an ElasticLauncher in the background, for stories."""

from __future__ import annotations

import os

from harness import Run

QUICK = {"spares": 0}


class Launch(Run):
    """A launch in the background: the function gets the launcher as its first argument."""

    def __init__(self, cluster, function, launcher, tmp_path, *args):
        self.launcher = launcher.update_params(rdzv_id=f"test-{os.urandom(4).hex()}", log_dir=str(tmp_path / "runs"))
        self.launcher.update_params(run_options={**QUICK, **launcher.config.run_options}).freeze()
        self._args = args
        super().__init__(cluster, function, {"run_id": launcher.config.rdzv_id, "log_dir": launcher.config.log_dir})

    def _carry_out(self, train_fn, arguments):
        return self.launcher(train_fn, self.launcher, *self._args)
