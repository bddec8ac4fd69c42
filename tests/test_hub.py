"""The Hub, played by a server on this machine: what is sent, to whom, and what comes back."""
import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from dualreal.checkpoint import save_adapter
from dualreal.core import write_json
from dualreal.toy.bases import tiny_transformer
from dualreal.tuner import DualRealConfig
from dualreal.video import write_video

class Hub(BaseHTTPRequestHandler):
    "As much of the Hub's interface as a push and a download of small files need."
    asked, files = [], {}

    def log_message(self, *args): pass

    def answer(self, content=b"{}", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "X-Repo-Commit": "c" * 40, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.path, self.headers.get("Authorization"), body))
        if self.headers.get("Authorization") != "Bearer hf_good": return self.answer(b'{"error": "no"}', 401)
        here = f"http://{self.headers['Host']}/me/cat"
        if self.path == "/api/repos/create": return self.answer(json.dumps(dict(url=here)).encode())
        if self.path == "/api/validate-yaml": return self.answer(b'{"errors": [], "warnings": []}')
        if "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(body)["files"]]
            files = [dict(path=name, uploadMode="regular", shouldIgnore=False) for name in names]
            return self.answer(json.dumps(dict(files=files)).encode())
        for row in map(json.loads, body.decode().splitlines()):
            value = row["value"]
            if row["key"] == "file": self.files[value["path"]] = base64.b64decode(value["content"])
        told = dict(commitUrl=f"{here}/commit/{'c' * 40}", commitOid="c" * 40, success=True)
        self.answer(json.dumps(told).encode())

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        if "/tree/" in self.path:
            rows = [dict(type="file", path=k, size=len(v), oid="0" * 40) for k, v in self.files.items()]
            return self.answer(json.dumps(rows).encode(), Content_Type="application/json")
        if self.path.startswith("/api/models/me/cat"):
            siblings = [dict(rfilename=name) for name in self.files]
            told = dict(id="me/cat", modelId="me/cat", sha="c" * 40, siblings=siblings, private=True, tags=[])
            return self.answer(json.dumps(told).encode(), Content_Type="application/json")
        name = self.path.partition(f"/resolve/{'c' * 40}/")[2].partition("?")[0]
        if name not in self.files: return self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
        self.answer(self.files[name], ETag=f'"{name}"')


@pytest.fixture
def hub():
    Hub.asked, Hub.files = [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def run(tmp_path):
    "A run's folder, with what must not leave: the contact sheet, photos, captions."
    transformer, folder = tiny_transformer(), tmp_path/"run"
    transformer.add_adapter(DualRealConfig(rank=2, groups=2, condition_dim=None))
    save_adapter(transformer, folder, metadata=dict(base="toy", subject="cat *", motion="a cat is up"))
    write_video(folder/"samples/00.mp4", np.zeros((5, 32, 32, 3), np.uint8))
    write_json(folder/"samples/00.mp4.json", dict(prompt="a cat * is up"))
    for name in ("contact_sheet.png", "photo.png"): Image.new("RGB", (8, 8)).save(folder/name)
    write_json(folder/"run.json", dict(config=dict(identity="/home/me/photos")))
    return folder


def dualreal(hub, tmp_path, *words, token="hf_good"):
    "The command in a process of its own: the Hub's address is read once."
    env = dict(HF_ENDPOINT=hub, HF_TOKEN=token, HF_HOME=f"{tmp_path}/hf", HF_HUB_DISABLE_XET="1",
               PATH="/usr/bin:/bin", HOME=str(tmp_path), DUALREAL_CACHE=f"{tmp_path}/cache")
    command = [sys.executable, "-m", "dualreal.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                          env={k: v for k, v in env.items() if v})
    return done.returncode, done.stdout, done.stderr


def test_push(hub, run, tmp_path):
    status, out, err = dualreal(hub, tmp_path, "push", run, "me/cat")
    assert status == 0, err
    sent = {"README.md", "adapter.safetensors", "card-samples/00.gif", "samples/00.mp4"}
    assert set(Hub.files) == sent and all(name in out for name in sent) and "(private)" in out
    assert Hub.files["adapter.safetensors"] == (run/"adapter.safetensors").read_bytes()
    assert b"me/cat" in Hub.files["README.md"] and b"/home/me" not in b"".join(Hub.files.values())
    made = json.loads(Hub.asked[0][2])
    assert made["name"] == "cat" and (made.get("private") or made.get("visibility") == "private")
    assert dualreal(hub, tmp_path, "push", run, "me/cat", "--public")[0] == 0
    made = [json.loads(body) for path, _, body in Hub.asked if path == "/api/repos/create"][-1]
    assert made.get("private") is False or made.get("visibility") == "public"
    status, out, err = dualreal(hub, tmp_path, "inspect", "me/cat")  # and back again
    assert status == 0 and "rank               2" in out, err


@pytest.mark.parametrize("words, token, says", [
    (("me/cat",), "hf_bad", "does not take me/cat"), (("cat",), "hf_good", "give owner/name"),
    (("me/cat",), "", "nobody is logged in")], ids=["refused", "no name", "logged out"])
def test_push_that_fails(hub, run, tmp_path, words, token, says):
    status, _, err = dualreal(hub, tmp_path, "push", run, *words, token=token)
    assert status == 2 and says in err.splitlines()[-1] and not Hub.files
