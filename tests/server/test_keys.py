"""Keys: who is let in where, and what everybody else is told."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from dsla.errors import ConfigError
from dsla.server.gate import OPEN
from dsla.server.keys import Keys, read_keys
from dsla.server.settings import ServerSettings
from tests.server.asgi import BODY, app_of, error

FIRST, SECOND, ADMIN = "sk-first-0123456789", "sk-second-0123456789", "sk-admin-0123456789"
KEYS: dict[str, Any] = {"api_keys": (FIRST, SECOND), "admin_key": ADMIN}
GUARDED = ("/v1/models", "/metrics", "/openapi.json", "/no-such-page")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        bearer("none"),
        bearer(FIRST[:-1]),
        bearer(FIRST + "x"),
        bearer(f"{FIRST}, {SECOND}"),
        {"authorization": FIRST},
        {"authorization": f"Basic {FIRST}"},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": FIRST},
    ],
    ids=str,
)
async def test_without_the_right_key_everything_but_probes_is_401(headers: Any) -> None:
    async with app_of(**KEYS) as (_, http):
        for path in (*GUARDED, "/admin/state", "/admin/plan"):
            response = await http.get(path, headers=headers)
            assert error(response) == (401, "invalid_api_key")
            assert response.json()["error"]["type"] == "invalid_request_error"
            assert response.headers["www-authenticate"] == "Bearer"
            assert FIRST[:-1] not in response.text
        assert error(await http.post("/v1/completions", json=BODY, headers=headers)) == (401, "invalid_api_key")
        for path in OPEN:
            assert (await http.get(path, headers=headers)).status_code in (200, 503)
        assert (await http.get("/v1/models", headers=bearer(FIRST))).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "settings", [{}, {"api_keys": (FIRST,)}, {"admin_key": ADMIN}, KEYS], ids=["none", "api", "admin", "both"]
)
async def test_the_schema_says_which_keys_open_what(settings: dict[str, Any]) -> None:
    kinds = {"api": FIRST} if "api_keys" in settings else {}
    kinds |= {"admin": ADMIN} if "admin_key" in settings else {}
    async with app_of(**settings) as (_, http):
        schema = (await http.get("/openapi.json", headers=bearer(FIRST) if "api" in kinds else {})).json()
        assert schema["components"].get("securitySchemes", {}) == dict.fromkeys(
            kinds, {"type": "http", "scheme": "bearer"}
        )
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                needed = [kind for each in operation.get("security", []) for kind in each]
                send = functools.partial(http.request, method, path.partition("{")[0] + "x" * ("{" in path), json={})
                assert ((await send()).status_code == 401) == bool(needed), path
                opening = [kind for kind, key in kinds.items() if (await send(headers=bearer(key))).status_code != 403]
                assert not needed or opening == needed, path
            if path == "/admin/drain":
                await http.post(path, json={"draining": False}, headers=bearer(ADMIN))


@pytest.mark.anyio
@pytest.mark.parametrize("key", [FIRST, SECOND])
async def test_every_api_key_opens_the_api_and_not_the_admin_api(key: str) -> None:
    async with app_of(**KEYS) as (_, http):
        http.headers.update(bearer(key))
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert (await http.get(path)).status_code == 200
        for path in ("/admin/state", "/admin/events", "/admin/plan", "/admin", "/admin/nothing"):
            assert error(await http.get(path)) == (403, "forbidden")
        for path in ("/admin/level", "/admin/drain", "/admin/cancel/x"):
            assert error(await http.post(path, json={})) == (403, "forbidden")
        assert (await http.get("/ready")).status_code == 200


@pytest.mark.anyio
async def test_the_admin_key_opens_the_admin_api_from_anywhere_and_not_the_api() -> None:
    async with app_of(client="203.0.113.9", **KEYS) as (_, http):
        http.headers.update(bearer(ADMIN))
        for path in ("/admin/state", "/admin/plan", "/metrics"):
            assert (await http.get(path, headers={"host": "example.org"})).status_code == 200
        assert error(await http.post("/v1/completions", json=BODY)) == (403, "forbidden")


@pytest.mark.anyio
async def test_with_api_keys_and_no_admin_key_the_admin_api_is_off() -> None:
    async with app_of(api_keys=(FIRST,)) as (_, http):
        for headers in ({}, bearer(FIRST)):
            response = await http.get("/admin/state", headers=headers)
            assert error(response) == (403, "forbidden")
            assert "admin key" in response.text


@pytest.mark.anyio
async def test_an_admin_key_alone_leaves_the_api_open() -> None:
    async with app_of(admin_key=ADMIN) as (_, http):
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert error(await http.get("/admin/state")) == (401, "invalid_api_key")
        assert (await http.get("/admin/state", headers=bearer(ADMIN))).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[x"}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "[x"}, 403),
        ({"x-forwarded-for": "203.0.113.9"}, 403),
        ({"forwarded": "for=203.0.113.9"}, 403),
    ],
    ids=str,
)
async def test_without_keys_admin_is_not_for_proxies_and_pages_of_other_sites(
    headers: dict[str, str], status: int
) -> None:
    async with app_of() as (engine, http):
        response = await http.post("/admin/drain", headers=headers)
        assert response.status_code == status, response.text
        assert (engine.state == "draining") == (status == 200)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "10.0.0.7",
        "0.0.0.0",
        "localhost.evil.example",
        "[x",
        "",
    ],
)
async def test_without_keys_a_name_of_another_site_opens_nothing(host: str) -> None:
    async with app_of() as (engine, http):
        http.headers["host"] = host
        for path in ("/v1/models", "/metrics", "/openapi.json", "/admin/state", "/no-such-page"):
            assert error(await http.get(path)) == (403, "forbidden")
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/admin/drain"):
            assert error(await http.post(path, json=BODY)) == (403, "forbidden")
        assert engine.state != "draining" and engine.stats()["asked_tokens"] == 0
        for path in OPEN:
            assert (await http.get(path)).status_code in (200, 503)
        assert "--no-auth" in (await http.get("/v1/models")).text


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1:1", "127.8.8.8", "[::1]:8000"])
async def test_without_keys_names_of_this_machine_open_the_api(host: str) -> None:
    async with app_of() as (_, http):
        assert (await http.post("/v1/completions", json=BODY, headers={"host": host})).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("settings", [{"any_host": True}, KEYS], ids=["for everybody", "with keys"])
async def test_any_name_will_do_for_everybody_or_with_a_key(settings: dict[str, Any]) -> None:
    async with app_of(**settings) as (_, http):
        http.headers.update({"host": "dsla.example", **(bearer(FIRST) if "api_keys" in settings else {})})
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert error(await http.get("/admin/state")) == (403, "forbidden")


def test_a_caller_is_named_and_never_by_the_key() -> None:
    keys = Keys((FIRST, SECOND), ADMIN)
    assert [keys.caller(f"bearer  {key}") for key in (FIRST, SECOND, ADMIN)] == ["key 1", "key 2", "admin"]
    assert [keys.caller(text) for text in (None, "", "Bearer", f"Token {FIRST}")] == [None] * 4
    assert FIRST not in repr(vars(keys))


def test_keys_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# of the lab\n{FIRST}\n\n  {SECOND}  \n")
    assert read_keys(str(path)) == (FIRST, SECOND)
    path.write_text("# none yet\n")
    with pytest.raises(ConfigError, match="holds no key: write one a line"):
        read_keys(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: it is no UTF-8"):
        read_keys(str(path))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_keys(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("origin", ["*", "https://example.org", "http://localhost:3000", "http://[::1]:8080"])
def test_origins_as_browsers_write_them(origin: str) -> None:
    assert ServerSettings(cors_origins=(origin,)).cors_origins == (origin,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_keys": (FIRST, "")}, "API key 2 must be printable ASCII"),
        ({"api_keys": ("two words",)}, "API key 1 must be"),
        ({"api_keys": ("schlüssel",)}, "API key 1 must be"),
        ({"admin_key": ""}, "the admin key is empty"),
        ({"admin_key": "a\nb"}, "admin key 1 must be"),
        ({"api_keys": (FIRST,), "admin_key": FIRST}, "the admin key is an API key too"),
        ({"max_body_bytes": 0}, "max_body_bytes must be at least 1, found 0"),
        ({"max_answers": 0}, "max_answers must be at least 1"),
        ({"max_answers": 257}, "max_answers must be at most 256"),
        ({"max_concurrent": 0}, "max_concurrent must be at least 1"),
        ({"request_seconds": 0.0}, "request_seconds must be positive"),
        (
            {"cors_origins": ("example.org",)},
            "an origin is written as https://example.org or \\*, found 'example.org'$",
        ),
        ({"cors_origins": ("https://a.org", "https://b.org/")}, "found 'https://b.org/': give 'https://b.org'"),
        ({"cors_origins": ("https://b.org:8443/a?b#c",)}, "give 'https://b.org:8443'"),
        ({"cors_origins": ("HTTPS://B.org:443",)}, "give 'https://b.org'"),
        ({"cors_origins": ("http://me@[::1]:80",)}, r"give 'http://\[::1\]'"),
        ({"cors_origins": ("ftp://b.org",)}, "an origin is written"),
        ({"cors_origins": ("https://",)}, "an origin is written"),
        ({"cors_origins": ("https://b.org:port",)}, "an origin is written"),
        ({"cors_origins": ("https://[b",)}, "an origin is written"),
    ],
    ids=str,
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        ServerSettings(**settings)
    assert FIRST not in str(refused.value) and "schl" not in str(refused.value)
