"""Learning with a budget of samples: the loop of the README, drawn from four laws, with reshaped weights.

Tabular policies, one row of logits per prompt. All seeds and learning rates of a method run side by side as rows of
one batch: [runs, PROMPTS, V]. gamma* is each run's own. A method's rate is chosen on seeds of its own, which
no curve is taken from.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import optsample_triton as ost
from optsample_triton.is_reshape import gamma_closed_form

from .rows import Claim, Finding, Row, Scale, Table, judged, percent

PROMPTS, V, POINTS = 16, 32, 40
RATES = (0.03125, 0.125, 0.5, 2.0, 8.0, 32.0, 128.0)  # per prompt: each has its own row of logits
RHO_MIN = 0.3


class Task(NamedTuple):
    """Start and target [seeds, PROMPTS, V] and, where answers are checked, the right one [seeds, PROMPTS]."""

    start: Tensor
    target: Tensor
    right: Tensor | None


class Method(NamedTuple):
    law: str
    weights: str
    gamma: float | None  # None is gamma* of the batch
    kernel: str = "power"
    centred: bool = True

    @property
    def name(self) -> str:
        return f"{self.law}, {self.weights}"


def checked_answers(seeds: int, start_from: int = 21) -> Task:
    """One right answer per prompt, likely for the target (0.8) and rare for the policy."""
    g = torch.Generator().manual_seed(start_from)
    start, target = torch.randn(2, seeds, PROMPTS, V, generator=g)
    right = torch.randint(V, (seeds, PROMPTS), generator=g)
    start.scatter_(-1, right[..., None], -0.5)
    others = target.scatter(-1, right[..., None], -torch.inf).logsumexp(-1, keepdim=True)
    target.scatter_(-1, right[..., None], others + float(np.log(4.0)))
    return Task(start, target, right)


def preference(seeds: int, start_from: int = 22) -> Task:
    """Two policies with independent tastes; the reward is log(pi_t/pi_theta)."""
    g = torch.Generator().manual_seed(start_from)
    start, target = 1.5 * torch.randn(2, seeds, PROMPTS, V, generator=g)
    return Task(start, target, None)


TUNING, TUNING_SEEDS = 1021, 5  # of the tasks that rates are chosen on
TASKS: dict[str, Callable[..., Task]] = {"checked answers": checked_answers, "towards the target": preference}
# Progress is 0 at the start and 1 at the goal; these shares of it count as learned.
THRESHOLD = 0.5

ON_POLICY = Method("π_θ", "on-policy", 1.0)
METHODS = (
    ON_POLICY,
    *(
        Method(law, *weights)
        for law in ("q*", "mixture", "π_t")
        for weights in (("γ = 0", 0.0), ("γ*", None), ("γ = 1", 1.0), ("sech²", 1.0, "sech2"))
    ),
)
# Reward-weighted likelihood with the reward as it is: what passes the check is imitated.
FILTERED = tuple(Method(law, "filtered SFT", 0.0, "power", False) for law in ("q*", "mixture", "π_t"))


def draw(law: str, policy: Tensor, target: Tensor, seed: int) -> ost.Sample:
    """One token per row."""
    if law == "π_θ":
        return ost.sample(policy, target, alpha=1.0, seed=seed)
    if law == "π_t":
        return ost.sample(policy, target, alpha=0.0, seed=seed)
    if law == "q*":
        return ost.sample(policy, target, seed=seed)
    mixed = torch.logaddexp(policy.log_softmax(-1), target.log_softmax(-1))
    return ost.sample(mixed, mixed, alpha=1.0, seed=seed)


def progress(task: Task, policy: Tensor, first: Tensor | None) -> Tensor:
    """Of each run [runs]: how far the right answer came towards its share under the target, or the KL towards 0."""
    log_pi, log_t = policy.log_softmax(-1), task.target.log_softmax(-1)
    if task.right is None:
        divergence = (log_pi.exp() * (log_pi - log_t)).sum((-1, -2))
        return divergence if first is None else 1 - divergence / first
    chosen = (log_pi.gather(-1, task.right[..., None]), log_t.gather(-1, task.right[..., None]))
    mine, theirs = (x.exp().mean((-1, -2)) for x in chosen)
    return mine if first is None else (mine - first) / (theirs - first)


def step(method: Method, task: Task, policy: Tensor, rates: Tensor, seed: int) -> Tensor:
    """The policy [runs, PROMPTS, V] after one sample per prompt."""
    policy = policy.detach().requires_grad_()
    drawn = draw(method.law, policy.detach(), task.target, seed)
    if task.right is None:
        # under the policy and the target themselves, whatever was drawn from
        reward = _log_prob(task.target, drawn.token) - _log_prob(policy.detach(), drawn.token)
    else:
        reward = (drawn.token == task.right).float()
    if method.centred:
        reward = reward - reward.mean(-1, keepdim=True)
    log_pi = ost.token_logprobs(policy, drawn.token)
    assert isinstance(log_pi, Tensor)
    gamma: float | Tensor
    if method.gamma is None:
        gamma = gamma_closed_form((log_pi - drawn.log_q).detach().var(-1, keepdim=True), RHO_MIN)
    else:
        gamma = method.gamma
    losses, _ = ost.is_reshape_loss(
        log_pi, drawn.log_q, reward, gamma=gamma, kernel=method.kernel, width=2.0, reduction="none"
    )
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return policy.detach() - rates[:, None, None] * gradient


def _log_prob(logits: Tensor, token: Tensor) -> Tensor:
    value = ost.token_logprobs(logits, token)
    assert isinstance(value, Tensor)
    return value


def curves(method: Method, task: Task, rates: Sequence[float], steps: int, seed: int) -> Tensor:
    """Progress [rates, seeds, steps + 1] along the budget."""
    count, seeds = len(rates), len(task.start)
    right = None if task.right is None else task.right.repeat(count, 1)
    runs = Task(task.start.repeat(count, 1, 1), task.target.repeat(count, 1, 1), right)
    each = torch.tensor(rates).repeat_interleave(seeds)
    policy = runs.start
    first = progress(runs, policy, None)
    points = [progress(runs, policy, first)]
    for index in range(steps):
        policy = step(method, runs, policy, each, seed + index)
        points.append(progress(runs, policy, first))
    return torch.stack(points, -1).reshape(count, seeds, -1).double().nan_to_num(-1.0)


def needed(curve: Tensor) -> Tensor:
    """Samples until the threshold is first passed, linear between steps; inf if never: [..., steps + 1] -> [...]."""
    over = curve >= THRESHOLD
    index = over.double().argmax(-1).clamp(min=1)
    after = curve.gather(-1, index[..., None])[..., 0]
    before = curve.gather(-1, index[..., None] - 1)[..., 0]
    at = index - 1 + ((THRESHOLD - before) / (after - before).clamp(min=1e-12)).clamp(0, 1)
    return torch.where(over.any(-1), at * PROMPTS, torch.inf)


def learned(name: str, method: Method) -> Callable[[Scale], list[Row]]:
    def measure(scale: Scale) -> list[Row]:
        tried = curves(method, TASKS[name](min(TUNING_SEEDS, scale.seeds), TUNING), RATES, scale.steps, TUNING)
        best = RATES[int(tried.mean((-1, -2)).argmax())]  # the rate with the largest mean progress over the budget
        (curve,) = curves(method, TASKS[name](scale.seeds), [best], scale.steps, 0)
        samples, rows = needed(curve), [Row(f"method, {name}", method.name, "rate", best)]
        deviation = curve.std(0) * _student(len(curve)) / len(curve) ** 0.5
        for quantity, values in (("mean", curve.mean(0)), ("half width", deviation)):
            # the shape is in the first samples, so that the points shown are even in the logarithm
            shown = sorted({0, *(round(scale.steps ** (i / POINTS)) for i in range(POINTS + 1))})
            rows += [Row(f"curve, {name}", method.name, quantity, float(values[i]), i * PROMPTS) for i in shown]
        rows += [Row(f"needed, {name}", method.name, "samples", v, i) for i, v in enumerate(samples.tolist())]
        rows.append(
            Row(f"method, {name}", method.name, "share that learned", float(samples.isfinite().double().mean()))
        )
        # stability: at all learning rates, on the seeds that they are tried on
        rows.append(
            Row(
                f"method, {name}",
                method.name,
                "share of all runs that learned",
                float(needed(tried).isfinite().double().mean()),
            )
        )
        rows.append(Row(f"method, {name}", method.name, "progress at the end", float(curve[:, -1].mean())))
        return rows

    return measure


def _student(n: int) -> float:
    stats: Any = importlib.import_module("scipy.stats")
    return float(stats.t.ppf(0.975, n - 1))


def methods_of(name: str) -> tuple[Method, ...]:
    return (*METHODS, *FILTERED) if name == "checked answers" else METHODS


PARTS = {f"{name}, {method.name}": learned(name, method) for name in TASKS for method in methods_of(name)}


class Efficiency(NamedTuple):
    """On-policy samples over the method's: the median over seeds and its 95 % interval."""

    ratio: float
    low: float
    high: float


