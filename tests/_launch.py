"""Start processes with torchrun, on this machine, with a time limit.

A worker file defines ``SCENARIOS``, functions without arguments that return what JSON can
hold, and ends with ``work(SCENARIOS)``. One launch runs all of them, because starting processes
takes longer than most scenarios.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent

STEADY = {"tolerance": math.inf, "n_vectors": 2}
"""Options for comparisons to the last digits between runs that add up in another order. Further
products are decided by comparisons, which the last digit can turn, and shards get none; and
where more vectors than two almost coincide, whitening enlarges rounding.
"""


def torchrun(arguments, n_processes, timeout=300):
    """Run ``torchrun`` and return the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n_processes}", *map(str, arguments)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(TESTS.parent),
    }
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=TESTS.parent
    )


def results(worker, n_processes, root):
    """Run all scenarios of a worker file; return what each rank found, by scenario."""
    folder = root / str(n_processes)
    folder.mkdir()
    finished = torchrun([TESTS / worker, folder], n_processes)
    found = {
        path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("results/*.json"))
    }
    if finished.returncode:
        raise RuntimeError(f"after {list(found)}:\n{finished.stdout}\n{finished.stderr[-6000:]}")
    assert all(len(ranks) == n_processes for ranks in found.values())
    return found


def batches(dtype=torch.float64):
    """Draw batches of images, the same in every process, that 2, 3 and 4 processes can share."""
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(24, 2, 6, 6, generator=generator, dtype=dtype)


def mine(x):
    """Return this process's share of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def differs_between_ranks(tensors):
    """The names of tensors that are not bitwise the same on all ranks."""
    differing = []
    for name, tensor in tensors.items():
        copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, tensor.contiguous())
        if not all(torch.equal(other, tensor) for other in copies):
            differing.append(name)
    return differing


def work(scenarios):
    """Run scenarios in this process, one of those that ``results`` starts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for scenario in scenarios:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, scenario(folder))
        if dist.get_rank() == 0:
            path = folder / "results" / f"{scenario.__name__}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found))
    dist.barrier()  # none leaves before all are done
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads do not always survive the end of the interpreter
