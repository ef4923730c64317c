"""What test_is_reshape_gamma.py runs in gloo processes: the same samples in uneven shards over 1, 2 and 4."""

import json
import sys

import torch
import torch.distributed as dist

from optsample_triton import is_reshape
from tests import forked

CUTS = {1: (0, 60), 2: (0, 7, 60), 4: (0, 7, 7, 41, 60)}  # the second of four processes holds nothing
MASKED_OUT = slice(50, 55)


def samples():
    g = torch.Generator().manual_seed(0)
    log_pi, log_mu, reward = torch.randn(3, 60, generator=g)
    mask = torch.ones(60)
    mask[MASKED_OUT] = 0
    return 3 * log_pi - 400, log_mu - 400, reward, mask


def outcomes(part: slice, group) -> list[float]:
    """Everything that is summed over a group, from one process's shard."""
    log_pi, log_mu, reward, mask = (x[part] for x in samples())
    loss, metrics = is_reshape.is_reshape_loss(log_pi, log_mu, reward, mask=mask, group=group, reduction="sum")
    log_w = log_pi - log_mu
    exact = is_reshape.gamma_exact(log_w, 0.4, mask=mask, group=group)
    star = is_reshape.gamma_star(log_w, 0.2, mask=mask, group=group)
    moment = is_reshape.log_mean_weight(log_w, 0.5, mask=mask, group=group)
    spread = is_reshape.weights(log_w, 0.7, mask=mask, group=group)
    return [float(x) for x in (loss, *metrics.values(), exact, star, moment, *spread)]


def run(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=forked.LIMIT)
    found = {}
    for size, cuts in CUTS.items():
        group = dist.new_group(list(range(size)))
        if rank < size:
            found[size] = outcomes(slice(cuts[rank], cuts[rank + 1]), group)
    results.put((rank, found))
    dist.destroy_process_group()


def main(store: str) -> None:
    """Prints a JSON list: for each rank the numbers by size of the group."""
    print(json.dumps(forked.results_by_rank(run, 4, store)))


if __name__ == "__main__":
    main(sys.argv[1])
