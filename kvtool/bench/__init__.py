"""What compression costs and gains at decode time: measured on this machine, predicted for others, and said which."""

from kvtool.bench.run import Request, bench
from kvtool.bench.subject import MODEL_SHAPES, Subject, default_subject, subject_of, synthetic_subject

__all__ = ["MODEL_SHAPES", "Request", "Subject", "bench", "default_subject", "subject_of", "synthetic_subject"]
