"""Errors as the OpenAI API answers them: a status and `{"error": {"message", "type", "param", "code"}}`.

Messages name fields and limits. They never hold text of a prompt, a path or a stack trace.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dsla.errors import RequestError
from dsla.server.responses import ErrorBody, ErrorDetail

logger = logging.getLogger(__name__)

_MAX_NAME = 64
_LEVEL_FIELDS = ("quality", "max_level", "min_level")


RETRY_SECONDS = {429: 1, 503: 5}
"""Status -> after how long a request that was refused may be sent again: when there is room; to another server, or this
one once it has come back."""

_HTTP_CODES = {408: "request_timeout", 413: "body_too_large", 429: "overloaded"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: what is wrong and what to do.
        param: field that is wrong, as `messages[0].content`.
        code: word for programs, as `model_not_found`.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: RequestError) -> ApiError:
        """The answer to a request that the engine refuses."""
        param = f"dsla.{error.param}" if error.param in _LEVEL_FIELDS else error.param
        return cls(400, str(error), param=param, code="invalid_value")

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": str(RETRY_SECONDS[self.status])} if self.status in RETRY_SECONDS else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def check_model(asked: str, served: str) -> None:
    """Refuses requests for another model.

    Raises:
        ApiError: it is another one.
    """
    if asked != served:
        message = f"The requested model does not exist; this server has '{served}'"
        raise ApiError(404, message, param="model", code="model_not_found")


def unavailable() -> ApiError:
    """The answer where the engine has stopped."""
    return ApiError(503, "The engine has stopped; the server must be restarted. See its log.", code="engine_stopped")


def draining() -> ApiError:
    """The answer where the engine takes nothing new."""
    return ApiError(503, "The server is going to stop and takes nothing new; ask another one", code="draining")


def not_ready(state: str) -> ApiError:
    """The answer to whoever asks whether requests are taken while the engine is in such a state."""
    return ApiError(503, f"The server is not ready: {state}", code=state.replace("-", "_"))


def timed_out() -> ApiError:
    """The answer where a request takes too long."""
    return ApiError(504, "The request took longer than this server allows; ask for fewer tokens", code="timeout")


def busy() -> ApiError:
    """The answer where too many requests wait."""
    return ApiError(429, "Too many requests wait; try again later", code="overloaded")


def internal_error() -> ApiError:
    """The answer where the server itself failed."""
    return ApiError(500, "The server had an error while processing the request. See its log.", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Makes `app` answer every error in OpenAI's format."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestError)
    async def _refused(request: Request, error: RequestError) -> JSONResponse:
        return ApiError.of(error).response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return _http_error(request, error).response()


def _http_error(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, f"Unknown URL ({request.method} {request.url.path[:_MAX_NAME]})", code="unknown_url")
    if error.status_code == 405:
        return ApiError(405, f"Method {request.method} is not allowed here", code="method_not_allowed")
    return ApiError(error.status_code, str(error.detail), code=_HTTP_CODES.get(error.status_code))


def _validation_error(errors: Sequence[Any]) -> ApiError:
    """The answer to a body that does not fit its model; tells of the first error."""
    error = errors[0]
    kind, location = str(error["type"]), error["loc"]
    if kind == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {error['ctx']['error']} at character {location[-1]}")
    param = _param(location)
    if param is None:
        if kind in ("only_with", "only_one"):
            return ApiError(400, error["msg"], code="invalid_value")
        if kind == "string_unicode":
            return ApiError(400, "The name of a parameter holds half a surrogate pair, which is no character")
        return ApiError(400, "Expected a JSON object as body, sent with the header 'Content-Type: application/json'")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'", param=param, code="unknown_parameter")
    if kind == "unsupported":
        return ApiError(
            400, f"Unsupported parameter: '{param}': {error['msg']}", param=param, code="unsupported_parameter"
        )
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ApiError(400, f"Invalid value for '{param}': {_lower(error['msg'])}", param=param, code=code)


def _param(location: Sequence[Any]) -> str | None:
    """`("body", "messages", 0, "role")` as `messages[0].role`; None for the body as a whole."""
    name = ""
    for part in location[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{str(part)[:_MAX_NAME]}"
    return name.removeprefix(".") or None


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
