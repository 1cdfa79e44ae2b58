"""Exact binomial limits, and how many independent cases dependent ones are worth."""

from scipy import stats


def clopper_pearson(share: float, cases: float, confidence: float, *, upper: bool = True) -> float:
    """The exact one-sided binomial limit for ``share`` of ``cases``; ``cases`` may be an effective, fractional number.

    Clopper and Pearson 1934, as quantiles of the beta distribution: the truth lies above the upper limit in at most
    1 - ``confidence`` of repetitions.
    """
    hits = share * cases
    if upper:
        return 1.0 if hits >= cases else float(stats.beta.ppf(confidence, hits + 1, cases - hits))
    return 0.0 if hits <= 0 else float(stats.beta.ppf(1 - confidence, hits, cases - hits + 1))


def effective_cases(share: float, standard_error: float, cases: int) -> float:
    """Independent cases with the same standard error; at least 1, at most ``cases``.

    With no hit at all there is no spread to judge by, and ``cases`` itself is returned: pass the number of independent
    units then.
    """
    if standard_error <= 0 or not 0 < share < 1:
        return float(cases)
    return min(float(cases), max(1.0, share * (1 - share) / standard_error**2))
