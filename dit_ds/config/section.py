"""What all sections of the configuration have: keys that are not declared are refused, and numbers have bounds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# Every number has a range. Where nothing else bounds it from above, these do: what C code can count, wait for and hold
MOST = 2**31 - 1
LONGEST = 10_000_000  # seconds, or minutes
FP32 = 3e38


class Section(BaseModel):
    """A section of the configuration; keys that are not declared are refused."""

    # an empty text is mostly a variable of a script that was not set
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False, str_min_length=1)
