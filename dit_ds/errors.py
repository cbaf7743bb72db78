"""The two ways a command can end badly, and nothing else."""


class UserError(Exception):
    """The request was wrong. The message is one line: what is wrong and what to do. Exit status 2."""


class RunFailed(Exception):
    """The request was right but the run failed (a check that does not hold, a training that diverged). Exit status 1."""
