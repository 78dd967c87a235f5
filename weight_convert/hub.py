"""Weights by name: files of the Hugging Face Hub, and the published file of an architecture.

    hf://owner/repository/file[@revision]     downloaded once, then read from the Hub's cache (HF_HOME, HF_HUB_OFFLINE)
    hf://owner/repository[@revision]          the same for a network in this library's format, as `push` uploads it
    pretrained:vim_tiny_stride8               the file in `vimd_jax.models.published`
    pretrained                                the same, for the architecture at hand
    https://…                                 a release file, to be downloaded by hand and saved under its name

Any other name is a path.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vimd_jax.checkpoints.description import read_description
from vimd_jax.errors import CheckpointError
from vimd_jax.models.published import PUBLISHED, Published, page

_SCHEMES = ("hf://", "https://", "http://", "pretrained:")
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@(.+))?")
_EXTRA = "huggingface_hub is not installed; run: pip install 'vimd-jax[hub]'"


def is_name(name: str | os.PathLike) -> bool:
    """True for a name that `resolve` looks up, False for a path."""
    return str(name) == "pretrained" or str(name).startswith(_SCHEMES)


def architecture_of(name: str | os.PathLike) -> str | None:
    """The architecture in `pretrained:<architecture>`; None for any other name.

    Raises:
      CheckpointError: no weights of that architecture are published.
    """
    scheme, _, architecture = str(name).partition(":")
    return _with_file(architecture) if scheme == "pretrained" and architecture else None


def published(name: str | os.PathLike, architecture: str | None = None) -> Published | None:
    """The published network that a name stands for; None for names of files, and for paths.

    Raises:
      CheckpointError: no weights of that architecture are published, or none is named.
    """
    text = os.fspath(name)
    if not is_name(text) or not text.startswith("pretrained"):
        return None
    if not (architecture_of(text) or architecture):
        raise CheckpointError('"pretrained" needs an architecture: write pretrained:vim_tiny, for example')
    return PUBLISHED[architecture_of(text) or _with_file(str(architecture))]


def resolve(name: str | os.PathLike, architecture: str | None = None) -> Path:
    """The local file or folder of a name, downloaded from the Hugging Face Hub if necessary.

    Args:
      name: see the module; a path is returned unchanged, whether or not it exists.
      architecture: the network that "pretrained" stands for.

    Raises:
      CheckpointError: nothing is published under the name, it cannot be downloaded, or it has to be downloaded by
        hand; the message says from where and to where.
    """
    text = os.fspath(name)
    if not is_name(text):
        return Path(text)
    entry = published(text, architecture)
    text = str(entry.file) if entry else text
    size = f" ({_size(entry)})" if entry else ""
    return _from_hub(text, size) if text.startswith("hf://") else _saved(text, size)


def push(repository: str, files: Mapping[str, Path | bytes], private: bool = False) -> str:
    """Uploads files to a repository of the Hugging Face Hub in one commit; returns the address of its page.

    The repository is made if it is not there. Variables of a network that it held before are removed.

    Args:
      repository: owner/name, or a name of one's own.
      files: by their paths in the repository, a local file or the content.
      private: of a repository that is made: for its owner alone.

    Raises:
      CheckpointError: the extra "hub", a token or the network is missing, or the Hub refuses.
    """
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors, get_token
    except ImportError:
        raise CheckpointError(f"{repository}: {_EXTRA}") from None
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{repository}: nothing can be uploaded while HF_HUB_OFFLINE is set; unset it")
    if not get_token():
        raise CheckpointError(f"{repository}: uploading needs a token; run: hf auth login, or set HF_TOKEN")
    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        page = api.create_repo(repository, private=private or None, exist_ok=True)
        there = api.list_repo_files(page.repo_id)
        gone = [file for file in there if re.fullmatch(r"variables-\w+\.safetensors", file) and file not in files]
        operations = [CommitOperationAdd(name, x if isinstance(x, bytes) else str(x)) for name, x in files.items()]
        operations += [CommitOperationDelete(file) for file in gone]
        api.create_commit(page.repo_id, operations, commit_message="Upload a network of vimd_jax")
        return str(page)
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        refusals = {401: "the token is not valid; run: hf auth login", 403: "the token may not write there"}
        reason = refusals.get(status) or f"the Hub refuses ({str(error).splitlines()[0]!r})"
    except Exception as error:  # connection errors have no common type
        cause = str(error.__cause__ or error) or type(error).__name__
        reason = f"it cannot be uploaded ({cause.splitlines()[0]!r}); check the name, or try again"
    raise CheckpointError(f"{repository}: {reason}")


def _size(entry: Published) -> str:
    if entry.mebibytes:
        return f"about {entry.mebibytes:.1f} MiB"
    return f"of unknown size, of which the weights as float32 are {entry.parameters / 2**18:.0f} MiB"


def _with_file(architecture: str) -> str:
    """Returns the name if weights are published for it; raises CheckpointError otherwise."""
    if architecture in PUBLISHED and PUBLISHED[architecture].file:
        return architecture
    known = ", ".join(name for name, published in PUBLISHED.items() if published.file)
    raise CheckpointError(f"pretrained: no weights are published for {architecture!r}; there are weights for {known}")


def _from_hub(name: str, size: str) -> Path:
    match = _HUB.fullmatch(name)
    if not match:
        raise CheckpointError(f"{name!r} is not of the form hf://owner/repository[/file][@revision]")
    repository, file, revision = match.groups()
    if file:
        return _downloaded(name, repository, file, revision, size)
    folder = _downloaded(name, repository, "network.json", revision, size).parent  # called like its commit
    _downloaded(name, repository, read_description(folder)["variables"], folder.name, size)
    return folder


def _downloaded(name: str, repository: str, file: str, revision: str | None, size: str) -> Path:
    by_hand = f"or download {file} from {page(f'hf://{repository}/{file}')}{size} and name its path"
    try:
        from huggingface_hub import constants, errors, hf_hub_download
    except ImportError:
        raise CheckpointError(f"{name}: {_EXTRA}, {by_hand}") from None
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except errors.GatedRepoError:
        reason = f"access to {repository} is restricted; ask for it on its page and run: hf auth login"
    except errors.RepositoryNotFoundError:
        reason = f"the Hub has no public repository {repository}; check the name, or run: hf auth login"
    except errors.RevisionNotFoundError:
        reason = f"{repository} has no revision {revision!r}"
    except errors.LocalEntryNotFoundError:  # before its base class below
        offline = constants.HF_HUB_OFFLINE
        cause = "HF_HUB_OFFLINE is set; unset it" if offline else "the Hub cannot be reached; try again later"
        reason = f"it is not in the cache, and {cause}, {by_hand}"
    except errors.EntryNotFoundError:
        reason = f"{repository} has no file {file!r}" + (f" in revision {revision!r}" if revision else "")
        if file == "network.json":
            reason += f"; name one that it has: hf://{repository}/FILE"
    except Exception as error:  # connection errors have no common type
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = f"it cannot be downloaded ({cause!r}); try again, {by_hand}"
    raise CheckpointError(f"{name}: {reason}")


def _saved(address: str, size: str) -> Path:
    """The downloaded file of an address; raises CheckpointError with instructions if it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "vimd_jax" / "weights" / (unquote(Path(urlsplit(address).path).name) or "weights")
    if path.is_file():
        return path
    raise CheckpointError(f"{address} is downloaded by hand: save it{size} as {path}, or elsewhere and name its path")
