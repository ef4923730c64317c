"""The documents of the repository: examples run, twins agree, links resolve, formulas and numbers hold."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from docs import write_reference

ROOT = Path(__file__).resolve().parents[1]
MARKDOWN = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in ("build", "dist") for part in path.relative_to(ROOT).parts)
]
TWINS = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
REFERENCE = ROOT / "docs" / "reference.md"
OTHERS_MODULES = ("pytest", "verl")  # what the pages run by python -m and this repository does not hold

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^(#{1,6}) +(.+?) *$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)


def prose(path: Path) -> str:
    """The text outside code fences."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """GitHub's fragments for a file's headings: lower case, punctuation dropped, spaces to hyphens."""
    titles = [title for _, title in HEADING.findall(prose(path))]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_files_are_found():
    assert {"README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/theory.md"} <= {
        name_of(path) for path in MARKDOWN
    }


def test_readme_is_short():
    for path in TWINS:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150, name_of(path)


def run(path: Path) -> list[dict[str, object]]:
    """The names after each Python block: the blocks share one namespace and run in order, as a reader types them."""
    fences = FENCE.findall(path.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    states = []
    for language, code in fences:
        # What needs a library of its own runs in its environment, in tests/integrations; the loop of the README runs
        # in tests/test_is_reshape_loop.py.
        if language != "python" or re.search(r"from vllm|\.(integrations|pipeline)|is_reshape_loss", code):
            continue
        if "psis" in code and importlib.util.find_spec("arviz_stats") is None:  # not to be had for Python 3.10
            continue
        exec(compile(code, f"{name_of(path)}, Python block {len(states)}", "exec"), namespace)
        states.append(dict(namespace))
    return states


def test_readme_examples_run():
    states = run(TWINS[0])
    assert len(states) == 2
    import optsample_triton as ost
    from reference import truth

    solution, log_q, drawn = (states[0][name] for name in ("solution", "log_q", "drawn"))
    torch.manual_seed(0)
    exact = truth.solve(*torch.randn(2, 4, 32_000).unbind(0))
    assert solution.status.tolist() == [ost.Status.OK] * 4
    torch.testing.assert_close(solution.alpha.double(), exact.alpha, atol=2e-6, rtol=0.0)
    torch.testing.assert_close(solution.kl_theta, solution.kl_t, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(4), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(drawn.log_q, log_q.gather(-1, drawn.token[:, None])[:, 0], atol=2e-3, rtol=0.0)
    assert drawn.w_theta.shape == (4,)
    assert states[1]["alpha_star"].item() == pytest.approx(0.5, abs=1e-5)
    assert states[1]["q_star"][0].tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


def test_reference_examples_run():
    assert len(run(REFERENCE)) >= 8


def test_reference_is_what_the_source_says():
    text = REFERENCE.read_text(encoding="utf-8")
    assert write_reference.filled(text) == text, "run python -m docs.write_reference"
    named = [name for _, name, _ in write_reference.BLOCK.findall(text)]
    assert sorted(named) == sorted(write_reference.public())


def test_public_names_are_those_that_import_gives():
    """The page reads the source; this asks the package, where it can be imported without a framework."""
    import optsample_triton as ost

    modules = {"integrations", "is_reshape", "pipeline"}
    names = {name for name in ost.__all__ if name not in modules | {"__version__"}}
    names |= {f"is_reshape.{name}" for name in ost.is_reshape.__all__ if name not in names}
    names |= {f"pipeline.{name}" for name in ost.pipeline.__all__}
    found = [name for name in write_reference.public() if not name.startswith("integrations.")]
    assert sorted(found) == sorted(names)


def test_every_public_function_has_an_example():
    """A name that the examples of the page or of the README call or spell. Results need none of their own."""
    text = "".join(path.read_text(encoding="utf-8") for path in (REFERENCE, TWINS[0]))
    examples = "".join(code for language, code in FENCE.findall(text) if language in ("python", "pycon"))
    results = re.compile(r"class \w+\((NamedTuple|ModelOutput)\)")
    blocks = {name: block for name, block in re.findall(r"<!-- api: ([\w.]+) -->\n(.*?)<!-- /api -->", text, re.DOTALL)}
    without = [
        name
        for name, block in blocks.items()
        if not results.search(block) and not re.search(rf"\b{name.split('.')[-1]}\b", examples)
    ]
    assert without == []


def test_reference_names_every_command():
    from optsample_triton.cli import VERBS

    rows = re.findall(r"^\| `optsample ([a-z]+)` \|", prose(REFERENCE), re.MULTILINE)
    assert sorted(rows) == sorted(VERBS)


def test_readme_twins_have_the_same_skeleton():
    english, chinese = (path.read_text(encoding="utf-8") for path in TWINS)
    assert FENCE.findall(english) == FENCE.findall(chinese)
    levels = [[len(marks) for marks, _ in HEADING.findall(prose(path))] for path in TWINS]
    assert levels[0] == levels[1]
    # Every part between two headings holds the same number of formulas, table rows and bullets.
    for pattern in (MATH, re.compile(r"^\|", re.MULTILINE), re.compile(r"^\* ", re.MULTILINE)):
        counts = [[len(pattern.findall(part)) for part in HEADING.split(prose(path))[::3]] for path in TWINS]
        assert counts[0] == counts[1], pattern.pattern
    for link in (LINK, IMAGE):
        links = [{to for to in link.findall(prose(path)) if not to.startswith("README")} for path in TWINS]
        assert links[0] == links[1]


def test_status_table_matches_the_code():
    from optsample_triton import Status

    rows = re.findall(r"^\| `([A-Z_]+)` \| (\d) \|", prose(REFERENCE), re.MULTILINE)
    assert {name: int(value) for name, value in rows} == {status.name: status.value for status in Status}


@pytest.mark.parametrize("path", MARKDOWN, ids=name_of)
def test_figures_that_a_page_names_exist(path: Path):
    text = path.read_text(encoding="utf-8")
    for figure in {*IMAGE.findall(text), *re.findall(r"[\w./-]+\.svg", text)}:
        places = (path.parent / figure, ROOT / figure)
        assert any(place.is_file() for place in places), f"{figure} in {name_of(path)}"


@pytest.mark.parametrize("path", MARKDOWN, ids=name_of)
def test_commands_that_a_page_names_exist(path: Path):
    """`make x` is in the Makefile, and `python -m x` of this repository is a module that can be run."""
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {*re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE)} <= targets
    for module in re.findall(r"python -m ([\w.]+\w)", text):
        if module.split(".")[0] in OTHERS_MODULES:
            continue
        file = ROOT.joinpath(*module.split("."))
        found = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
        assert found.is_file(), f"python -m {module} in {name_of(path)}"
        assert "__main__" in found.name or '__name__ == "__main__"' in found.read_text(encoding="utf-8"), module


@pytest.mark.parametrize("path", MARKDOWN, ids=name_of)
def test_relative_links_resolve(path: Path):
    for link in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, fragment = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link} in {name_of(path)}"
        if fragment:
            assert fragment in anchors(target), f"{link} in {name_of(path)}"


@pytest.mark.parametrize("path", MARKDOWN, ids=name_of)
def test_math_survives_markdown(path: Path):
    """GitHub reads Markdown before math: no escapes, stars or opening underscores inside a formula."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    for match in MATH.finditer(text):
        formula = match[1] or match[2]
        assert not re.search(r"\\[^A-Za-z]|\*|[^\w\s]_|\s_", formula), formula
        assert formula.count("{") == formula.count("}"), formula
    assert "$" not in MATH.sub("", text)


