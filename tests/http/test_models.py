"""GET /v1/models and GET /health."""

from __future__ import annotations

import httpx
import pytest
from conftest import ALIAS, MODEL, NAMES, SLASHED


def test_list(client: httpx.Client) -> None:
    reply = client.get("/v1/models").json()
    assert reply["object"] == "list"
    assert [card["id"] for card in reply["data"]] == NAMES
    card = reply["data"][0]
    permission = card.pop("permission")
    created = card.pop("created")
    assert card.pop("max_model_len") > 0
    assert card.pop("default_sampling_params") == {}
    assert card == {"id": MODEL, "object": "model", "owned_by": "lmserve", "root": MODEL, "parent": None}
    assert created > 1_700_000_000
    (entry,) = permission
    assert entry.pop("id").startswith("modelperm-")
    assert entry == {
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": True,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


@pytest.mark.parametrize("name", [MODEL, ALIAS, SLASHED])
def test_one(client: httpx.Client, name: str) -> None:
    card = client.get(f"/v1/models/{name}").json()
    assert card in client.get("/v1/models").json()["data"]
    assert card["id"] == name
    assert card["root"] == MODEL


def test_health(client: httpx.Client) -> None:
    response = client.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ok"}