def efficiency(table: Table, name: str, method: Method) -> Efficiency:
    """By the bootstrap over seeds, whose start and target the two methods share."""
    _, base = table.curve(f"needed, {name}", ON_POLICY.name, "samples")
    _, own = table.curve(f"needed, {name}", method.name, "samples")
    with np.errstate(invalid="ignore"):
        ratios = np.array(base) / np.array(own)
    ratios[np.isnan(ratios)] = 1.0  # neither learned
    rng = np.random.default_rng(0)
    medians = np.median(ratios[rng.integers(len(ratios), size=(2000, len(ratios)))], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975], method="nearest")
    return Efficiency(float(np.median(ratios)), float(low), float(high))


def in_words(found: Efficiency) -> str:
    if found.ratio == 0.0:
        return "not within the budget"
    if found.ratio == float("inf"):
        return "on-policy not within the budget"
    ratio, low, high = (f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in found)
    return f"{ratio}× ({low} to {high})"


def _claimed(table: Table) -> Finding:
    words, inside, every = [], [], []
    for name in TASKS:
        for method in methods_of(name):
            if method.law == "q*":
                found = efficiency(table, name, method)
                every.append((name, method))
                if found.ratio >= 2:
                    inside.append(f"{name} with {method.weights}")
                words.append(f"{name}, {method.weights}: {in_words(found)}")
    return judged(
        "samples on-policy over samples from q* until half the way, median over seeds with 95 % interval: "
        + "; ".join(words),
        len(inside) == len(every),
        f"holds (and more) for {'; '.join(inside)}; without gain for the others" if inside else "does not hold",
    )


