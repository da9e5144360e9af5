"""Which CPUs a rank is bound to, on machines that are made of files."""

from __future__ import annotations

import pytest

from raylaunch.worker.numa import NoBinding, cpus_for

#: Two sockets with two NUMA nodes each, four cores of two threads on each node: CPUs n*4.. and their siblings + 16.
NODES = {0: "0-3,16-19", 1: "4-7,20-23", 2: "8-11,24-27", 3: "12-15,28-31"}
#: Six GPUs: three on node 0, none on node 1, two on node 2, one on node 3.
GPUS = {
    "0000:01:00.0": 0,
    "0000:02:00.0": 0,
    "0000:03:00.0": 0,
    "0000:81:00.0": 2,
    "0000:82:00.0": 2,
    "0000:c1:00.0": 3,
}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path):
    for node, cpus in NODES.items():
        write(tmp_path / f"sys/devices/system/node/node{node}/cpulist", cpus)
    for cpu in range(32):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}"
        core = cpu % 16
        write(folder / "topology/physical_package_id", core // 8)
        write(folder / "topology/thread_siblings_list", f"{core},{core + 16}")
        first = core // 2 * 2  # two cores share a cache
        write(folder / "cache/index0/type", "Data")
        write(folder / "cache/index0/level", 1)
        write(folder / "cache/index0/shared_cpu_list", f"{core},{core + 16}")
        write(folder / "cache/index3/type", "Unified")
        write(folder / "cache/index3/level", 3)
        write(folder / "cache/index3/shared_cpu_list", f"{first}-{first + 1},{first + 16}-{first + 17}")
    for bus, node in GPUS.items():
        (tmp_path / f"proc/driver/nvidia/gpus/0000:{bus}:00.0").mkdir(parents=True)
        write(tmp_path / f"sys/bus/pci/devices/0000:{bus.lower()}:00.0/numa_node", node)
    return tmp_path


def cpus(machine, mode, gpu=None, *, rank=0, ranks=1, allowed=range(32)):
    return cpus_for(mode, gpu=gpu, local_rank=rank, local_world_size=ranks, allowed=allowed, root=str(machine))


@pytest.mark.parametrize(
    ("mode", "gpu", "wanted"),
    [
        ("node", 0, [0, 1, 2, 3, 16, 17, 18, 19]),
        ("node", 5, [12, 13, 14, 15, 28, 29, 30, 31]),
        ("socket", 3, [*range(8, 16), *range(24, 32)]),
        ("exclusive", 0, [0, 1, 16, 17]),  # four cores for three GPUs: the first has one more
        ("exclusive", 1, [2, 18]),
        ("exclusive", 2, [3, 19]),
        ("exclusive", 4, [10, 11, 26, 27]),
        ("core-complex", 0, [0, 1, 16, 17]),
        ("core-complex", 1, [2, 3, 18, 19]),
        ("core-complex", 2, [0, 1, 16, 17]),  # more GPUs than caches
    ],
)
def test_near_its_gpu(machine, mode, gpu, wanted):
    assert cpus(machine, mode, gpu) == wanted


def test_on_cpus_ranks_are_split_evenly_over_the_nodes(machine):
    found = [cpus(machine, "node", rank=rank, ranks=8) for rank in range(8)]
    assert [one[0] for one in found] == [0, 0, 4, 4, 8, 8, 12, 12]
    exclusive = [cpus(machine, "exclusive", rank=rank, ranks=8) for rank in range(8)]
    assert sorted(cpu for one in exclusive for cpu in one) == list(range(32))
    assert all(len(one) == 4 for one in exclusive)


def test_only_what_the_process_may_use(machine):
    assert cpus(machine, "node", 0, allowed=[1, 2, 9]) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"mode": "node", "gpu": 9}, "doesn't say where GPU 9 is"),
        ({"mode": "node", "gpu": 0, "allowed": [9]}, "may use no CPU of NUMA node 0"),
        ({"mode": "exclusive", "gpu": 0, "allowed": [0, 16]}, "1 cores for 3 workers"),
    ],
)
def test_what_cannot_be_bound_says_why(machine, arguments, why):
    with pytest.raises(NoBinding, match=why):
        cpus(machine, **arguments)


def test_one_node_is_no_binding(tmp_path):
    write(tmp_path / "sys/devices/system/node/node0/cpulist", "0-3")
    with pytest.raises(NoBinding, match="one NUMA node"):
        cpus(tmp_path, "node", 0)
