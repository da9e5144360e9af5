"""`python -m raylaunch.launch`: `raylaunch run` in the way of torch.distributed.launch.

Without --use-env a Python script gets --local-rank=N as its first argument; a file that isn't Python is executed as a
program. --node_rank, --master_addr and --master_port are accepted: ranks and address come from the coordinator.
"""

from __future__ import annotations

import sys

from raylaunch.torchrun.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="raylaunch.launch", launch_style=True))
