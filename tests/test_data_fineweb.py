"""Fetching from a real HTTP server on loopback with all its failures."""

import collections
import hashlib
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from data import fineweb
from data.shards import ShardError, write_shard

ROOT = Path(__file__).resolve().parent.parent
RESOLVE = f"/datasets/{fineweb.REPO}/resolve/main/"
VAL = "fineweb_val_000000.bin"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self):
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the game


class Hub:
    """Answers as the hub does: metadata on HEAD, a redirect to a file server that knows ranges."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}  # where it is not the file's sha256
        self.plans = collections.defaultdict(list)  # what the next GETs of a file shall do
        self.head = None  # what every HEAD shall do
        self.requests: list[tuple[str, str, str | None]] = []  # method, file, Range
        self.together: threading.Barrier | None = None
        self.servers = [Server(self), Server(self)]  # the hub and its file server
        self.url, self.cdn = (server.url for server in self.servers)

    def gets(self, name=None):
        return [(n, r) for m, n, r in self.requests if m == "GET" and name in (None, n)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", send=True, **headers):
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if send:
            self.wfile.write(body)

    def redirect(self):
        name = self.path.rpartition("/")[2]
        content = self.server.hub.files[name]
        etag = self.server.hub.etags.get(name, hashlib.sha256(content).hexdigest())
        # Some versions follow to another port of the same host and ask for the same there.
        self.answer(
            302 if self.path.startswith(RESOLVE) else 200, send=False,
            Location=f"{self.server.hub.cdn}/cdn/{name}", X_Repo_Commit="c" * 40,
            X_Linked_Etag=f'"{etag}"', X_Linked_Size=str(len(content)), ETag='"pointer"',
        )

    def do_HEAD(self):
        name = self.path.rpartition("/")[2]
        self.server.hub.requests.append(("HEAD", name, None))
        if self.server.hub.head == "html":
            self.answer(200, b"<html>please log in</html>", send=False, Content_Type="text/html")
        elif self.server.hub.head:
            self.answer(self.server.hub.head)
        elif name not in self.server.hub.files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit="c" * 40)
        else:
            self.redirect()

    def do_GET(self):
        if self.path.startswith(RESOLVE):
            return self.redirect()
        name = self.path.removeprefix("/cdn/")
        wanted = self.headers.get("Range")
        self.server.hub.requests.append(("GET", name, wanted))
        if self.server.hub.together:
            self.server.hub.together.wait(timeout=20)
        plan = self.server.hub.plans[name].pop(0) if self.server.hub.plans[name] else ("send",)
        content = self.server.hub.files[name]
        if plan[0] == "html":
            page = b"<!doctype html><title>busy</title>".ljust(plan[1], b" ")
            return self.answer(200, page, Content_Type="text/html")
        if plan[0] == "status":
            return self.answer(plan[1])
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        body, status = content[start:], 206 if wanted else 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"cdn"')
        if wanted:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", span)
        self.end_headers()
        if plan[0] == "send":
            return self.wfile.write(body)
        self.wfile.write(body[: plan[1]])
        self.wfile.flush()
        if plan[0] == "reset":  # the bytes must arrive before the reset overtakes them
            time_left = plan[2]
            time_left.wait(timeout=20)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                       struct.pack("ii", 1, 0))
        self.close_connection = True
        return None


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    for variable in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # It writes pieces of 10 MB; our shards of 80 KB must not be all or nothing.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    server, made = Hub(), tmp_path_factory.mktemp("hub") / "made.bin"
    for number, name in enumerate([VAL] + fineweb.file_names(5)[0]):
        tokens = np.random.default_rng(number).integers(0, 50257, 40_000)
        tokens[0] = 50256
        write_shard(made, tokens)
        server.files[name] = made.read_bytes()
    yield server
    for one in server.servers:
        one.stop()


@pytest.fixture
def impatient(monkeypatch):
    """No waiting between tries, ours and huggingface_hub's."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def partial(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".tmp")


def test_fetches_what_is_missing_and_nothing_twice(hub, tmp_path, capsys):
    folder = tmp_path / "fw"
    train, val = fineweb.ensure(2, folder, endpoint=hub.url)
    assert [p.name for p in train] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert [p.name for p in val] == [VAL]
    for path in train + val:
        assert path.read_bytes() == hub.files[path.name]
    assert visible(folder) == sorted(p.name for p in train + val) and partial(folder) == []
    output = capsys.readouterr().out
    assert "fetching 3 of 3 FineWeb shards" in output
    assert output.count("40,000 tokens, checked") == 3
    hub.requests.clear()
    assert fineweb.ensure(2, folder, endpoint=hub.url) == (train, val)
    assert hub.requests == []
    fineweb.ensure(3, folder, endpoint=hub.url)
    assert [name for name, _ in hub.gets()] == ["fineweb_train_000003.bin"]


