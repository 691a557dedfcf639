"""Is a repository on the Hugging Face hub, and what does its ``config.json`` state?

Workers fetch it themselves, so a hub that cannot be reached from here proves nothing. That it refuses the
repository does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from hypha.messages import HuggingFace

#: one request to the hub may take this long
HUB_S = 5.0


@dataclass(frozen=True)
class HubFinding:
    """``refused``: the hub refuses, so workers would fail; else it could not be reached. ``fetched``: its
    config.json is in the directory that was given.
    """

    problem: str = ""
    refused: bool = False
    fetched: bool = False


def ask_hub(reference: HuggingFace, directory: Path | None, endpoint: str | None = None) -> HubFinding:
    """Look for the repository and its files; its config.json, if it has one, comes to ``directory``. Blocks.
    ``endpoint``: default as huggingface_hub has it (``HF_ENDPOINT``).
    """
    # imported here: it takes half a second, and most jobs never need it
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub
    from huggingface_hub.utils._http import get_session
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    name = f"{reference.repository}@{reference.revision}"
    # a token of whoever runs the scheduler is not the job's: workers do not have it
    api = HfApi(endpoint=endpoint, token=reference.token or False)
    client = sys.modules[type(get_session()).__module__.partition(".")[0]]
    http_error: type[Exception] = getattr(client, "HTTPError", OSError)
    try:
        info = api.model_info(reference.repository, revision=reference.revision, timeout=HUB_S)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        if missing := [file for file in reference.filenames if file not in files]:
            return HubFinding(f"{name} has no file {', '.join(missing)}; correct filenames", refused=True)
        if directory is None or "config.json" not in files:
            return HubFinding()
        api.hf_hub_download(
            reference.repository,
            "config.json",
            revision=info.sha or reference.revision,
            local_dir=directory,
            etag_timeout=HUB_S,
        )
        return HubFinding(fetched=True)
    except hub.GatedRepoError:
        return HubFinding(f"{name} needs a token that was granted access; set token", refused=True)
    except hub.RevisionNotFoundError:
        return HubFinding(f"the hub has no revision {name}; correct revision", refused=True)
    except hub.RepositoryNotFoundError:
        return HubFinding(
            f"{name} is not on the hub, or private; correct repository, or set a token that may read it",
            refused=True,
        )
    except hub.HFValidationError as exc:
        return HubFinding(f"{name} is no name of a repository: {_first_line(exc)}", refused=True)
    except (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, http_error, OSError) as exc:
        return HubFinding(
            f"the hub cannot be asked for {name} from here ({_first_line(exc)}); workers fetch it themselves"
        )


def _first_line(exc: BaseException) -> str:
    return next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