def _off_policy(table: Table) -> Finding:
    words, failed, count = [], [], 0
    for name in TASKS:
        for method in methods_of(name):
            if method.law == "π_t":
                found = efficiency(table, name, method)
                count += 1
                if found.ratio == 0:
                    failed.append(f"{name} with {method.weights}")
                words.append(f"{name}, {method.weights}: {in_words(found)}")
    return judged(
        "samples on-policy over samples from π_t: " + "; ".join(words),
        len(failed) == count,
        f"holds for {'; '.join(failed)}; something is learned in the others" if failed else "does not hold",
    )


def _stable(table: Table) -> Finding:
    words, better, even, count = [], 0, 0, 0
    for name in TASKS:
        for weights in (method.weights for method in methods_of(name) if method.law == "q*"):
            star, off = (
                table.value(f"method, {name}", f"{law}, {weights}", "share of all runs that learned")
                for law in ("q*", "π_t")
            )
            better, even, count = better + (star > off), even + (star == off), count + 1
            words.append(f"{name}, {weights}: {percent(star)} and {percent(off)}")
    return judged(
        f"share of runs that learn, over seeds and {len(RATES)} learning rates, from q* and from π_t: "
        + "; ".join(words),
        better == count,
        f"holds in {better} of {count} settings, {even} alike",
    )


def _mixture(table: Table) -> Finding:
    better, count, ahead = 0, 0, []
    for name in TASKS:
        for star, mixed in zip(
            (m for m in methods_of(name) if m.law == "q*"),
            (m for m in methods_of(name) if m.law == "mixture"),
            strict=True,
        ):
            mine, theirs = efficiency(table, name, star), efficiency(table, name, mixed)
            better += mine.ratio > theirs.ratio
            count += 1
            if mine.ratio > theirs.ratio:
                ahead.append(f"{name}, {star.weights} ({in_words(mine)}; mixture {in_words(theirs)})")
    return judged(
        f"samples on-policy over samples needed (tables above): q* ahead of the arithmetic mixture in {better} of"
        f" {count} settings: {'; '.join(ahead) or 'none'}",
        better == count,
        f"holds in {better} of {count} settings",
    )


CLAIMS = (
    Claim(
        "Against on-policy sampling the sample efficiency is 2 to 5 times higher.",
        "first-principles note, summary",
        _claimed,
    ),
    Claim(
        "From π_t nothing is learned: the importance weights are too small.",
        "derivation §1.2; first-principles note, core problem",
        _off_policy,
    ),
    Claim("Against off-policy sampling learning is markedly more stable.", "first-principles note, summary", _stable),
    Claim("Among ways between the models the geometric mean is the one to sample from.", "derivation §5.5", _mixture),
)
