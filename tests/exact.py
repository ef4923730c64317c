"""The definitions on a row of each model, on mpmath numbers: the caller's precision is the answer's."""

from __future__ import annotations

from collections.abc import Sequence

import mpmath as mp

Numbers = list[mp.mpf]


class Exact:
    """Rows of logits; -inf takes a token out of a model. KLs and ESS are over the common support, as in the package."""

    def __init__(self, a: Sequence[float], b: Sequence[float]) -> None:
        self.common = [k for k, pair in enumerate(zip(a, b, strict=True)) if min(pair) > -mp.inf]
        self.p, self.t = ([mp.mpf(x) for x in self._softmax([mp.mpf(x) for x in row])] for row in (a, b))
        self.p_common, self.t_common = (self._softmax([mp.mpf(row[k]) for k in self.common]) for row in (a, b))
        self.log_ratio = [mp.log(x) - mp.log(y) for x, y in zip(self.p_common, self.t_common, strict=True)]

    @staticmethod
    def _softmax(x: Numbers) -> Numbers:
        top = max(x)
        weights = [mp.exp(value - top) if value > -mp.inf else mp.mpf(0) for value in x]
        return [weight / mp.fsum(weights) for weight in weights]

    def mixture(self, alpha: mp.mpf) -> Numbers:
        """q of the common tokens."""
        pairs = zip(self.p_common, self.t_common, strict=True)
        return self._softmax([alpha * mp.log(x) + (1 - alpha) * mp.log(y) for x, y in pairs])

    def log_q(self, alpha: mp.mpf) -> Numbers:
        """Of all tokens."""
        values = [mp.mpf("-inf")] * len(self.p)
        for token, probability in zip(self.common, self.mixture(alpha), strict=True):
            values[token] = mp.log(probability)
        return values

    def kl_difference(self, alpha: mp.mpf) -> mp.mpf:
        return mp.fdot(self.mixture(alpha), self.log_ratio)

    def log_ess_ratio(self, alpha: mp.mpf) -> mp.mpf:
        q = self.mixture(alpha)
        inverse_theta = mp.fsum(x * x / z for x, z in zip(self.p_common, q, strict=True))
        inverse_t = mp.fsum(y * y / z for y, z in zip(self.t_common, q, strict=True))
        return mp.log(inverse_t) - mp.log(inverse_theta)

    def root(self, method: str, bits: int = 70) -> mp.mpf:
        rising = self.kl_difference if method == "kl_symmetry" else self.log_ess_ratio
        low, high = mp.mpf(0), mp.mpf(1)
        for _ in range(bits):
            middle = (low + high) / 2
            if rising(middle) < 0:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def variance(self, alpha: mp.mpf) -> mp.mpf:
        """psi''"""
        q, mean = self.mixture(alpha), self.kl_difference(alpha)
        return mp.fsum(z * (d - mean) ** 2 for z, d in zip(q, self.log_ratio, strict=True))

    def alpha_gradients(self, alpha: mp.mpf) -> tuple[Numbers, Numbers]:
        """Of the KL-symmetric alpha in both rows of logits, with F = psi' and dalpha = -dF / psi''."""
        q, mean, variance = self.mixture(alpha), self.kl_difference(alpha), self.variance(alpha)
        of_theta, of_t = ([mp.mpf(0)] * len(self.p) for _ in range(2))
        for place, token in enumerate(self.common):
            centred = self.log_ratio[place] - mean
            of_theta[token] = (self.p_common[place] - q[place] * (1 + alpha * centred)) / variance
            of_t[token] = (q[place] * (1 - (1 - alpha) * centred) - self.t_common[place]) / variance
        return of_theta, of_t

    def diagnostics(self, alpha: mp.mpf) -> dict[str, mp.mpf]:
        q = self.mixture(alpha)

        def kl(x: Numbers, y: Numbers) -> mp.mpf:
            return mp.fsum(u * (mp.log(u) - mp.log(v)) for u, v in zip(x, y, strict=True))

        def entropy(x: Numbers) -> mp.mpf:
            return -mp.fsum(u * mp.log(u) for u in x if u > 0)

        def overlap(x: Numbers) -> mp.mpf:
            return mp.fsum(min(x[token], v) for token, v in zip(self.common, q, strict=True))

        def ess(x: Numbers) -> mp.mpf:
            return 1 / mp.fsum(u * u / v for u, v in zip(x, q, strict=True))

        powers = (x**alpha * y ** (1 - alpha) for x, y in zip(self.p_common, self.t_common, strict=True))
        return {
            "log_z": mp.log(mp.fsum(powers)),
            "kl_theta": kl(q, self.p_common),
            "kl_t": kl(q, self.t_common),
            "ess_theta": ess(self.p_common),
            "ess_t": ess(self.t_common),
            "entropy_theta": entropy(self.p),
            "entropy_t": entropy(self.t),
            "entropy_q": entropy(q),
            "overlap_theta": overlap(self.p),
            "overlap_t": overlap(self.t),
        }
