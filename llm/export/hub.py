"""Pushing an exported folder to the Hugging Face hub."""

import re
from pathlib import Path

from llm.checkpoint.hf_model import first_line
from llm.errors import UserError

NAME = re.compile(r"[\w.-]+/[\w.-]+")  # of a model on the hub


def check_hub(name: str) -> None:
    """Raise UserError for a name that no model of the hub can have, and where there is no token to push with."""
    import huggingface_hub

    if not NAME.fullmatch(name):
        raise UserError(f"push={name}: a model on the hub is called <owner>/<name>")
    if not huggingface_hub.get_token():
        raise UserError(f"push={name}: there is no token of the hub; set HF_TOKEN, or run `hf auth login`")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder as the model `name` and return its address. Raises UserError where the hub refuses or fails.

    The repository is made where it is missing; files of the same name are replaced.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export from Fathom")
    except Exception as error:  # those of httpx too
        raise UserError(
            f"push={name}: the hub refuses or cannot be reached ({first_line(error)}); {folder} is complete, so push "
            "again with the same command and overwrite=true, or by `hf upload`"
        ) from error
    return f"{api.endpoint}/{name}"
