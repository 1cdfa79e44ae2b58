"""Quality gates: ``kld>0.05`` fails a run, for continuous integration.

A gate names what must not happen. It is applied to the calibrations under test, never to the baselines.
"""

import difflib
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtool.errors import InputError

METRICS = {
    "kld": "mean KL divergence, nats",
    "kld_median": "median KL divergence, nats",
    "kld_p99": "99th percentile of the KL divergence, nats",
    "kld_p999": "99.9th percentile of the KL divergence, nats",
    "kld_max": "largest KL divergence of a token, nats",
    "ppl_ratio": "PPL(compressed) / PPL(full)",
    "same_top": "share of tokens with the same most likely next token",
    "rms_dp": "RMS change of the probability of the true token",
    "attention_error": "relative L2 error of the attention output, mean over layers",
    "attention_error_max": "the same, worst layer",
    "bits": "stored bits per value",
    "passkey": "share of pass keys recalled",
    "passkey_low": "lower end of its 95 % interval",
    "multikey": "share of labelled keys recalled",
    "multikey_low": "lower end of its 95 % interval",
}
_COMPARE = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Gate:
    """The run fails if ``metric`` compares so with ``limit``."""

    metric: str
    relation: str
    limit: float

    def failure(self, row: Mapping[str, Any]) -> str | None:
        """Why ``row`` does not pass, or None. A metric that was not measured does not pass either."""
        value = row.get(self.metric)
        if value is None or math.isnan(value):
            return f"{row['name']}: {self.metric} was not measured, so '{self}' cannot pass"
        if _COMPARE[self.relation](value, self.limit):
            return f"{row['name']}: {self.metric} = {value:.4g}, and '{self}' must not hold"
        return None

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{self.limit:g}"


def parse_gates(texts: Sequence[str]) -> list[Gate]:
    """Gates from ``kld>0.05``; several may stand in one text, separated by commas.

    Raises:
        InputError: not of that form, or an unknown metric (the nearest name is suggested).
    """
    gates = []
    for text in (part for whole in texts for part in whole.split(",")):
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+.\de]+)\s*", text)
        try:
            limit = float(match[3]) if match else math.nan
        except ValueError:
            limit = math.nan
        if match is None or math.isnan(limit):
            raise InputError(f"--fail-if '{text}': expected a metric, a relation and a number, such as 'kld>0.05'")
        if match[1] not in METRICS:
            near = difflib.get_close_matches(match[1], METRICS, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else "there are: " + ", ".join(METRICS)
            raise InputError(f"--fail-if '{text}': no metric '{match[1]}'; {hint}")
        gates.append(Gate(match[1], match[2], limit))
    return gates
