"""Triton kernels; imported as ``kvtool.kernels`` (see pyproject.toml), never as ``kernels``."""

__version__ = "0"  # transformers probes any importable `kernels`; 0 reads as "not Hugging Face's"
