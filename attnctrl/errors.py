"""The one error class."""


class AttnCtrlError(ValueError):
    """What was asked, what was found, every reason, then a line ``HINT:`` with the call that mends it."""
