"""Files from the network: several attempts, continued where the last one ended, and compared.

    fetch("https://example.org/model.ckpt", Path("model.ckpt"), digest="sha256:...")
    folder = hub_folder("google/ddpm-cifar10-32")

What has arrived lies beside the file as .NAME.part. Proxies are those of the environment
(https_proxy, no_proxy). Only http and https are followed.
"""

import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...models.checkpoint_files import CheckpointError
from ..common.errors import ConfigError
from ..common.files import digest_of_file, write_text
from ..common.schema import printable
from .runs import locked

TIMEOUT = 30  # seconds without an answer
ATTEMPTS = 5
WAIT = 2.0  # seconds before the second attempt, twice as long before each further one
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may be other ones soon
BLOCK_BYTES = 1 << 20
DIGESTS = {"sha256": 64, "md5": 32}  # kind -> hexadecimal digits
HUB_FILES = ["*.json", "*.txt", "*.safetensors"]
HUB_FILES_OF_TORCH = ["*.json", "*.txt", "*.bin"]


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> Any:
        check_scheme(arguments[-1])
        return super().redirect_request(*arguments)


class _WebPageError(ValueError):
    """A page for people in place of the file."""


def check_scheme(url: str) -> None:
    """Raises ConfigError unless the address is one of the web."""
    if _scheme(url) not in ("http", "https"):
        raise ConfigError(f"model.url {printable(url, 300)}: only http and https are fetched")


def _scheme(url: str) -> str:
    try:
        return urllib.parse.urlsplit(url).scheme
    except ValueError as error:  # brackets of an address that are not closed, for example
        raise ConfigError(f"model.url {printable(url, 300)}: is no address ({error})") from error


def check_digest(text: str | None) -> None:
    """sha256:HEX or md5:HEX. Raises ConfigError."""
    kind, _, digits = (text or "").partition(":")
    known = kind in DIGESTS and re.fullmatch(f"[0-9a-f]{{{DIGESTS[kind]}}}", digits)
    if text is not None and not known:
        raise ConfigError(f"model.digest {printable(text)}: must be sha256:HEX or md5:HEX")


def fetch(url: str, path: Path, by_hand: str, digest: str | None = None) -> str:
    """Download to `path`, which appears whole; returns its sha256 in hexadecimal.

    digest: what was published of the file. Raises CheckpointError, which says what to do `by_hand`;
    ConfigError for another address than one of the web.
    """
    check_scheme(url)
    check_digest(digest)
    part = path.with_name(f".{path.name}.part")
    with locked(path.with_name(f".{path.name}.lock")):
        for attempt in range(ATTEMPTS):
            try:
                _receive(url, part, path.name)
                break
            except _WebPageError as error:
                raise CheckpointError(
                    f"{url}: answered with {error}, not with the file; open it in a browser and "
                    f"{by_hand}"
                ) from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not _is_of_the_network(error):
                    raise
                if not _may_pass(error) or attempt == ATTEMPTS - 1:
                    reason = printable(getattr(error, "reason", None) or error, 300)
                    raise CheckpointError(
                        f"cannot download {url} ({reason}); download it by hand and {by_hand}"
                    ) from error
                time.sleep(WAIT * 2**attempt)
        found = {kind: digest_of_file(part, kind) for kind in DIGESTS}
        kind, _, digits = (digest or "").partition(":")
        if digest is not None and found[kind] != digits:
            _forget(part)
            raise CheckpointError(
                f"{url}: its {kind} is {found[kind]}, published is {digits}; download it again, or "
                f"get it elsewhere and {by_hand}"
            )
        part.replace(path)
        _forget(part)
    return found["sha256"]


def _forget(part: Path) -> None:
    for path in (part, _note(part)):
        path.unlink(missing_ok=True)


def _note(part: Path) -> Path:
    """Says of which version of which address the part is."""
    return part.with_name(f"{part.name}.of")


def _receive(url: str, part: Path, name: str) -> None:
    """One attempt, which continues the part."""
    start, version = _continued(url, part)
    headers = {"User-Agent": "tinydm", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(_Redirects)
    try:
        opened = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if (error.headers.get("Content-Range") or "").endswith(f"/{start}"):
            return  # the part is the whole: only its new name was missing
        _forget(part)
        raise urllib.error.ContentTooShortError("the part fits no file there", b"") from error
    with opened as answer:
        if answer.status != 206:  # the whole, from its start
            start = 0
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            _forget(part)
            raise urllib.error.ContentTooShortError("another part of the file came", b"")
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        blocks = _blocks(answer)
        first = next(blocks, b"")
        if start == 0:
            _refuse_page(answer.headers.get("Content-Type") or "", first)
        part.parent.mkdir(parents=True, exist_ok=True)
        write_text(_note(part), f"{url}\n{version}\n")
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name) as bar,
        ):
            while first:
                file.write(first)
                bar.update(len(first))
                first = next(blocks, b"")
    if total is not None and part.stat().st_size != total:
        raise urllib.error.ContentTooShortError("the connection ended early", b"")


def _blocks(answer: Any) -> Iterator[bytes]:
    """What arrives, block by block. Raises URLError, so that a full disk is told from it."""
    while True:
        try:
            block = answer.read(BLOCK_BYTES)
        except OSError as error:
            raise urllib.error.URLError(error) from error
        if not block:
            return
        yield block


def _continued(url: str, part: Path) -> tuple[int, str]:
    """Bytes that are there already of a version that can be asked for again, and that version."""
    if part.is_symlink():  # writing would go elsewhere
        _forget(part)
    with suppress(OSError, ValueError):
        of, version = _note(part).read_text(encoding="utf-8").split("\n")[:2]
        if of == url and version and not version.startswith("W/"):
            return part.stat().st_size, version
    return 0, ""


def _refuse_page(kind: str, first: bytes) -> None:
    start = first[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not kind.startswith("text/html") and not start.startswith((b"<!doctype html", b"<html")):
        return
    drive = b"google drive" in first.lower()
    what = "Google Drive's warning that it does not scan large files for viruses"
    raise _WebPageError(what if drive else "an HTML page")


def _is_of_the_network(error: Exception) -> bool:
    """A full disk, or no permission, is nothing that another attempt mends."""
    if isinstance(error, ConfigError | CheckpointError):
        return False
    network = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)
    return isinstance(error, network) or not isinstance(error, OSError)


def _may_pass(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in PASSING
    return not isinstance(error, ValueError)


# ---- the Hugging Face hub ----


def hub_folder(name: str) -> Path:
    """The folder of a model of the hub, fetched into its own cache. Raises CheckpointError."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{name}: no such file or folder; to fetch it from the Hugging Face hub: pip install "
            "huggingface_hub"
        ) from error
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
        if not any(folder.rglob("*.safetensors")):
            huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES_OF_TORCH)
    except Exception as error:  # its own, those of its client, those of the network
        raise CheckpointError(
            f"{name}: no such file or folder, and the Hugging Face hub did not give it "
            f"({printable(error, 300)}); download https://huggingface.co/{name} by hand and name "
            "the folder with --ckpt"
        ) from error
    return folder
