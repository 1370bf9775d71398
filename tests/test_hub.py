"""A dataset on the hub, which is played by a server of this machine: fetched, read in units, and read again offline."""

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from data_prep.documents import SourceError
from data_prep.sources import input_files, plan_units
from data_prep.tables import parse_hub_name

REVISION = "a" * 40
ROWS = [f"row {number} é" for number in range(500)]
FILES = {
    "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: data/train.jsonl\n---\n",
    "data/train.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in ROWS).encode(),
}
SCRIPT = """
import json
from data_prep.origin import record_input
from data_prep.sources import SourceError, plan_units, read_unit
units = plan_units(["hub://owner/rows"], unit_bytes=2000)
texts = [document.text for unit in units for document in read_unit(unit)]
try:
    missing = plan_units(["hub://owner/none:small@test"])
except SourceError as error:
    missing = str(error)
print(json.dumps([len(units), texts, record_input("hub://owner/rows").xxh3_128, missing]))
"""


class _Hub(BaseHTTPRequestHandler):
    """The requests by which one public dataset is found and fetched."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/datasets/owner/rows/resolve/"):
            self._send_file(path.split("/", 6)[6])
        elif path.startswith("/api/datasets/owner/rows/tree/"):
            self._send_json([{"type": "file", "path": name, "size": len(FILES[name]), "oid": "1"} for name in FILES])
        elif path.startswith("/api/datasets/owner/rows"):
            siblings = [{"rfilename": name} for name in FILES]
            self._send_json({"_id": "1", "id": "owner/rows", "sha": REVISION, "siblings": siblings, "tags": []})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _send_file(self, name):
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha1(name.encode()).hexdigest()}"'}
        if name in FILES:
            self._send(200, FILES[name], headers)
        else:
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})

    def _send_json(self, content):
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, code, body, headers):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def read(folder, endpoint, **environment):
    environment |= {"HF_HOME": str(folder), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    arguments = [sys.executable, "-c", SCRIPT]
    root = Path(__file__).parents[1]
    result = subprocess.run(
        arguments, cwd=root, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_a_dataset_is_fetched_once_and_read_without_a_network(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        num_units, texts, content, missing = read(tmp_path, endpoint)
    finally:
        server.shutdown()
        server.server_close()
    assert num_units > 3 and texts == ROWS
    assert missing.startswith("input 'hub://owner/none:small@test': ")
    *again, missing = read(tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert again == [num_units, texts, content]
    assert missing.startswith("input 'hub://owner/none:small@test': Couldn't reach 'owner/none' on the Hub")
    command = "datasets.load_dataset(path='owner/none', name='small', split='test').save_to_disk('FOLDER')"
    assert f"where there is a network run {command}, bring FOLDER here and give it as the input" in missing


def test_names_of_datasets():
    expected = {"path": "owner/name", "name": None, "split": "train", "revision": None}
    assert parse_hub_name("hub://owner/name") == expected
    expected |= {"name": "20231101.en", "split": "train[:5%]", "revision": "v2"}
    assert parse_hub_name("hub://owner/name:20231101.en@train[:5%]#v2") == expected
    for name in ("hub://", "hub:///etc", "hub://a/b/c", "hub://../secret"):
        with pytest.raises(SourceError, match=r"write hub://OWNER/NAME\[:CONFIG\]\[@SPLIT\]\[#REVISION\]"):
            input_files(name)
    assert input_files("hub://owner/name") == []


def test_a_folder_is_never_taken_for_a_dataset_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(SourceError, match="input 'hub://data': a folder data is here, too: give its path"):
        plan_units(["hub://data"])
