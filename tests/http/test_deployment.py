"""docs/deploy: the unit and the proxies' settings as they stand, and what docs/deployment.md says of routes."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import Running, serve_core
from lmserve.cli import parse
from lmserve.cli.serve import config_of
from lmserve.server import bind
from scripted_core import ScriptedCore
from websockets.sync.client import connect

from wire import wait_until

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
PAGE = (DEPLOY.parent / "deployment.md").read_text("utf-8")
UPSTREAM = "127.0.0.1:23333"
NGINX, CADDY = shutil.which("nginx"), shutil.which("caddy")
ANALYZE, COMPOSE = shutil.which("systemd-analyze"), shutil.which("docker-compose")


@pytest.fixture(scope="module")
def behind() -> Iterator[Running]:
    with serve_core(ScriptedCore()) as running:
        yield running


def free_port() -> int:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    return port


@contextmanager
def proxy(command: list[str], folder: Path, client: httpx.Client) -> Iterator[httpx.Client]:
    """The proxy, once it passes requests on."""

    def answers() -> bool:
        assert process.poll() is None, (folder / "output").read_text("utf-8")
        try:
            return client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    with (folder / "output").open("wb") as output, client:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        try:
            wait_until(answers, "the proxy answers", 30)
            yield client
        finally:
            process.terminate()
            process.wait(30)


def streams_and_notices(client: httpx.Client, behind: Running) -> None:
    """Pieces come while the answer goes on, and a client that leaves is noticed behind the proxy."""
    core = behind.core
    aborts = core.aborts
    body = {"prompt": "[[hold]] [[pace 0.05]]", "stream": True, "request_output_len": 4000}
    with client.stream("POST", "/generate", json=body) as reply:
        assert reply.status_code == 200
        pieces = reply.iter_raw()
        assert b'"text"' in next(pieces)
        assert b'"text"' in next(pieces)
        assert core.streams
    wait_until(lambda: core.aborts == aborts + 1, "the request is aborted")
    wait_until(lambda: not core.streams, "no stream runs")
    assert client.post("/generate", json={"prompt": "x" * 900_000, "request_output_len": 2}).json()["tokens"] == 2


def opens_a_socket(client: httpx.Client, trust: ssl.SSLContext | None = None) -> None:
    url = str(client.base_url).rstrip("/").replace("http", "ws", 1)
    with connect(f"{url}/v1/responses", ssl=trust) as socket:
        socket.send("{}")
        assert json.loads(socket.recv(timeout=30))["error"]["param"] == "type"


@pytest.mark.skipif(NGINX is None or shutil.which("openssl") is None, reason="no nginx, or no openssl")
def test_nginx(behind: Running, tmp_path: Path) -> None:
    names = ["-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=localhost"]
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *names]
    subject = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*new, *subject], cwd=tmp_path, check=True, capture_output=True)
    port = free_port()
    site = (DEPLOY / "nginx.conf").read_text("utf-8")
    for there, here in (
        ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("/etc/nginx/llm.example.org.pem", str(tmp_path / "cert.pem")),
        ("/etc/nginx/llm.example.org.key", str(tmp_path / "key.pem")),
        (UPSTREAM, behind.url.removeprefix("http://")),
    ):
        assert there in site
        site = site.replace(there, here)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
    head = "daemon off;\nmaster_process off;\npid pid;\nevents {}\nhttp {\naccess_log off;\n"
    (tmp_path / "nginx.conf").write_text(f"{head}{temporary}{site}}}\n", "utf-8")
    trust = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    client = httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, timeout=30)
    command = [NGINX, "-p", str(tmp_path), "-c", "nginx.conf", "-e", "stderr"]
    with proxy(command, tmp_path, client) as through:
        streams_and_notices(through, behind)
        opens_a_socket(through, trust)


@pytest.mark.skipif(CADDY is None, reason="no Caddy")
def test_caddy(behind: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    site = (DEPLOY / "Caddyfile").read_text("utf-8")
    assert "llm.example.org" in site
    site = site.replace("llm.example.org", f"http://127.0.0.1:{port}")
    site = site.replace(UPSTREAM, behind.url.removeprefix("http://"))
    (tmp_path / "Caddyfile").write_text("{\n\tadmin off\n}\n" + site, "utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
    with proxy([CADDY, "run", "--config", "Caddyfile"], tmp_path, client) as through:
        streams_and_notices(through, behind)
        opens_a_socket(through)


@pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze")
def test_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "lmserve.service").read_text("utf-8")
    (tmp_path / "lmserve.service").write_text(unit.replace("/opt/lmserve/bin/lmserve", "/bin/true"), "utf-8")
    command = [ANALYZE, "verify", str(tmp_path / "lmserve.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "lmserve.service" not in done.stderr, done.stderr


def test_the_units_settings(tmp_path: Path) -> None:
    unit = (DEPLOY / "lmserve.service").read_text("utf-8")
    lines = re.findall(r"^Environment=(.*)$", unit, re.MULTILINE)
    environment = dict(pair.split("=", 1) for line in lines for pair in line.split())
    (command,) = re.findall(r"^ExecStart=\S+/lmserve (.*)$", unit, re.MULTILINE)
    (text,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    file = tmp_path / "lmserve.toml"
    file.write_text(text, "utf-8")
    config = config_of(parse(command.replace("/etc/lmserve/lmserve.toml", str(file)).split()), environment)
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert config.grace < int(stop)
    assert (config.session_dir, config.session_ttl) == (Path("/var/lib/lmserve"), 86400)


def test_the_probes(behind: Running) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    probes = yaml.safe_load(text)
    assert probes.keys() == {"startupProbe", "livenessProbe", "readinessProbe"}
    for probe in probes.values():
        assert httpx.get(behind.url + probe["httpGet"]["path"]).status_code == 200


def test_the_container(behind: Running) -> None:
    text = (DEPLOY / "Containerfile").read_text("utf-8").replace("\\\n", " ")
    instructions = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    for name, rest in instructions:
        if name == "COPY" and not rest.startswith("--from"):
            assert (DEPLOY.parents[1] / rest.split()[0]).exists()
    (variables,) = [rest for name, rest in instructions if name == "ENV"]
    environment = dict(pair.split("=", 1) for pair in variables.split())
    (command,) = [json.loads(rest) for name, rest in instructions if name == "CMD"]
    config = config_of(parse(command), environment)
    assert (config.host, config.session_dir) == ("0.0.0.0", Path("/sessions"))
    # docker stop waits for ten seconds.
    assert config.grace < 10
    (port,) = [rest for name, rest in instructions if name == "EXPOSE"]
    assert int(port) == config.port
    (health,) = [rest.partition("CMD ")[2] for name, rest in instructions if name == "HEALTHCHECK"]
    _, *arguments = json.loads(health.replace(f"http://127.0.0.1:{port}", behind.url))
    subprocess.run([sys.executable, *arguments], check=True, timeout=60)


def test_the_manifest(behind: Running) -> None:
    stateful_set, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
    pod = stateful_set["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    config = config_of(parse(container["args"]), {})
    assert config.grace < pod["terminationGracePeriodSeconds"]
    (port,) = container["ports"]
    assert port["containerPort"] == config.port == service["spec"]["ports"][0]["port"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
        assert httpx.get(behind.url + container[probe]["httpGet"]["path"]).status_code == 200
    claims = [claim["metadata"]["name"] for claim in stateful_set["spec"]["volumeClaimTemplates"]]
    volumes = {*claims, *(volume["name"] for volume in pod["volumes"])}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert service["spec"]["selector"] == stateful_set["spec"]["template"]["metadata"]["labels"]


def test_the_compose_file_fits_what_it_names() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    services = compose["services"]
    for service in services.values():
        mounts = [mount.split(":") for mount in service["volumes"]]
        for source, target, *_ in mounts:
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in compose["volumes"], source
            assert target.startswith("/")
    server = services["lmserve"]
    image = (DEPLOY / "Containerfile").read_text("utf-8")
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).samefile(DEPLOY / "Containerfile")
    grace = re.search(r"LMSERVE_GRACE=(\d+)", image)
    assert grace is not None
    assert int(grace[1]) < int(server["stop_grace_period"].removesuffix("s"))
    assert {mount.split(":")[1] for mount in server["volumes"]} == {"/models", "/sessions"}
    secret = f"/run/secrets/{server['secrets'][0]}"
    assert server["environment"] == {"LMSERVE_API_KEY_FILE": secret}
    assert config_of(parse(server["command"][:1])).port == 23333
    scrape = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text("utf-8"))
    mounted = {Path(mount.split(":")[1]).name for mount in services["prometheus"]["volumes"]}
    assert set(scrape["rule_files"]) <= mounted
    (job,) = scrape["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["lmserve:23333"]}]
    assert job["authorization"]["credentials_file"] == secret
    assert services["prometheus"]["secrets"] == server["secrets"]
    folder = yaml.safe_load((DEPLOY / "compose" / "dashboards.yml").read_text("utf-8"))["providers"][0]["options"][
        "path"
    ]
    assert f"{folder}/lmserve.json" in {mount.split(":")[1] for mount in services["grafana"]["volumes"]}


@pytest.mark.skipif(COMPOSE is None, reason="needs docker-compose")
def test_docker_compose_reads_the_file(tmp_path: Path) -> None:
    copy = tmp_path / "docs"
    shutil.copytree(DEPLOY.parent, copy)
    (copy / "deploy" / "lmserve.key").write_text("sk-x\n")
    shown = subprocess.run(
        [str(COMPOSE), "config"], cwd=copy / "deploy", capture_output=True, text=True, timeout=60, check=True
    )
    assert set(yaml.safe_load(shown.stdout)["services"]) == {"lmserve", "prometheus", "grafana"}
