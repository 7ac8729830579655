"""Upload of an exported folder to the Hugging Face Hub, after a check that it is whole."""

from pathlib import Path
from typing import Any

from neox.checkpoint.huggingface.files import BIN, BIN_INDEX, INDEX, SINGLE, open_weights, read_index, read_json
from neox.checkpoint.huggingface.read import HuggingFaceReader
from neox.errors import CheckpointError, ConfigError

UNFINISHED = (".incomplete", ".lock", ".tmp")


def check_folder(folder: Path) -> dict[str, int]:
    """See that a folder is a whole model: settings that can be read, and every tensor in the file that should have it.

    No tensor is read: sizes and headers of all files are compared with each other and with config.json.

    Returns:
        Bytes of each file that belongs to it, by its name.

    Raises:
        CheckpointError: it is not whole; names the file.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give one that convert_neox_to_hf.py wrote")
    HuggingFaceReader(folder).check_files()
    for whole, index in ((SINGLE, INDEX), (BIN, BIN_INDEX)):
        if (folder / index).is_file():
            if (folder / whole).is_file():
                raise CheckpointError(f"{folder}: holds {whole} and {index}, two models; remove the one that is older")
            _check_index(folder, index)
    for path in folder.glob("*.json"):
        read_json(path)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    for path in files:
        if path.name.endswith(UNFINISHED):
            raise CheckpointError(f"{path}: left over from a copy that did not end; copy the folder again")
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def upload_folder(
    folder: Path, repo_id: str, *, private: bool = True, revision: str | None = None, message: str | None = None
) -> str:
    """Upload a folder that `check_folder` has found whole, making the repository where it is not there.

    The token is the one that `hf auth login` keeps, or HF_TOKEN.

    Args:
        folder: the exported model.
        repo_id: `organisation/name`.
        private: of a repository that is made.
        revision: branch; None for main. It is made where it is not there.
        message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: huggingface_hub is not installed, or the Hub refuses.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError("uploading needs huggingface_hub: pip install huggingface_hub") from None
    api: Any = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type="model", exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            repo_type="model",
            revision=revision,
            commit_message=message or f"Upload {folder.name}",
            ignore_patterns=[".*", "**/.*"],
        )
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{repo_id}: the Hub did not take it ({reason})") from None
    return str(getattr(commit, "commit_url", commit))


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that the Hub would, before anything is read.

    Raises:
        ConfigError: it is no `organisation/name`.
    """
    owner, slash, name = repo_id.partition("/")
    allowed = all(part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in (owner, name))
    if not slash or not allowed or len(name) > 96:
        raise ConfigError(f"--repo_id {repo_id}: not the name of a repository; give ORGANISATION/NAME")


def _check_index(folder: Path, index: str) -> None:
    """Compare what an index says with the headers of the files, both ways."""
    by_file: dict[str, set[str]] = {}
    for name, file in read_index(folder / index).items():
        by_file.setdefault(file, set()).add(name)
    for file, names in by_file.items():
        found = set(open_weights(folder / file).names())
        for name in sorted(names ^ found):
            where = "the file does not have it" if name in names else "the index does not"
            raise CheckpointError(f"{folder / file}: {name} is not as {index} says, {where}; copy the folder again")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