def test_several_files_at_once(hub, tmp_path):
    hub.together = threading.Barrier(3)  # each GET waits until three are there
    fineweb.ensure(5, tmp_path, endpoint=hub.url, jobs=3)
    assert len(hub.gets()) == 6


def test_d19_a_connection_that_breaks_is_resumed_in_the_same_call(hub, tmp_path, impatient):
    hub.plans[VAL] = [("cut", 30_000), ("cut", 20_000)]
    fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert hub.gets(VAL) == [(VAL, None), (VAL, "bytes=30000-"), (VAL, "bytes=50000-")]
    assert (tmp_path / VAL).read_bytes() == hub.files[VAL]


class Arrived:
    """An event-like wait until the partial file has so many bytes."""

    def __init__(self, folder, size):
        self.folder, self.size = folder, size

    def wait(self, timeout):
        deadline = time.monotonic() + timeout
        pause = threading.Event()
        while time.monotonic() < deadline:
            if any(VAL in p.name and p.stat().st_size >= self.size for p in partial(self.folder)):
                return
            pause.wait(0.005)


def test_d19_an_interrupted_download_is_resumed_by_the_next_call(hub, tmp_path, impatient):
    size = len(hub.files[VAL])
    hub.plans[VAL] = [("cut", 50_000)] + [("status", 503)] * 200
    with pytest.raises(OSError, match=rf"{VAL}: broke off at 50,000 of {size:,} bytes .*next call"):
        fineweb.ensure(1, tmp_path, endpoint=hub.url, attempts=1)
    assert VAL not in visible(tmp_path)
    (part,) = [p for p in partial(tmp_path) if VAL in p.name]
    assert part.read_bytes() == hub.files[VAL][:50_000]
    hub.plans.clear()
    hub.requests.clear()
    fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert hub.gets(VAL) == [(VAL, "bytes=50000-")]
    assert (tmp_path / VAL).read_bytes() == hub.files[VAL] and partial(tmp_path) == []


def test_a_reset_connection_is_resumed(hub, tmp_path, impatient):
    hub.plans[VAL] = [("reset", 70_000, Arrived(tmp_path, 60_000))]
    fineweb.ensure(1, tmp_path, endpoint=hub.url)
    (first, again) = hub.gets(VAL)
    assert first == (VAL, None) and again[1] in ("bytes=60000-", "bytes=70000-")
    assert (tmp_path / VAL).read_bytes() == hub.files[VAL]


def test_a_part_of_another_version_of_the_file_is_not_resumed(hub, tmp_path, impatient):
    hub.plans[VAL] = [("cut", 50_000)] + [("status", 503)] * 200
    with pytest.raises(OSError, match="broke off"):
        fineweb.ensure(1, tmp_path, endpoint=hub.url, attempts=1)
    hub.plans.clear()
    hub.requests.clear()
    hub.files[VAL] = hub.files["fineweb_train_000001.bin"]
    fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert hub.gets(VAL) == [(VAL, None)]
    assert (tmp_path / VAL).read_bytes() == hub.files[VAL] and partial(tmp_path) == []


def test_a_truncated_file_on_the_server_is_refused(hub, tmp_path):
    hub.files[VAL] = hub.files[VAL][:-5000]
    with pytest.raises(ShardError, match=rf"^{VAL} from {hub.url} arrived broken and was removed: "
                                         r".*truncated: expected 81024 bytes"):
        fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert VAL not in visible(tmp_path) and not [p for p in partial(tmp_path) if VAL in p.name]


def test_a_flipped_bit_is_refused(hub, tmp_path):
    good = hub.files[VAL]
    hub.etags[VAL] = hashlib.sha256(good).hexdigest()
    hub.files[VAL] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(ShardError, match=f"expected sha256 {hub.etags[VAL]}, got"):
        fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert VAL not in visible(tmp_path)
    hub.files[VAL] = good
    fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert (tmp_path / VAL).read_bytes() == good


