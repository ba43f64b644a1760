"""Repositories of the Hugging Face Hub: addresses, downloads through its cache, uploads.

An address is `hf://ORG/NAME[@REV][/SUB]`. REV is a branch, a tag, a commit or `refs/pr/N`; SUB is a
folder or a file of the repository. Downloads resume, are verified by huggingface_hub, and end in
its cache (HF_HOME), from which they are read with HF_HUB_OFFLINE=1 or without a network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from emu_jax.errors import UserError
from emu_jax.storage import as_path, write_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
SOURCES_FILE = "sources.json"  # of a run directory: the repositories that it was made from
# Weights for other frameworks, which a repository may hold beside ours.
FOREIGN = ("*.msgpack", "*.h5", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.gguf", "*.mlmodel")
_FORM = "write hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME/FOLDER"
_ADDRESS = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/pr/\d+|[^/]+))?"
    r"(?:/(?P<subpath>.*))?"
)
# The same weights under the names of transformers and diffusers: pytorch_model.fp16.bin.
_WEIGHTS = re.compile(
    r"(?P<family>diffusion_pytorch_model|pytorch_model|model)(?P<variant>\.(?:fp16|non_ema))?"
    r"(?:[.-].*)?\.(?P<format>safetensors|bin)(?:\.index\.json)?"
)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class HubAddress:
    """A repository of the Hub, or a folder or file in it.

    Attributes:
        repository: ORG/NAME.
        revision: a branch, a tag, a commit or `refs/pr/N`; "" is the default branch.
        subpath: a folder or a file in it; "" is all of it.
    """

    repository: str
    revision: str = ""
    subpath: str = ""

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Parses `hf://ORG/NAME[@REV][/SUB]`.

        Raises:
            UserError: the text has another form.
        """
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise UserError(f"{text} is not an address on the Hub: {_FORM}")
        subpath = (match["subpath"] or "").strip("/")
        if {".", ".."} & {*subpath.split("/"), *match["repository"].split("/")}:
            raise UserError(f"{text} has . or .. in it: {_FORM}")
        return cls(match["repository"], match["revision"] or "", subpath)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repository}{revision}" + (f"/{self.subpath}" if self.subpath else "")


@dataclasses.dataclass(frozen=True)
class HubSource:
    """The provenance of files that were downloaded. All fields have JSON types.

    Attributes:
        address: the address, with the commit as its revision.
        requested: the address that was asked for.
        license: the license in the repository's model card; "" if it names none.
    """

    address: str
    requested: str
    license: str = ""


