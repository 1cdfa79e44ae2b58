"""What methods claim, measured on real tokens: ``kvtool verify-bound``.

``claims`` holds an artifact to its :class:`~kvtool.methods.base.Claim`s; ``pairs`` holds RaBitQ's per-pair bound to its
theorem over fresh rotations; ``certificate`` writes either down so that it can be run again.
"""

from kvtool.bounds.claims import ClaimResult, check_claims
from kvtool.bounds.measures import MEASURES, Evidence

__all__ = ["MEASURES", "ClaimResult", "Evidence", "check_claims"]