def test_tokens_are_checked_where_the_server_gives_no_sha256(hub, tmp_path):
    tokens = np.full(1000, 50256)
    tokens[7] = 50257
    write_shard(tmp_path / "made.bin", tokens)
    hub.files[VAL], hub.etags[VAL] = (tmp_path / "made.bin").read_bytes(), "a" * 40
    with pytest.raises(ShardError, match=r"arrived broken.*token 50257 at offset 7"):
        fineweb.ensure(1, tmp_path / "fw", endpoint=hub.url)
    assert VAL not in visible(tmp_path / "fw")


@pytest.mark.parametrize("size", [40, 81_024, 200_000])  # shorter, as long, longer than the shard
def test_d20_an_html_page_with_status_200_is_refused(hub, tmp_path, impatient, size):
    hub.plans[VAL] = [("html", size)] * 100
    with pytest.raises(ShardError, match=rf"^{hub.url} sent an HTML page instead of the .*{VAL}"):
        fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert VAL not in visible(tmp_path) and not [p for p in partial(tmp_path) if VAL in p.name]
    hub.plans.clear()
    fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert (tmp_path / VAL).read_bytes() == hub.files[VAL]


def test_d20_an_html_page_amid_a_resumed_download(hub, tmp_path, impatient):
    hub.plans[VAL] = [("cut", 50_000), ("html", 31_024)] + [("html", 31_024)] * 50
    with pytest.raises((ShardError, OSError), match=r"HTML page|broke off|arrived broken"):
        fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert VAL not in visible(tmp_path)
    hub.plans.clear()
    fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert (tmp_path / VAL).read_bytes() == hub.files[VAL]


def test_a_login_page_instead_of_metadata(hub, tmp_path):
    hub.head = "html"
    with pytest.raises(OSError, match=r"not as a Hugging Face hub does .*HF_ENDPOINT") as caught:
        fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert "\n" not in str(caught.value) and hub.gets() == [] and visible(tmp_path) == []


def test_status_codes_are_named(hub, tmp_path):
    del hub.files[VAL]
    with pytest.raises(OSError, match=rf"{hub.url} answered 404 for {VAL} of {fineweb.REPO}"):
        fineweb.ensure(1, tmp_path, endpoint=hub.url)
    hub.head = 403
    with pytest.raises(OSError, match="answered 403"):
        fineweb.ensure(1, tmp_path, endpoint=hub.url)


def test_a_broken_file_in_the_folder_is_named(hub, tmp_path):
    (tmp_path / VAL).write_bytes(hub.files[VAL][:-2])
    with pytest.raises(ShardError, match=f"{VAL}: truncated.*remove it and fetch it again"):
        fineweb.ensure(1, tmp_path, endpoint=hub.url)
    assert hub.requests == []


def test_when_one_file_fails_the_others_stop(hub, tmp_path, impatient):
    hub.plans[VAL] = [("html", 40)] * 100
    with pytest.raises(ShardError, match="HTML page"):
        fineweb.ensure(5, tmp_path, endpoint=hub.url, jobs=1)
    assert hub.gets("fineweb_train_000005.bin") == []


def test_two_launches_fetch_each_file_once(hub, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: fineweb.ensure(3, tmp_path, endpoint=hub.url), range(3)))
    assert results[0] == results[1] == results[2]
    assert collections.Counter(name for name, _ in hub.gets()).most_common(1)[0][1] == 1


@pytest.mark.parametrize("number", [0, -1, 104])
def test_number_of_shards(tmp_path, number):
    with pytest.raises(ValueError, match=f"expected 1 to 103 shards, got {number}"):
        fineweb.ensure(number, tmp_path / "fw")
    assert list(tmp_path.iterdir()) == []


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "data.fineweb", *map(str, arguments)], cwd=ROOT, text=True,
        capture_output=True, timeout=100, env=os.environ | environment,
    )


def test_command_line_with_hf_endpoint(hub, tmp_path):
    done = command("--shards", 2, "--folder", tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"2 training shards (80,000 tokens) and 1 for validation in {tmp_path}"
    )
    assert len(visible(tmp_path)) == 3


def test_offline_is_one_clear_line(tmp_path):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = command("--shards", 1, "--folder", tmp_path, "--endpoint", url, NO_PROXY="127.0.0.1")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot reach {url} for fineweb_")
    assert "Without a network: copy the shards to" in done.stderr and done.stderr.count("\n") == 1
    assert visible(tmp_path) == [] and partial(tmp_path) == []
