"""An export on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError

from dwakd_plugin.errors import UserError
from dwakd_plugin.export.run_student import base_name, find_student


def check_push(repo: str, run: Path, *, keep_adapter: bool, base_model: str | None) -> None:
    """Raises UserError where an upload could not work, before anything is done."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub takes OWNER/NAME: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push-to-hub needs the hub, and HF_HUB_OFFLINE is set. Unset it.")
    if get_token() is None:
        raise UserError(
            "--push-to-hub needs a token. Log in with `hf auth login`, or set HF_TOKEN."
        )
    if keep_adapter:
        student = find_student(run)
        base = base_model or (base_name(student) if student.is_adapter else "")
        if Path(base).is_dir():
            raise UserError(
                f"The adapter's base model is the local folder `{base}`, which nobody else has. "
                "Leave --keep-adapter out to push the merged model."
            )


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads an export and returns its address. Raises UserError; `folder` is whole then."""
    from httpx import HTTPError
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export with dwakd")
    except (OSError, HTTPError, ValueError) as error:
        raise UserError(
            f"The export is whole in `{folder}`, and could not be uploaded: {error}\n"
            f"Try again with `hf upload {repo} {folder}`."
        ) from error
    return str(address)
