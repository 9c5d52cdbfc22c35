"""Publishing a finished folder on the Hugging Face Hub, through huggingface_hub.

In: a folder, and `owner/name`. Out: the repository's address. The token is huggingface_hub's own (`hf auth login`, or
HF_TOKEN). A failed upload leaves the folder as it is, ready for another try.
"""

from __future__ import annotations

from pathlib import Path

from higgs_tune.preprocess.checkpoints.hub import is_repository_name
from higgs_tune.shards.errors import UserError, first_line


def check_push(repository: str) -> None:
    """Make sure, before the work, that the Hub can be reached and knows the user.

    Raises:
        UserError: the name is no `owner/name`, there is no token, or the Hub refuses it.
    """
    if not is_repository_name(repository) or "@" in repository:
        raise UserError("--push_to_hub needs the name of a repository", expected="owner/name", got=repository)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        hint = "Log in with `hf auth login`; or leave out --push_to_hub: the folder can be uploaded later."
        raise UserError(
            f"--push_to_hub: the Hub cannot be used: {first_line(error)}", where=repository, hint=hint
        ) from error


def push(folder: Path, repository: str) -> str:
    """Upload a folder; gives the repository's address.

    Raises:
        UserError: the Hub refuses, or the network fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by higgs-export")
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        hint = f"The folder is whole. `hf upload {repository} {folder}` tries again."
        raise UserError(f"the upload failed: {first_line(error)}", where=repository, hint=hint) from error
    return str(url)
