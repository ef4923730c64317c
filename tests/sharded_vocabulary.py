"""What test_sharded.py runs in gloo processes: the vocabulary in uneven parts over 2 and 4 of them."""

import pickle
import sys

import torch
import torch.distributed as dist

import optsample_triton as ost
from tests import forked

VOCAB = 20_000
# Ends of the parts; one border lies inside a tile, one part is a single token, one is beyond vocab_size.
CUTS = {2: (0, 7_001, VOCAB), 4: (0, 8_193, 8_194, 17_000, VOCAB)}
CUT_VOCAB = 16_500


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Usual, far and near rows, masks, and every status."""
    g = torch.Generator().manual_seed(0)
    theta, t = (3 * torch.randn(2, 12, VOCAB, generator=g)).unbind(0)
    t[1] = theta[1] + 0.01 * torch.randn(VOCAB, generator=g)  # narrow
    theta[2, 123], t[2, 9_000] = 60.0, 60.0  # far apart, the peaks in different parts
    theta[3, :8_000], t[3, 12_000:] = -torch.inf, -torch.inf  # one part of two has no common support
    t[4] = theta[4]  # identical
    theta[5, :10_000], t[5, 10_000:] = -torch.inf, -torch.inf  # disjoint
    theta[6, 19_999] = torch.nan  # invalid, seen by the last process alone
    theta[7] *= 30  # weights at 1/2 underflow
    theta[8, 5] = t[8, 5] = 40.0  # both models sure of one token
    theta[9] = theta[9] * 5 + 300
    return theta, t


def options() -> dict[str, dict]:
    return {
        "kl_symmetry": {},
        "ess_balance": {"method": "ess_balance"},
        "entropy": {"method": "entropy"},
        "fixed": {"alpha": 0.3},
        "bisect": {"algorithm": "bisect"},
        "temperatures": {"temperature_theta": 0.7, "temperature_t": 2.0},
        "padded": {"vocab_size": CUT_VOCAB},
    }


def samplings() -> dict[str, dict]:
    seeds = torch.arange(12) * 7919
    return {
        "one": {"seed": 3},
        "many": {"seed": seeds, "offset": 5, "num_samples": 400},
        "filtered": {"seed": seeds, "temperature": 0.6, "min_p": 0.05, "num_samples": 50},
        "padded": {"seed": 1, "num_samples": 50, "vocab_size": CUT_VOCAB},
    }


def tokens() -> torch.Tensor:
    return torch.tensor([0, 7_000, 7_001, 8_192, 8_193, 8_194, 16_999, 17_000, 19_999, -100, VOCAB, -1])


def outcomes(theta: torch.Tensor, t: torch.Tensor, group=None, part: slice = slice(None)) -> dict:
    """The results of every function that takes a group, with or without one."""
    local = theta[:, part], t[:, part]
    found: dict = {"double": ost.solve(*(x.double() for x in local), diagnostics=True, group=group)}
    for name, law in options().items():
        found[f"solve {name}"] = ost.solve(*local, diagnostics=True, group=group, **law)
    found["half"] = ost.solve(*(x.half() for x in local), group=group)
    found["three"] = ost.solve(*(x[:, None].expand(-1, 2, -1) for x in local), group=group)
    for name, draw in samplings().items():
        found[f"sample {name}"] = ost.sample(*local, group=group, **draw)
    leaves = [x.double().requires_grad_() for x in local]
    pairs = ost.token_logprobs(
        leaves[0], tokens(), temperature=0.9, entropy=True, logits_t=leaves[1], temperature_t=1.5, group=group
    )
    found["token_logprobs"] = tuple(tuple(x.detach() for x in pair) for pair in pairs)
    weights = torch.linspace(0.5, 2.0, 12).double()
    loss = sum((weights * x.nan_to_num()).sum() for pair in pairs for x in pair)
    found["gradients"] = tuple(torch.autograd.grad(loss, leaves))
    return found


class Counted:
    """How many collectives are made."""

    def __init__(self):
        self.calls, self._gather = 0, dist.all_gather
        dist.all_gather = self

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self._gather(*args, **kwargs)


def collectives(part: slice, group) -> dict[str, int]:
    """The collectives of one call on ordinary rows, including the one that compares shapes."""
    g = torch.Generator().manual_seed(1)
    theta, t = torch.randn(2, 8, VOCAB, generator=g)[..., part].unbind(0)
    zipf = (-torch.arange(1, VOCAB + 1.0).log())[part]
    counted, counts = Counted(), {}
    for name, call in {
        "random": lambda: ost.solve(theta, t, group=group),
        "close": lambda: ost.solve(zipf + 0.3 * theta, zipf + 0.3 * t, group=group),
        "sample": lambda: ost.sample(theta, t, seed=0, group=group),
        "token_logprobs": lambda: ost.token_logprobs(theta, torch.arange(8), group=group),
    }.items():
        counted.calls = 0
        call()
        counts[name] = counted.calls
    dist.all_gather = counted._gather
    return counts


def errors(part: slice, group) -> dict[str, str]:
    """What each process says if arguments are wrong in all, wrong only in the last one, or different."""
    theta, t = (x[:, part] for x in rows())
    rank = dist.get_rank(group)
    last = rank == dist.get_world_size(group) - 1
    said = {}
    for name, call in {
        "vocab_size": lambda: ost.solve(theta, t, vocab_size=VOCAB + 1, group=group),
        "rows": lambda: ost.solve(theta[: 3 + rank], t[: 3 + rank], group=group),
        "inplace": lambda: ost.token_logprobs(theta, tokens(), inplace_backward=True, group=group),
        "no columns": lambda: ost.solve(*(x[:, : 0 if last else None] for x in (theta, t)), group=group),
        "none to draw": lambda: ost.sample(*(x[:, : 0 if last else None] for x in (theta, t)), seed=0, group=group),
        "none to read": lambda: ost.token_logprobs(theta[:, : 0 if last else None], tokens(), group=group),
        "longer": lambda: ost.sample(theta, t[:, : -1 if last else None], seed=0, group=group),
        "type": lambda: ost.sample(theta, t, seed=0.5 if last else 0, group=group),
        "dtype": lambda: ost.solve(*(x.double() if last else x for x in (theta, t)), group=group),
        "seed": lambda: ost.sample(theta, t, seed=rank, group=group),
        "seeds": lambda: ost.sample(theta, t, seed=torch.full((12,), rank), group=group),
        "temperature": lambda: ost.solve(theta, t, temperature_t=1.0 + last, group=group),
        "tokens": lambda: ost.token_logprobs(theta, tokens() if last else tokens().flip(0), group=group),
        "models": lambda: ost.token_logprobs(theta, tokens(), logits_t=t if last else None, group=group),
        "function": lambda: (
            ost.solve(theta, t, group=group) if last else ost.token_logprobs(theta, tokens(), group=group)
        ),
        "length": lambda: ost.solve(theta, t, vocab_size=10.0, group=group),
    }.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def run(rank: int, store: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=forked.LIMIT)
    found: dict = {}
    theta, t = rows()
    for size, cuts in CUTS.items():
        group = dist.new_group(list(range(size)))
        if rank < size:
            part = slice(cuts[rank], cuts[rank + 1])
            found[size] = outcomes(theta, t, group, part)
            found[size, "collectives"] = collectives(part, group)
            found[size, "errors"] = errors(part, group)
    results.put((rank, pickle.dumps(found)))
    dist.destroy_process_group()


def main(store: str, into: str) -> None:
    found = forked.results_by_rank(run, 4, store)
    with open(into, "wb") as file:
        pickle.dump([pickle.loads(each) for each in found], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
