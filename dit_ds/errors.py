"""Exceptions that end a command, and their exit statuses."""


class UserError(Exception):
    """The request was wrong. The message is one line: what is wrong and what to do. Exit status 2."""


class RunFailed(Exception):
    """The request was right but the run failed (a check that does not hold, a training that diverged). Exit status 1."""


class RankFailed(Exception):
    """RunFailed on one rank alone: the others continue, so no collective may follow. Exit status 1."""


class Interrupted(Exception):
    """A signal stopped the run after it saved a checkpoint; --resume continues it. Exit status 75."""
