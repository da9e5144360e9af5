"""Where a process stands in its launch, as an ElasticLauncher tells it: on the driver, rank 0 of 1."""

from __future__ import annotations

from raylaunch.context import get_context
from raylaunch.elastic.params import Params


class Standing:
    """The properties of a launcher that are the process's own. In a launch every launcher has the same."""

    @property
    def config(self) -> Params:
        """The parameters, as they were given."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """The process's rank in the group."""
        return get_context().rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return get_context().world_size

    @property
    def local_rank(self) -> int:
        """The rank among those of the node."""
        return self.rank % self.local_world_size  # ranks are contiguous, and every node has as many

    @property
    def local_world_size(self) -> int:
        """How many ranks the node has."""
        return get_context().local_world_size

    @property
    def group_rank(self) -> int:
        """The node's number."""
        return get_context().node_rank

    @property
    def group_world_size(self) -> int:
        """How many nodes there are."""
        return self.world_size // self.local_world_size

    @property
    def role_name(self) -> str:
        """The `role`."""
        return self.config.role

    @property
    def role_rank(self) -> int:
        """The rank: all ranks have one role."""
        return self.rank

    @property
    def role_world_size(self) -> int:
        """How many ranks have the role: all."""
        return self.world_size

    @property
    def master_addr(self) -> str:
        """Rank 0's address; on the driver, what was given."""
        context = get_context()
        return context.master_addr if context.run_id else self.config.master_addr

    @property
    def master_port(self) -> int | None:
        """The port of rank 0's store; on the driver, what was given."""
        context = get_context()
        return context.master_port if context.run_id else self.config.master_port

    @property
    def restart_count(self) -> int:
        """How many failures the launch has been charged with."""
        return get_context().restart_count

    @property
    def max_restarts(self) -> int:
        """How many it survives."""
        return self.config.max_restarts

    @property
    def rdzv_id(self) -> str:
        """The run's id; on the driver, what was given."""
        return get_context().run_id or self.config.rdzv_id
