"""HTTPS, with a certificate that openssl makes."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from conftest import MAX_BODY, NAMES
from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.server import Server, Tls, TlsError, bind, server_config, url_of
from scripted_core import ScriptedCore

from wire import frames_of

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
PASSWORD = "pass:x"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2", *subject]
    openssl(*new, "-nodes", "-keyout", "key.pem", "-out", "cert.pem")
    openssl(*new, "-nodes", "-keyout", "other.pem", "-out", "other-cert.pem")
    openssl(*new, "-passout", PASSWORD, "-keyout", "locked.pem", "-out", "locked-cert.pem")
    return folder


def test_https(folder: Path) -> None:
    tls = Tls(folder / "cert.pem", folder / "key.pem")
    app = create_app(AsyncEngine(ScriptedCore(), max_model_len=4096), NAMES, max_body=MAX_BODY)
    listener, listening = bind("127.0.0.1", 0), threading.Event()
    url = url_of(listener, "https")
    server = Server(server_config(app, tls), app.state.serving, 0.2, listening.set)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert listening.wait(30)
        trust = ssl.create_default_context(cafile=str(folder / "cert.pem"))
        with httpx.Client(base_url=url, verify=trust) as client:
            assert client.get("/health").status_code == 200
            body = {"prompt": "x" * 500_000, "stream": True, "request_output_len": 3}
            assert frames_of(client.post("/generate", json=body).content)[-1]["tokens"] == 3
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("cert", "key", "expected"),
    [
        ("cert.pem", "other.pem", "are not a certificate and its key"),
        ("key.pem", "key.pem", "are not a certificate and its key"),
        ("none.pem", "key.pem", "cannot be read: No such file"),
        ("locked-cert.pem", "locked.pem", "the key is encrypted; decrypt it first"),
    ],
)
def test_files_that_cannot_be_used(folder: Path, cert: str, key: str, expected: str) -> None:
    with pytest.raises(TlsError, match=expected):
        Tls(folder / cert, folder / key)
