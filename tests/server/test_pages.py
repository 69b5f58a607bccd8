"""The dashboard's files: what is served, to whom, under which policy; and what must not be in them."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dsla.server.pages import FOLDER, PAGES, POLICY, TYPES
from tests.server.asgi import app_of, error

OURS = sorted(path for path in FOLDER.iterdir() if path.suffix in TYPES)
SCRIPTS = [path for path in OURS if path.suffix == ".js"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Tags(HTMLParser):
    """Every element of a page with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.inline = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.inline += data.strip()


INDEX = Tags((FOLDER / "index.html").read_text(encoding="utf-8"))


@pytest.mark.anyio
@pytest.mark.parametrize("path", sorted(PAGES))
async def test_files_are_open_typed_and_under_a_strict_policy(path: str) -> None:
    async with app_of(api_keys=("key",), admin_key="admin", client="203.0.113.9") as (_, http):
        response = await http.get(path)
        known = await http.get(path, headers={"if-none-match": response.headers["etag"]})
    assert response.status_code == 200
    assert response.headers["content-type"] == TYPES[Path(path).suffix or ".html"]
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert (known.status_code, known.content) == (304, b"")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path", ["nothing.js", "index.html", "vendor/README.md", "../pages.py", "%2e%2e/pages.py", "/etc/passwd", ""]
)
async def test_nothing_else_is_served(path: str) -> None:
    async with app_of() as (_, http):
        assert error(await http.get(f"/dashboard/{path}")) == (404, "unknown_url")


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    assert "unsafe" not in POLICY and "http" not in POLICY and "*" not in POLICY
    assert POLICY.startswith("default-src 'none'")


def test_the_page_has_no_inline_script_or_style() -> None:
    assert INDEX.inline == ""
    for tag, attributes in INDEX.found:
        assert tag != "style"
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag


def test_all_that_the_page_loads_is_served() -> None:
    loaded = {
        value for tag, a in INDEX.found if tag in ("script", "link", "img") for value in (a.get("src"), a.get("href"))
    }
    loaded.discard(None)
    assert loaded >= {"dashboard/app.js", "dashboard/style.css"}
    assert {f"/{name}" for name in loaded if name} <= PAGES


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_modules_import_files_that_are_served(path: Path) -> None:
    names = re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8"))
    assert {f"/dashboard/{name}" for name in names} <= PAGES


def test_every_module_is_used() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in OURS)
    unused = [
        name for name in PAGES - {"/"} if f'"./{name.removeprefix("/dashboard/")}"' not in text and name[1:] not in text
    ]
    assert unused == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_elements_that_scripts_name_are_in_the_page(path: Path) -> None:
    ids = {attributes["id"] for _, attributes in INDEX.found if "id" in attributes}
    assert set(re.findall(r'byId\("([^"]+)"\)', path.read_text(encoding="utf-8"))) <= ids


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere_and_no_text_becomes_html(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    elsewhere, html = r"https?://|//cdn|@import", r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b"
    assert re.findall(f"{elsewhere}|{html}|localStorage.*key", text) == []


def test_vendored_files_are_those_their_readme_tells_of() -> None:
    folder = FOLDER / "vendor"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.iterdir():
        if path.suffix in TYPES:
            assert f"`{path.name}`" in readme
            assert hashlib.sha256(path.read_bytes()).hexdigest() in readme
    assert "MIT" in (folder / "uPlot.LICENSE").read_text(encoding="utf-8")
