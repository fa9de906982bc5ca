"""Keys, and what browsers may do to the server on behalf of web pages."""

from __future__ import annotations

import pytest
from served import HTTP, serving

from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server.access import is_loopback
from selfextend_gguf.server.app import Settings

PAGE = "https://page.example"
BODY = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def local():
    """Without a key, on this machine alone; pages of PAGE may use it."""
    with serving({"tiny": TINY_MODEL}, ctx=256, settings=Settings(origins=[PAGE], is_local=True)) as server:
        yield server.url


@pytest.fixture(scope="module")
def keyed():
    """With two keys, under any name; all pages may use it."""
    with serving({"tiny": TINY_MODEL}, ctx=256, settings=Settings(keys=["one", "two"], origins=["*"])) as server:
        yield server.url


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        (PAGE, True),
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:8080", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://127.0.0.1.evil.example", False),
        ("https://page.example.evil.example", False),
        ("null", False),
    ],
)
def test_pages_of_elsewhere_are_refused(local, origin, allowed):
    headers = {} if origin is None else {"Origin": origin}
    response = HTTP.post(f"{local}/v1/completions", json=BODY, headers=headers)
    assert response.status_code == (200 if allowed else 403)
    if allowed:
        assert response.headers.get("Access-Control-Allow-Origin") == origin
    else:
        assert "Access-Control-Allow-Origin" not in response.headers
        assert response.json()["error"]["message"].startswith(f"pages of '{origin}' may not use this server")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    if origin is not None:
        before = HTTP.options(f"{local}/v1/completions", headers=headers | asked)
        assert before.status_code == (200 if allowed else 400)
        assert ("Access-Control-Allow-Origin" in before.headers) is allowed


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8080", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9", True),
        ("[::1]:8080", True),
        ("evil.example", False),
        ("evil.example:8080", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("192.168.0.1", False),
    ],
)
def test_names_of_others_are_refused(local, keyed, host, allowed):
    """A page whose name leads here all of a sudden (DNS rebinding) is of the same origin as what it asks."""
    headers = {"Host": host}
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/health")):
        body = BODY if method == "POST" else None
        response = HTTP.request(method, local + path, json=body, headers=headers)
        assert response.status_code == (200 if allowed else 403), path
    with_key = headers | {"Authorization": "Bearer one"}
    assert HTTP.get(f"{keyed}/v1/models", headers=with_key).status_code == 200  # which no page has


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer one"}, 200),
        ({"Authorization": "bearer  two"}, 200),
        ({"X-Api-Key": "two"}, 200),
        ({"Authorization": "Bearer on"}, 401),
        ({"Authorization": "Bearer onetwo"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Basic one"}, 401),
        ({"Authorization": b"Bearer \xff"}, 401),
        ({}, 401),
    ],
)
def test_one_of_the_keys_is_needed(keyed, headers, status):
    response = HTTP.get(f"{keyed}/v1/models", headers=headers | {"Origin": PAGE})
    assert response.status_code == status
    assert response.headers["Access-Control-Allow-Origin"] == "*"  # pages may read that it was refused
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "::1", "[::1]", "127.1.2.3", "localhost.")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "example.org", "localhost.example", "", "127.1")))
