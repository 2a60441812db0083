"""docs/grafana: every query of the dashboard and of the alerts asks for what /metrics has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser as promql
import pytest
import yaml
from conftest import Running, serve_core
from lmserve import _core
from lmserve.api.http.exposition import ALIASES, KV_USE, Family, parsed
from lmserve.engine.text import TextLayer
from lmserve.server import bind
from tiny_engine import TEMPLATE, byte_tokenizer, formula_engine

from wire import wait_until

GRAFANA = Path(__file__).parents[2] / "docs" / "grafana"
BOARD = json.loads((GRAFANA / "lmserve.json").read_text("utf-8"))
ALERTS = yaml.safe_load((GRAFANA / "alerts.yml").read_text("utf-8"))
SCRAPED = {"instance", "job"}  # Prometheus gives these labels to every series
COUNTING = {"rate", "increase"}
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
VARIABLES = [variable for variable in BOARD["templating"]["list"] if variable["type"] == "query"]
LABEL_VALUES = re.compile(r"label_values\((?P<selector>.*), (?P<label>\w+)\)")
PROMETHEUS = shutil.which("prometheus")


def concrete(query: str) -> str:
    """The query with Grafana's variables filled in."""
    query = query.replace("$__rate_interval", "10s")
    for variable in VARIABLES:
        query = query.replace("$" + variable["name"], ".*")
    assert "$" not in query, query
    return query


BOARD_QUERIES = [(panel["title"], concrete(target["expr"])) for panel in PANELS for target in panel["targets"]]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [*BOARD_QUERIES, *((rule["alert"], rule["expr"]) for rule in RULES)]


@pytest.fixture(scope="module")
def asked() -> Iterator[Running]:
    """A server that has answered."""
    text = TextLayer(byte_tokenizer(), _core.ChatTemplate(TEMPLATE, b"{}"))
    with serve_core(formula_engine(), text) as running:
        ask(running)
        yield running


def ask(running: Running) -> None:
    body = {"prompt": "Hello", "max_tokens": 5, "ignore_eos": True}
    httpx.post(f"{running.url}/v1/completions", json=body).raise_for_status()


# Of servers with a worker process alone; test_worker_process.py has them.
OF_WORKERS = {"lmserve_worker_processes", "lmserve_worker_restarts_total"}
# Of servers with a shared session store alone; test_replicas.py has them.
OF_A_STORE = {"lmserve_session_store_writes_total"}


@pytest.fixture(scope="module")
def families(asked: Running) -> dict[str, Family]:
    return parsed(httpx.get(f"{asked.url}/metrics").text)


def inside(expression: Any) -> list[Any]:
    """The expressions that an expression is made of."""
    names = ("expr", "param", "lhs", "rhs", "args", "vector_selector")
    parts = [getattr(expression, name) for name in names if getattr(expression, name, None) is not None]
    return [part for found in parts for part in (found if isinstance(found, list) else [found])]


def selectors(expression: Any, function: str | None = None) -> Iterator[tuple[Any, str | None]]:
    """Each selector of series in an expression, with the function that it is given to."""
    if isinstance(expression, promql.VectorSelector):
        yield expression, function
        return
    within = expression.func.name if isinstance(expression, promql.Call) else function
    for part in inside(expression):
        yield from selectors(part, within)


def grouping(expression: Any) -> Iterator[str]:
    """The labels that an expression groups by."""
    if isinstance(expression, promql.AggregateExpr) and expression.modifier is not None:
        yield from expression.modifier.labels
    for part in inside(expression):
        yield from grouping(part)


def series(families: dict[str, Family], name: str) -> tuple[str, list[str]]:
    """A metric's kind, and the labels of its series as they are written. Fails if there is none."""
    for family, found in families.items():
        written = [labels for suffix, labels, _ in found.samples if family + suffix == name]
        if written:
            return found.kind, written
    pytest.fail(f"/metrics has no {name}")


