"""What went wrong between this machine and the hub, in words and with the remedy."""

from __future__ import annotations

import errno

from pertoken.hub.names import HubName
from pertoken.text import reason, shown

__all__ = ["explained"]

_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def explained(error: BaseException, name: HubName) -> str:
    """One line of an error that huggingface_hub raised over `name`."""
    from huggingface_hub import constants, errors

    it = "model" if name.kind == "model" else "set of data"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return f"not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; unset it, or download it first"
    if isinstance(error, errors.GatedRepoError) or _status(error) == 403:
        return (
            "the hub gives it only to those who have accepted its terms; accept them on its page there, and log in "
            "with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {shown(name.revision or 'main')}; name a branch, a tag or a commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        also = "" if name.text.startswith("hf://") else "no such folder here, and "
        return (
            f"{also}the hub has no such {it}, or shows it to some accounts alone; correct the name, or log in with "
            "`hf auth login`"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = _status(error)
        remedy = "try again later" if status >= 500 or status == 429 else "check HF_ENDPOINT and the login"
        return f"the hub answers {status} ({reason(error)}); {remedy}"
    if isinstance(error, errors.HFValidationError):
        return f"no name that the hub could have ({reason(error)}); correct it"
    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
        return f"{constants.HF_HUB_CACHE}: cannot be written ({error.strerror}); free space, or set HF_HOME elsewhere"
    what = f"{type(error).__name__}: {reason(error)}"
    return f"the hub does not answer ({what}); check the network and HF_ENDPOINT, or name a local copy"


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))