def test_theory_lists_22_corrections():
    table = prose(ROOT / "docs" / "theory.md").split("## 13.")[1]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0]) for row in rows] == list(range(1, 23))
    assert all(len(row) == 4 and all(cell.strip() for cell in row) for row in rows)
    for row in rows:
        for file in re.findall(r"`([\w/]+\.py)`", row[3]):
            assert (ROOT / file).is_file(), file


# docs/theory.md: its formulas and numbers in float64, written out here without the package or the oracle.


def logits(seed: int, vocab: int = 40, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = scale * torch.randn(2, vocab, generator=generator, dtype=torch.float64)
    return a, b


def mixture(a: Tensor, b: Tensor, t: float) -> Tensor:
    return torch.softmax(t * a + (1 - t) * b, -1)


def psi(a: Tensor, b: Tensor, t: float) -> float:
    log_theta, log_t = a.log_softmax(-1), b.log_softmax(-1)
    return torch.logsumexp(t * log_theta + (1 - t) * log_t, -1).item()


def psi_slope(a: Tensor, b: Tensor, t: float) -> float:
    return (mixture(a, b, t) @ (a.log_softmax(-1) - b.log_softmax(-1))).item()


def cumulants(a: Tensor, b: Tensor, t: float) -> tuple[float, float, float, float]:
    """kappa_2 to kappa_5 of d under q_t."""
    q, d = mixture(a, b, t), a - b
    m2, m3, m4, m5 = ((q @ (d - q @ d) ** k).item() for k in range(2, 6))
    return m2, m3, m4 - 3 * m2**2, m5 - 10 * m2 * m3


def kl(p: Tensor, q: Tensor) -> float:
    return (p @ (p.log() - q.log())).item()


def bisect(function, low: float = 0.0, high: float = 1.0) -> float:
    """The root of a rising function."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2


def chernoff_point(a: Tensor, b: Tensor) -> float:
    return bisect(lambda t: psi_slope(a, b, t))


def ess_balance_point(a: Tensor, b: Tensor) -> float:
    return bisect(lambda t: psi(a, b, -t) - psi(a, b, 2 - t))


def h(y: Tensor) -> Tensor:
    return torch.expm1(y) - y


@pytest.mark.parametrize("alpha", [-0.4, 0.0, 0.3, 1.0, 1.7])
def test_closed_forms(alpha: float):
    a, b = logits(0)
    q, pi_theta, pi_t = mixture(a, b, alpha), a.softmax(-1), b.softmax(-1)
    value, slope = psi(a, b, alpha), psi_slope(a, b, alpha)
    assert kl(q, pi_theta) == pytest.approx(-(1 - alpha) * slope - value, abs=1e-12)
    assert kl(q, pi_t) == pytest.approx(alpha * slope - value, abs=1e-12)
    ess_theta, ess_t = 1 / (pi_theta**2 / q).sum().item(), 1 / (pi_t**2 / q).sum().item()
    assert ess_theta == pytest.approx(math.exp(-value - psi(a, b, 2 - alpha)), rel=1e-11)
    assert ess_t == pytest.approx(math.exp(-value - psi(a, b, -alpha)), rel=1e-11)
    log_norm = torch.logsumexp(alpha * a + (1 - alpha) * b, -1)
    entropy = log_norm - q @ b - alpha * (q @ (a - b))
    assert entropy.item() == pytest.approx(-(q @ q.log()).item(), abs=1e-12)
    assert (pi_t @ (pi_theta / pi_t) ** alpha).log().item() == pytest.approx(value, abs=1e-12)


def test_pareto_identity_minimax_and_domination():
    a, b = logits(1)
    pi_theta, pi_t, other = a.softmax(-1), b.softmax(-1), logits(2)[0].softmax(-1)
    for alpha in (0.0, 0.2, 0.9, 1.0):
        weighted = alpha * kl(other, pi_theta) + (1 - alpha) * kl(other, pi_t)
        assert weighted == pytest.approx(kl(other, mixture(a, b, alpha)) - psi(a, b, alpha), abs=1e-12)
    star = chernoff_point(a, b)
    information = -psi(a, b, star)
    assert kl(mixture(a, b, star), pi_theta) == pytest.approx(information, abs=1e-12)
    assert max(kl(other, pi_theta), kl(other, pi_t)) > information
    assert all(psi(a, b, star) < psi(a, b, star + shift) for shift in (-1e-3, 1e-3))
    # The member of the family that is as far from pi_theta as `other` is nearer to pi_t.
    near = mixture(a, b, 0.6) * 0.9 + other * 0.1
    alpha = bisect(lambda t: kl(near, pi_theta) - kl(mixture(a, b, t), pi_theta))
    assert kl(mixture(a, b, alpha), pi_t) < kl(near, pi_t)


def test_geometric_path_is_longer_than_the_great_circle():
    theta, t = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    path = torch.stack([mixture(theta.log(), t.log(), k / 2000) for k in range(2001)]).sqrt()
    length = 2 * (path[1:] - path[:-1]).norm(dim=-1).sum().item()
    shortest = 2 * math.acos((theta * t).sqrt().sum().item())
    assert (round(length, 4), round(shortest, 4)) == (1.1435, 1.1370)


def test_near_delta_against_uniform():
    def star(peak: float, vocab: int) -> tuple[float, float]:
        theta = torch.full((vocab,), (1 - peak) / (vocab - 1), dtype=torch.float64)
        theta[0] = peak
        entropy = -(theta @ theta.log()).item()
        return chernoff_point(theta.log(), torch.zeros_like(theta)), entropy / (entropy + math.log(vocab))

    peaks = [star(peak, 10_000) for peak in (0.9, 0.99, 0.999, 0.9999, 0.999999)]
    assert [round(alpha, 3) for alpha, _ in peaks] == [0.687, 0.617, 0.554, 0.5, 0.418]
    assert [round(formula, 4) for _, formula in peaks] == [0.1192, 0.0158, 0.0019, 0.0002, 0.0]
    assert [round(star(0.99, 10**k)[0], 3) for k in (2, 3, 4, 5)] == [0.5, 0.565, 0.617, 0.658]


def test_log_ess_is_twice_the_kl():
    a, b = logits(3, vocab=10_000, scale=1.0)
    star = chernoff_point(a, b)
    log_ess = -psi(a, b, star) - psi(a, b, 2 - star)
    assert log_ess / psi(a, b, star) == pytest.approx(2.0, abs=0.02)


def test_ess_balance_departs_three_times_as_far():
    generator = torch.Generator().manual_seed(4)
    b = 2 * torch.randn(40, generator=generator, dtype=torch.float64)
    a = b + 0.02 * torch.randn(40, generator=generator, dtype=torch.float64) ** 2
    ratio = (ess_balance_point(a, b) - 0.5) / (chernoff_point(a, b) - 0.5)
    assert ratio == pytest.approx(3.0, abs=0.01)
    # Far apart the two are no longer tied, and KL symmetry leaves the ESS pair unbalanced.
    ratios = []
    for seed in range(20):
        a, b = logits(seed, vocab=100, scale=3.0)
        star = chernoff_point(a, b)
        ratios.append(math.exp(psi(a, b, -star) - psi(a, b, 2 - star)))
    assert sum(0.9 <= ratio <= 1.1 for ratio in ratios) <= 6


def test_importance_weights():
    a, b = logits(5)
    log_ratio, q = a.log_softmax(-1) - b.log_softmax(-1), mixture(a, b, 0.3)
    torch.testing.assert_close(a.log_softmax(-1) - q.log(), 0.7 * log_ratio + psi(a, b, 0.3))
    torch.testing.assert_close(b.log_softmax(-1) - q.log(), -0.3 * log_ratio + psi(a, b, 0.3))
    log_w = torch.tensor([-2.0, 0.5], dtype=torch.float64)
    gamma = 1e-9
    torch.testing.assert_close(torch.expm1(gamma * log_w) / gamma, log_w, atol=1e-8, rtol=0.0)


def test_gradients():
    a, b = logits(6, vocab=6)
    star = chernoff_point(a, b)
    q, d = mixture(a, b, star), a - b
    centred = d - q @ d
    variance = (q @ centred**2).item()
    slope_theta = q * (1 + star * centred) - a.softmax(-1)
    slope_t = q * (-1 + (1 - star) * centred) + b.softmax(-1)
    kl_theta, kl_t = kl(q, a.softmax(-1)), kl(q, b.softmax(-1))
    excess_theta, excess_t = h((1 - star) * centred - kl_theta), h(-star * centred - kl_t)
    torch.testing.assert_close(slope_theta, q * ((2 * star - 1) * centred + kl_theta - excess_theta))
    torch.testing.assert_close(slope_t, q * ((1 - 2 * star) * centred - kl_t + excess_t))
    step = 1e-5
    for i in range(6):
        unit = step * torch.eye(6, dtype=torch.float64)[i]
        for slope, direct, up, down in (
            (slope_theta, star * (q - a.softmax(-1)), (a + unit, b), (a - unit, b)),
            (slope_t, (1 - star) * (q - b.softmax(-1)), (a, b + unit), (a, b - unit)),
        ):
            difference = (chernoff_point(*up) - chernoff_point(*down)) / (2 * step)
            assert difference == pytest.approx(-slope[i].item() / variance, abs=1e-8)
            difference = (psi(*up, chernoff_point(*up)) - psi(*down, chernoff_point(*down))) / (2 * step)
            assert difference == pytest.approx(direct[i].item(), abs=1e-8)


@pytest.mark.parametrize("centre", [0.0, 1.3])
def test_forms_without_the_subtraction(centre: float):
    a, b = logits(7)
    for x in (0.2, 0.5, 0.9):
        q, delta = mixture(a, b, x), a - b - centre
        mean = q @ delta
        r1, r2 = q @ h((1 - x) * delta), q @ h(-x * delta)
        m1, m2 = (1 - x) * mean + r1, -x * mean + r2
        lam1, lam2 = torch.log1p(m1) - m1, torch.log1p(m2) - m2
        assert (r2 - r1 + lam2 - lam1).item() == pytest.approx(psi_slope(a, b, x), abs=1e-12)

        def gap(s: float, q: Tensor = q, delta: Tensor = delta, mean: Tensor = mean) -> float:
            return ((q @ torch.exp(s * delta)).log() - s * mean).item()

        assert gap(1 - x) == pytest.approx((r1 + lam1).item(), abs=1e-12)
        assert gap(1 - x) == pytest.approx(kl(q, a.softmax(-1)), abs=1e-12)
        assert gap(-x) == pytest.approx(kl(q, b.softmax(-1)), abs=1e-12)
        assert -x * gap(1 - x) - (1 - x) * gap(-x) == pytest.approx(psi(a, b, x), abs=1e-12)
        for y in (-0.7, 1.4):
            away = psi(a, b, x) + gap(y - x) + (y - x) * psi_slope(a, b, x)
            assert away == pytest.approx(psi(a, b, y), abs=1e-11)
        assert math.exp(2 * gap(1 - x) - gap(2 - 2 * x)) == pytest.approx(
            math.exp(-psi(a, b, x) - psi(a, b, 2 - x)), rel=1e-11
        )


def test_cumulant_rule_and_its_worst_case():
    for width in (0.1, 0.2, 0.4):
        errors, refined = [], []
        for k in range(1, 200):
            weights = torch.tensor([k / 200, 1 - k / 200], dtype=torch.float64).log()
            delta = torch.tensor([0.0, width], dtype=torch.float64)
            a, b = weights + delta / 2, weights - delta / 2  # so that q_1/2 has these weights
            k2, k3, _, k5 = cumulants(a, b, 0.5)
            first = 0.5 + k3 / (24 * k2)
            star = chernoff_point(a, b)
            errors.append(abs(star - first))
            refined.append(abs(star - first - k5 / (1920 * k2) + k3**3 / (1152 * k2**3)))
        assert max(errors) == pytest.approx(math.sqrt(2) / 2880 * width**3, rel=0.01)
        assert max(refined) <= 9e-6 * width**5 + 1e-12


def test_two_exponentials_make_three_points():
    a, b = logits(8)
    e, f = ((a - a.max()) / 2).exp(), ((b - b.max()) / 2).exp()
    for weights, t in ((f * f, 0.0), (e * f, 0.5), (e * e, 1.0)):
        direct = torch.logsumexp(t * a + (1 - t) * b, -1)
        torch.testing.assert_close(weights.sum().log() + t * a.max() + (1 - t) * b.max(), direct)
        torch.testing.assert_close((weights @ (a - b)) / weights.sum(), mixture(a, b, t) @ (a - b))


def test_a_token_apart():
    """psi from all other tokens: lambda(f(t)) - t lambda(f(1)) - (1 - t) lambda(f(0))."""
    a, b = logits(11)
    rest = torch.arange(len(a)) != 3

    def whole(t):
        return torch.nn.functional.softplus(torch.logsumexp((t * (a - a[3]) + (1 - t) * (b - b[3]))[rest], -1))

    for t in (0.2, 0.5, 0.9):
        line = t * torch.logsumexp(a, -1) + (1 - t) * torch.logsumexp(b, -1)
        psi = torch.logsumexp(t * a + (1 - t) * b, -1) - line
        torch.testing.assert_close(whole(t) - t * whole(1.0) - (1 - t) * whole(0.0), psi)


def test_correction_is_of_third_order():
    a, b = logits(9)
    star = chernoff_point(a, b)
    k2, k3, k4, _ = cumulants(a, b, star)
    expected = k3**2 / (2 * k2**2) - k4 / (6 * k2)
    shift = 0.002
    variance, third, _, _ = cumulants(a, b, star + shift)
    newton = -psi_slope(a, b, star + shift) / variance
    corrected = star + shift + newton * (1 - third / (2 * variance) * newton)
    assert (corrected - star) / shift**3 == pytest.approx(expected, rel=0.05)


def test_one_sided_mask_pushes_unconditioned_alpha_to_the_edge():
    """The slope at 0 with each model over its own tokens: -log pi_t(S) - KL of the conditioned pair."""
    a, b = logits(10)
    keep = torch.arange(40) >= 9
    slope = (b[keep].softmax(-1) @ (a - b)[keep]) - torch.logsumexp(a[keep], -1) + torch.logsumexp(b, -1)
    mass = b.softmax(-1)[keep].sum().log().item()
    divergence = kl(b[keep].softmax(-1), a[keep].softmax(-1))
    assert slope.item() == pytest.approx(-mass - divergence, abs=1e-12)


def test_rejection_needs_the_residual():
    p, pi_t = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    q = mixture(p.log(), pi_t.log(), chernoff_point(p.log(), pi_t.log()))
    accepted = torch.minimum(p, q)
    rate = accepted.sum()
    residual = (q - p).clamp(min=0)
    torch.testing.assert_close(accepted + (1 - rate) * residual / residual.sum(), q)
    biased = accepted + (1 - rate) * q
    assert [round(x, 3) for x in q.tolist()] == [0.440, 0.292, 0.269]
    assert [round(x, 3) for x in biased.tolist()] == [0.554, 0.276, 0.170]
    assert round(rate.item(), 3) == 0.740
    assert round(0.5 * (biased - q).abs().sum().item(), 3) == 0.114


def test_localised_kernels():
    r = torch.linspace(0.0, 4.0, 400_001, dtype=torch.float64)
    kernels = {
        "gaussian": torch.exp(-((r - 1) ** 2) / 2),
        "sech2": 1 / torch.cosh(r - 1) ** 2,
        "cauchy": 1 / (1 + (r - 1) ** 2),
        "laplace": torch.exp(-(r - 1).abs()),
    }
    peaks = {}
    for name, kernel in kernels.items():
        factor = r * kernel
        peaks[name] = (round(factor.max().item(), 3), round(r[factor.argmax()].item(), 3))
    assert peaks == {
        "gaussian": (1.337, 1.618),
        "sech2": (1.198, 1.38),
        "cauchy": (1.207, 1.414),
        "laplace": (1.0, 1.0),
    }
    at_3 = {name: 3 * kernel[300_000].item() for name, kernel in kernels.items()}
    assert min(at_3, key=at_3.get) == "sech2"
    assert at_3["sech2"] == pytest.approx(0.212, abs=5e-4)
    assert 1 / math.cosh(1) ** 2 == pytest.approx(0.420, abs=5e-4)
    # SAPO's gradient factor is sech^2 of width 2 / tau, and r / sqrt(1 + |r - 1|) is not bounded.
    tau, ratio = 1.7, torch.tensor(1.9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(4 / tau * torch.sigmoid(tau * (ratio - 1)), ratio)
    assert slope.item() == pytest.approx(1 / math.cosh(tau * 0.9 / 2) ** 2, rel=1e-12)
    assert 1e6 / math.sqrt(1 + 1e6 - 1) == pytest.approx(1e3)
    # (1 - |x|^p)_+ tends to the indicator of |x| < 1.
    x = torch.tensor([0.0, 0.9, 0.999, 1.0, 1.5], dtype=torch.float64)
    torch.testing.assert_close((1 - x**100_000).clamp(min=0), (x < 1).double(), atol=1e-10, rtol=0.0)


def test_listing_on_identical_rows_stops_at_the_last_midpoint():
    from reference import solve_kl_symmetry

    p = torch.tensor([[0.2, 0.3, 0.5]])
    assert solve_kl_symmetry(p, p).item() == 2.0**-21


def test_listing_loses_confident_rows_to_the_rounding_of_its_inputs():
    from reference import solve_kl_symmetry

    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(2, 20, 1000, generator=generator, dtype=torch.float64)
    odds = math.log(0.9999 / 0.0001) + 0.3 * torch.randn(2, 20, generator=generator, dtype=torch.float64)
    rows[..., 0] = torch.logsumexp(rows[..., 1:], -1) + odds
    exact_theta, exact_t = rows.softmax(-1)
    theta, t = rows.float().softmax(-1)
    alpha = solve_kl_symmetry(theta, t).double()
    same_inputs = solve_kl_symmetry(theta.double(), t.double())
    exact_inputs = solve_kl_symmetry(exact_theta, exact_t)
    assert (alpha - same_inputs).abs().max() < 2e-6
    assert (alpha - exact_inputs).abs().max() > 1e-3


def test_merged_top_k_lists_move_alpha():
    generator = torch.Generator().manual_seed(4)
    zipf = -1.2 * torch.arange(1, 50_258, dtype=torch.float64).log()
    noise = [scale * torch.randn(50_257, generator=generator, dtype=torch.float64) for scale in (1.0, 2.0)]
    a, b = ((zipf + shift).log_softmax(-1) for shift in noise)

    def merged(k: int) -> float:
        tops = a.topk(k), b.topk(k)
        filled = [torch.full_like(a, -20.0).scatter(0, top.indices, top.values) for top in tops]
        union = torch.cat([top.indices for top in tops]).unique()
        return chernoff_point(filled[0][union], filled[1][union])

    assert round(chernoff_point(a, b), 3) == 0.421
    assert [round(merged(k), 3) for k in (20, 100, 1000)] == [0.215, 0.311, 0.381]
