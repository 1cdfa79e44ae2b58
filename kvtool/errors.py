"""Every error a user can cause, and nothing else.

KvtoolError
├── InputError            a path, text, length or option that does not fit
├── CaptureError          a capture that is missing, incomplete, tampered with or too small
├── CalibrationError      an artifact that does not fit its schema, its format or the model
├── MethodOptionError     an unknown method, or an option with a bad name or value
├── ModelError            a model kvtool cannot load, or cannot serve correctly
└── BackendError          a kernel back end that is missing or cannot run this shape

A message says where, what was expected, what was found and what to do, in one sentence. The command line prints
it and exits with 2. Programmer errors stay ``ValueError`` or ``AssertionError`` with their traceback.
"""


class KvtoolError(Exception):
    """The base of every error that is the user's to mend."""


class InputError(KvtoolError):
    """A path, text, length or option does not fit."""


class CaptureError(KvtoolError):
    """A capture is missing, incomplete, tampered with or too small for what was asked."""


class CalibrationError(KvtoolError):
    """An artifact does not fit its schema, its format or the model."""


class MethodOptionError(KvtoolError):
    """An unknown method, or an option with a bad name or value."""


class ModelError(KvtoolError):
    """A model cannot be loaded, or cannot be served correctly."""


class BackendError(KvtoolError):
    """A kernel back end is missing or cannot run this shape."""
