"""Models of the Hugging Face hub: from the local cache where they are there, and no long wait where the hub can't be reached."""

from __future__ import annotations

import functools
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_SECONDS = 4.0  # in which the hub must answer


def local_first(load: Callable[..., T], name: str, fetch: bool = True, **options: Any) -> T:
    """Call `load`, a `from_pretrained`: from the folder `name` or the local cache, else from the hub.

    A model in the cache is not compared with the hub's newest.

    Args:
        fetch: if it is not there, ask the hub, should that be within reach: `load` itself would try for half a minute.
        options: of `load`.
    Raises:
        Exception: that of `load`.
    """
    try:
        return load(name, local_files_only=True, **options)
    except Exception:  # of what is not there, or is damaged, the libraries raise many kinds
        if not fetch or os.path.isdir(name) or not hub_answers():
            raise
    return load(name, local_files_only=False, **options)


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached: asked once a process, for a few seconds; not at all where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    answered: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_SECONDS).close()
        except urllib.error.HTTPError:  # an answer
            pass
        except urllib.error.URLError as e:
            if not isinstance(e.reason, ssl.SSLError):  # else there is one, whose certificate the library may accept
                return
        except OSError:
            return
        answered.append(True)

    if constants.HF_HUB_OFFLINE:
        return False
    thread = threading.Thread(target=ask, daemon=True)  # looking up the name has no time limit
    thread.start()
    thread.join(_SECONDS + 1)
    return bool(answered)
