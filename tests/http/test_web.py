"""`GET /`: the page's files, which need no key and load nothing from elsewhere. tests/page/ uses it in a browser."""

from __future__ import annotations

import re

import httpx
import pytest
from lmserve.api.routes.web import web_files

NAMES = sorted(set(web_files()) - {"index.html"})


def test_the_page_and_what_it_may_load(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?:|\*|data:", policy)
    links = re.findall(r'(?:href|src)="(?!#)([^"]+)"', page.text)
    assert links
    for link in links:
        assert link == "docs" or link.removeprefix("web/") in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_served_and_names_no_other_host(client: httpx.Client, name: str) -> None:
    reply = client.get(f"/web/{name}")
    assert reply.status_code == 200
    assert reply.content == web_files()[name]
    addresses = set(re.findall(r"https?://[\w.]+", reply.text)) - {"http://www.w3.org"}
    assert addresses == set()
    for module in re.findall(r'from "\./([^"]+)"', reply.text):
        assert module in NAMES


def test_other_names_are_not_found(client: httpx.Client) -> None:
    for name in ("__init__.py", "index.html", "nothing.js"):
        assert client.get(f"/web/{name}").status_code == 404