def labels_of(families: dict[str, Family], name: str) -> set[str]:
    _, written = series(families, name)
    (labels,) = {frozenset(re.findall(r"(\w+)=\"", text)) for text in written}
    return {*labels, *SCRAPED}


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[title for title, _ in QUERIES])
def test_a_query_finds_its_series(families: dict[str, Family], title: str, query: str) -> None:
    expression = promql.parse(query)
    found = [(selector, function) for selector, function in selectors(expression) if selector.name != "up"]
    assert found or title == "LmserveDown"
    known: set[str] = set(SCRAPED)
    for selector, function in found:
        kind, written = series(families, selector.name)
        labels = labels_of(families, selector.name)
        known |= labels
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels, f"{selector.name} has no label {matcher.name}"
            if matcher.op == promql.MatchOp.Equal:
                assert any(f'{matcher.name}="{matcher.value}"' in text for text in written), matcher.value
        assert (function in COUNTING) == (kind in ("counter", "histogram")), f"{function} of {selector.name}, a {kind}"
    assert set(grouping(expression)) <= known


def test_a_query_that_is_wrong_is_found(families: dict[str, Family]) -> None:
    (selector,) = [selector for selector, _ in selectors(promql.parse("sum(rate(lmserve_nothing_total[1m]))"))]
    with pytest.raises(pytest.fail.Exception, match="lmserve_nothing_total"):
        series(families, selector.name)
    assert "outcome" not in labels_of(families, "lmserve_queue_seconds_bucket")
    assert labels_of(families, "lmserve_queue_seconds_bucket") >= {"le", "model"}
    assert series(families, "lmserve_queue_seconds_bucket")[0] == "histogram"
    nested = promql.parse("max(lmserve_a) / (lmserve_b - sum by (x) (rate(lmserve_c[1m])))")
    found = [(selector.name, function) for selector, function in selectors(nested)]
    assert found == [("lmserve_a", None), ("lmserve_b", None), ("lmserve_c", "rate")]
    assert list(grouping(nested)) == ["x"]


def test_the_page_names_metrics_that_are_there(families: dict[str, Family]) -> None:
    page = (GRAFANA.parent / "monitoring.md").read_text("utf-8")
    named = set(re.findall(r"`((?:lmserve_|vllm:|llamacpp:)\w+)`", page)) - {"lmserve_"}
    assert named - OF_WORKERS - OF_A_STORE <= families.keys()
    assert named >= OF_WORKERS | OF_A_STORE | {alias for alias, _ in ALIASES} | set(KV_USE)


def test_variables_and_legends_name_labels(families: dict[str, Family]) -> None:
    for variable in VARIABLES:
        match = LABEL_VALUES.fullmatch(variable["query"]["query"])
        assert match is not None
        selector = promql.parse(concrete(match["selector"]))
        assert match["label"] in labels_of(families, selector.name)
    for panel in PANELS:
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= set(grouping(promql.parse(concrete(target["expr"])))), panel["title"]


def test_every_panel_says_what_it_shows_and_lies_on_no_other() -> None:
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or (panel["title"] and panel["description"])


def evaluated(client: httpx.Client) -> dict[str, str]:
    """What became of each alert."""
    time.sleep(0.5)
    (group,) = client.get("/api/v1/rules").json()["data"]["groups"]
    return {rule["name"]: rule["health"] for rule in group["rules"]}


@pytest.mark.skipif(PROMETHEUS is None, reason="no Prometheus: `apt-get install prometheus`")
def test_prometheus_answers_every_query(asked: Running, tmp_path: Path) -> None:
    listener = bind("127.0.0.1", 0)
    host, port = listener.getsockname()
    listener.close()
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [asked.url.removeprefix("http://")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    shutil.copy(GRAFANA / "alerts.yml", tmp_path)
    flags = [f"--web.listen-address={host}:{port}", "--storage.tsdb.path=data", "--config.file=prometheus.yml"]
    with (
        (tmp_path / "output").open("wb") as output,
        subprocess.Popen([PROMETHEUS, *flags], cwd=tmp_path, stdout=output, stderr=output) as process,
        httpx.Client(base_url=f"http://{host}:{port}") as client,
    ):
        try:
            unanswered = {query: title for title, query in BOARD_QUERIES}

            def answered() -> bool:
                time.sleep(0.5)
                ask(asked)
                try:
                    for query in [*unanswered]:
                        reply = client.get("/api/v1/query", params={"query": query})
                        assert reply.status_code == 200, reply.text
                        if reply.json()["data"]["result"]:
                            del unanswered[query]
                except httpx.ConnectError:
                    return False
                return not unanswered

            wait_until(answered, "Prometheus has series for every panel", 60)
            wait_until(lambda: evaluated(client) == {rule["alert"]: "ok" for rule in RULES}, "alerts are evaluated", 60)
        finally:
            process.terminate()