def is_hub(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is an address on the Hub."""
    return os.fspath(path).startswith(SCHEME)


@contextlib.contextmanager
def downloaded(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields where a path can be read: an address on the Hub is downloaded first, and errors name
    it in place of its copy in the cache.

    Raises:
        UserError: as `download_snapshot`, or the path is in a store that is not supported.
    """
    if not is_hub(path):
        yield as_path(path)
        return
    copy, source = download_snapshot(os.fspath(path))
    with naming_addresses({copy: source}):
        yield copy


@contextlib.contextmanager
def naming_addresses(copies: Mapping[Path, HubSource]) -> Iterator[None]:
    """Makes errors name the addresses that were asked for, in place of their copies in the cache.

    Args:
        copies: the provenance of each downloaded folder or file.
    """
    try:
        yield
    except UserError as error:
        message = str(error)
        for copy, source in copies.items():
            message = message.replace(str(copy), source.requested)
        error.args = (message,)
        raise


def download_snapshot(text: str, folders: Iterable[str] = ()) -> tuple[Path, HubSource]:
    """Downloads an address on the Hub into huggingface_hub's cache, if it is not there yet.

    Weights for other frameworks, and a second copy of weights in another format, are left out.

    Args:
        folders: the only folders to download; by default all.

    Returns:
        The folder or file in the cache, and its provenance.

    Raises:
        UserError: the repository, the revision or the subpath does not exist, the repository is
            gated, or it is not in the cache and the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    address = HubAddress.parse(text)
    revision = address.revision or None
    with _explained(address):
        names = _listed(address)
        if names and address.subpath and not _contains(names, address.subpath):
            raise _missing(address)  # before anything is downloaded
        wanted = wanted_files(names, address.subpath, folders) if names else []
        snapshot = Path(
            snapshot_download(
                address.repository,
                revision=revision,
                endpoint=_api().endpoint,
                allow_patterns=[glob.escape(name) for name in wanted] if wanted else None,
                library_name="emu_jax",
            )
        )
    path = snapshot / address.subpath
    if not path.exists():
        raise _missing(address)
    pinned = dataclasses.replace(address, revision=snapshot.name)
    return path, HubSource(str(pinned), str(address), _license(snapshot))


def _contains(names: Iterable[str], subpath: str) -> bool:
    return any(name == subpath or name.startswith(f"{subpath}/") for name in names)


def _missing(address: HubAddress) -> UserError:
    return UserError(
        f"{address} does not exist: the repository {address.repository} has no "
        f"{address.subpath or 'files'}; see {_page(address)}/tree/{address.revision or 'main'}"
    )


def _listed(address: HubAddress) -> list[str]:
    """Returns the files of a repository: those on the Hub, or else those that the cache knows, []
    if it does not know them."""
    import huggingface_hub
    from huggingface_hub import errors

    revision = address.revision or None
    try:
        info = _api().model_info(address.repository, revision=revision)
        return [file.rfilename for file in info.siblings or ()]
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except (_http_error(), errors.OfflineModeIsEnabled):
        try:
            tree = huggingface_hub.get_cached_repo_tree(address.repository, revision=revision)
            return [file.path for file in tree]
        except errors.CachedRepoTreeNotFoundError:
            return []


def wanted_files(names: Iterable[str], subpath: str, folders: Iterable[str]) -> list[str]:
    """Returns the files of a repository to download, and its model card.

    Of weights that are there several times, safetensors are preferred to .bin, and full precision
    with averaged parameters (no `.fp16.`, no `.non_ema.`) to other variants.

    Args:
        names: all files of the repository.
        subpath: the only folder or file to download; "" for all.
        folders: the only folders below it to download; none for all.
    """
    root = f"{subpath}/" if subpath else ""
    prefixes = [f"{root}{folder}/" for folder in folders] or [root]
    names = [
        name
        for name in names
        if (name == subpath or any(name.startswith(prefix) for prefix in prefixes))
        and not any(fnmatch.fnmatch(name.lower(), pattern) for pattern in FOREIGN)
    ]
    weights = {name: match for name in names if (match := _WEIGHTS.fullmatch(Path(name).name))}
    best: dict[tuple[str, bool], tuple[bool, bool]] = {}
    for name, match in weights.items():
        group = _weights_group(name, match)
        best[group] = max(best.get(group, (False, False)), _preference(match))
    chosen = [
        name
        for name in names
        if name not in weights
        or _preference(weights[name]) == best[_weights_group(name, weights[name])]
    ]
    return [*chosen, "README.md"] if "README.md" not in chosen else chosen


def _weights_group(name: str, match: re.Match[str]) -> tuple[str, bool]:
    """Returns (folder, whether a denoiser or an autoencoder): files of one group are one model."""
    return str(PurePosixPath(name).parent), match["family"].startswith("diffusion")


def _preference(match: re.Match[str]) -> tuple[bool, bool]:
    return match["variant"] is None, match["format"] == "safetensors"


def _license(snapshot: Path) -> str:
    """Returns the license that a model card's front matter names, or ""."""
    try:
        card = (snapshot / "README.md").read_text(errors="replace")
    except OSError:
        return ""
    front = _FRONT_MATTER.match(card)
    stated = dict(
        re.findall(r"^(license(?:_name)?):[ \t]*[\"']?([^\"'\n]*)", front[1], re.M) if front else ()
    )
    name = stated.get("license", "").strip()
    return stated.get("license_name", name).strip() if name == "other" else name


def record_sources(folder: Path, sources: Mapping[str, HubSource]) -> None:
    """Writes sources.json of a run directory: {role: provenance}. Writes nothing if it is empty."""
    if sources:
        values = {role: dataclasses.asdict(source) for role, source in sources.items()}
        write_text(folder / SOURCES_FILE, json.dumps(values, indent=1) + "\n")


def recorded_sources(folder: Path) -> dict[str, HubSource]:
    """Returns the sources recorded by `record_sources`, or {}.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SOURCES_FILE
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
        return {role: HubSource(**source) for role, source in values.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it or restore a copy") from None


def prepare_upload(address: HubAddress, *, private: bool, overwrite: bool) -> None:
    """Creates a repository, if it does not exist, and checks that a model may be uploaded to it.

    Args:
        private: create a private repository.
        overwrite: replace the files of a repository that has some.

    Raises:
        UserError: the repository has files and may not be overwritten, the login may not write to
            it, or the Hub cannot be reached.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    api = _api()
    with _explained(address, "upload to"):
        try:
            siblings = api.model_info(address.repository).siblings or ()
        except RepositoryNotFoundError:
            api.create_repo(address.repository, private=private or None, exist_ok=True)
            return
    present = [file.rfilename for file in siblings]
    root = f"{address.subpath}/" if address.subpath else ""
    if not overwrite and any(n.startswith(root) and n != ".gitattributes" for n in present):
        raise UserError(
            f"{address} has files: use --overwrite to replace them in a new commit, or choose "
            "another name"
        )


def upload_folder(folder: Path, address: HubAddress, message: str, *, overwrite: bool) -> str:
    """Uploads a folder as the content of a repository, which `prepare_upload` checked.

    Interrupted uploads resume: files that the Hub has are not sent again.

    Args:
        message: the message of the commit.
        overwrite: replace the files of a repository that has some. Its history keeps them.

    Returns:
        The commit's hash.

    Raises:
        UserError: the login may not write to the repository, or the Hub cannot be reached.
    """
    with _explained(address, "upload to"):
        commit = _api().upload_folder(
            repo_id=address.repository,
            folder_path=folder,
            path_in_repo=address.subpath or None,
            commit_message=message,
            delete_patterns="*" if overwrite else None,
        )
        return str(commit.oid)


def _api() -> HfApi:
    """Returns a client of the Hub at HF_ENDPOINT."""
    from huggingface_hub import HfApi, constants

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    return HfApi(endpoint=endpoint, library_name="emu_jax")


def _page(address: HubAddress) -> str:
    return f"{_api().endpoint}/{address.repository}"


def _http_error() -> type[Exception]:
    """Returns the class of all errors of requests. huggingface_hub 1 and 2 use two libraries."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(
        base
        for base in HfHubHTTPError.__mro__[1:]
        if base.__name__ == "HTTPError" and issubclass(base, Exception)
    )


@contextlib.contextmanager
def _explained(address: HubAddress, action: str = "read") -> Iterator[None]:
    """Turns errors of huggingface_hub into a UserError that says how to fix them."""
    from huggingface_hub import errors

    http_error = _http_error()
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        reason = f"it is gated: accept its terms at {_page(address)}, then {login}"
    except errors.RepositoryNotFoundError:
        reason = f"it does not exist or is private: check the name; if it is private, {login}"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {address.revision!r}: see {_page(address)}/commits/main"
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
            reason = "offline mode is on and the cache lacks it: unset HF_HUB_OFFLINE to download"
        else:
            reason = _unreachable(cause, action)
    except errors.OfflineModeIsEnabled:
        reason = "offline mode is on: unset HF_HUB_OFFLINE"
    except ConnectionError as error:
        # The storage of large files (Xet) raises the class itself, and sockets a subclass.
        reason = (
            f"large files cannot be transferred ({_short_reason(error)}): check the network; for a "
            "server without Xet storage set HF_HUB_DISABLE_XET=1"
            if type(error) is ConnectionError
            else _unreachable(error, action)
        )
    except (http_error, RuntimeError) as raised:
        # An upload wraps the error of its request.
        error = raised if isinstance(raised, http_error) else raised.__cause__
        if not isinstance(error, http_error):
            raise
        response = getattr(error, "response", None)
        if response is None:
            reason = _unreachable(error, action)
        elif response.status_code in (401, 403):
            reason = (
                f"access is denied ({response.status_code}): {login}, with a token that may "
                + ("write" if action != "read" else "read it")
            )
        else:
            reason = f"the Hub answers {response.status_code}: {_short_reason(error)}"
    else:
        return
    raise UserError(f"cannot {action} {address}: {reason}")


def _unreachable(error: BaseException, action: str) -> str:
    cached = " and the cache lacks it" if action == "read" else ""
    return (
        f"{_api().endpoint} cannot be reached ({_short_reason(error)}){cached}: "
        "check the network and HF_ENDPOINT"
    )


def _short_reason(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
