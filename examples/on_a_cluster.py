"""Elastic training on a Ray cluster, as a job: what rayjob.yaml and slurm.sh start, and `ray job submit` by hand.

    ray job submit --working-dir examples -- python on_a_cluster.py --workers 2:4 --checkpoints /shared/digits

It connects as Ray does by itself, goes on from the last checkpoint, and fails if the run fails.
"""

from __future__ import annotations

import argparse
import logging
import os

import digits  # beside this file: the workers find it in the job's working directory, or in their image

import raylaunch


def bounds(text: str) -> int | tuple[int, int]:
    """`4`, or `2:4` for a minimum and a maximum."""
    smallest, _, largest = text.partition(":")
    return (int(smallest), int(largest)) if largest else int(smallest)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=bounds, default=1, metavar="N|MIN:MAX", help="how many ranks")
    parser.add_argument("--per-node", type=int, default=1, metavar="N", help="ranks on each of several nodes")
    parser.add_argument("--checkpoints", required=True, metavar="FOLDER", help="the same place from every node")
    parser.add_argument("--steps", type=int, default=600)
    return parser.parse_args(arguments)


def main() -> None:
    chosen = parse()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("raylaunch").setLevel(logging.INFO)
    os.makedirs(chosen.checkpoints, exist_ok=True)
    result = raylaunch.run(
        digits.train,
        args=(*digits.load(), chosen.checkpoints),
        kwargs={"steps": chosen.steps},
        num_workers=chosen.workers,
        workers_per_node=chosen.per_node,
        preload=("torch", "torch._dynamo"),
        timeouts=raylaunch.Timeouts(stop=2),  # `ray job stop` leaves a driver three seconds
    )
    print(
        f"{result.world_size} workers, {result.restarts} restarts, {result[0]['accuracy']:.1%} of the images recognised"
    )


if __name__ == "__main__":
    main()
