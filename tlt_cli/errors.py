"""The one exception that users see as a plain line: what is wrong, what was expected, what to do."""


class TltError(ValueError):
    """A request or an input that tlt refuses; the message is the whole explanation."""


class UsageError(TltError):
    """A combination of options that can never work (exit code 2, like any other bad usage)."""
