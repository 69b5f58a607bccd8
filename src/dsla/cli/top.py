"""`dsla top`: a live view of a running server."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from dsla.errors import ConfigError

if TYPE_CHECKING:
    from httpx import Client
    from rich.console import Console, RenderableType

    from dsla.cli.top_view import Watched

_TIMEOUT_SECONDS = 5.0
_LEAST_WIDTH, _LEAST_HEIGHT = 60, 16


def top(
    url: Annotated[str, typer.Argument(help="A server that `dsla serve` runs.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="Print what is so now, and end.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 1.0,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key for /admin, where the server wants one.", envvar=["DSLA_ADMIN_KEY", "DSLA_API_KEY"]),
    ] = None,
) -> None:
    """Watch a server: its requests, memory, levels, latencies and decisions. The key q leaves."""
    import httpx
    from rich.console import Console

    from dsla.cli.top_view import Watched, picture
    from dsla.client import key_headers, server_root

    console, root = Console(highlight=False), server_root(url)
    if not once:
        if not console.is_terminal:
            raise ConfigError("the live view needs a terminal, and stdout is none: use --once")
        if (problem := too_small(console)) is not None:
            raise ConfigError(f"{problem}: enlarge it, or use --once")
    with httpx.Client(base_url=root, headers=key_headers(api_key), timeout=_TIMEOUT_SECONDS) as client:
        watched = Watched(root, "", {})
        look(client, watched)
        if once:
            console.print(picture(watched, console.width))
        else:
            with contextlib.suppress(KeyboardInterrupt):
                _watch(client, watched, console, interval)


def look(client: Client, watched: Watched) -> None:
    """Asks the server how it is.

    Args:
        client: with its address and key.
        watched: takes what it says.

    Raises:
        ConfigError: it does not answer, does not let us in, or is none of `dsla serve`.
    """
    from dsla.client import check_key, error_message, http_errors, no_server

    root = watched.root
    try:
        response = client.get("/admin/state", params={"events_after": watched.event_count})
    except http_errors() as error:
        raise no_server(root, error) from None
    check_key(response, root)
    if response.status_code >= 500:
        raise ConfigError(f"the server at {root} answers {response.status_code}: {error_message(response)}")
    try:
        state = response.json()
        watched.see(state["model"], state["stats"])
    except (ValueError, KeyError, TypeError):
        what = f"its /admin/state answers {response.status_code}"
        raise ConfigError(f"{root} is no server of `dsla serve` ({what}): fix the URL") from None


def too_small(console: Console) -> str | None:
    """What is wrong with the size of a terminal, or None."""
    if console.width >= _LEAST_WIDTH and console.height >= _LEAST_HEIGHT:
        return None
    size = f"{console.width} columns and {console.height} lines"
    return f"the terminal has {size}, and the view needs {_LEAST_WIDTH} and {_LEAST_HEIGHT}"


def _watch(client: Client, watched: Watched, console: Console, interval: float) -> None:
    from rich.live import Live
    from rich.text import Text

    from dsla.cli.keys import Keys
    from dsla.cli.top_view import picture

    def view() -> RenderableType:
        problem = too_small(console)
        return picture(watched, console.width, console.height) if problem is None else Text(problem)

    with Live(console=console, screen=True, auto_refresh=False) as live, Keys() as keys:
        while True:
            live.update(view(), refresh=True)
            if keys.wait(interval) == "q":
                return
            try:
                look(client, watched)
            except ConfigError as error:
                watched.lost = str(error)
