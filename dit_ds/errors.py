"""The ways a command can end other than well, and nothing else."""


class UserError(Exception):
    """The request was wrong. The message is one line: what is wrong and what to do. Exit status 2."""


class RunFailed(Exception):
    """The request was right but the run failed (a check that does not hold, a training that diverged). Exit status 1."""


class RankFailed(Exception):
    """As RunFailed, of one rank alone: the others don't know, so nothing is done together any more. Exit status 1."""


class Interrupted(Exception):
    """A signal asked the run to stop; it saved and can go on with --resume. Exit status 75: try again."""
