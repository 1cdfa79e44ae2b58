"""What methods claim, measured on real tokens: ``kvtool verify-bound``.

``claims`` holds an artifact to its :class:`~kvtool.methods.base.Claim`s; ``rabitq`` holds RaBitQ's per-pair bound to
its theorem over fresh rotations; ``sparsity`` measures top-p reading; ``certificate`` writes it down to be run again.
"""

from kvtool.bounds.claims import ClaimResult, check_claims
from kvtool.bounds.measures import MEASURES, Evidence

__all__ = ["MEASURES", "ClaimResult", "Evidence", "check_claims"]
