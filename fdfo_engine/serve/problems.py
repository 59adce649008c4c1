"""Errors of the HTTP interface, as `application/problem+json` (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse, Response

from fdfo_engine.runtime.durable import plain_json
from fdfo_engine.runtime.errors import Cancelled, FdfoError, error_message, exit_code

MEDIA_TYPE = "application/problem+json"
_TITLES = {
    400: "Bad request",
    401: "No token",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    410: "Gone",
    413: "Too large",
    415: "Wrong media type",
    422: "Invalid request",
    429: "Too many requests",
    500: "Internal error",
    503: "Unavailable",
    507: "Storage full",
}
_STATUS_OF_EXIT_CODE = {2: 409, 3: 503, 4: 422, 5: 409, 6: 409, 7: 409, 8: 503, 75: 503}
RETRYABLE = (408, 429, 503)


class FieldProblem(BaseModel):
    """One wrong field of a request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    pointer: str
    """JSON pointer (RFC 6901) to it, in the body; of a query parameter its name."""
    detail: str
    """What is wrong with it."""


class ProblemBody(BaseModel):
    """What every error answers, but for `/v1/images/generations`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str = "about:blank"
    title: str
    status: int
    code: str
    """For programs: one word for each kind of error."""
    detail: str
    """For people: what was wrong and what is taken."""
    fix: str | None = None
    """What to do about it."""
    retryable: bool = False
    """Whether the same request may succeed later."""
    errors: list[FieldProblem] = Field(default=[])
    """All wrong fields at once."""
    expected_seq: int | None = None
    """Of `seq_gap`: the number that comes next."""


class Problem(Exception):  # noqa: N818 - the standard's name
    """An error with its answer; `code` is stable, `detail` is for people."""

    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        fix: str | None = None,
        retry_after_s: int | None = None,
        errors: Sequence[FieldProblem] = (),
        expected_seq: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.body = ProblemBody(
            title=_TITLES.get(status, "Error"),
            status=status,
            code=code,
            detail=detail,
            fix=fix,
            retryable=status in RETRYABLE,
            errors=list(errors),
            expected_seq=expected_seq,
        )
        self.retry_after_s = retry_after_s if retry_after_s is not None or status not in (429, 503) else 1

    @classmethod
    def stored(cls, body: Mapping[str, Any]) -> Problem:
        """The problem that was kept as `record`."""
        problem = cls(int(body["status"]), str(body["code"]), str(body["detail"]))
        problem.body = ProblemBody.model_validate(body)
        return problem

    @property
    def record(self) -> dict[str, Any]:
        """The body as JSON."""
        return self.body.model_dump(mode="json", exclude_none=True)

    def response(self) -> Response:
        """The answer."""
        headers = {"Cache-Control": "no-store"}  # a browser would keep a 410 for ever
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return JSONResponse(plain_json(self.record), self.body.status, headers=headers, media_type=MEDIA_TYPE)


def problem_of(error: BaseException) -> Problem:
    """What to answer for an error of the engine; a bug of ours keeps its details for the log."""
    if isinstance(error, Problem):
        return error
    code = exit_code(error)
    if isinstance(error, Cancelled):
        return Problem(409, "cancelled", error_message(error))
    if isinstance(error, FdfoError) or code != 1:
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            return Problem(507, "storage", error_message(error))
        name = "state" if code == 2 else type(error).__name__.removesuffix("Error").lower()
        return Problem(_STATUS_OF_EXIT_CODE.get(code, 500), name, error_message(error))
    return Problem(500, "bug", f"{type(error).__name__}; the server's log has the details")


def invalid(error: ValidationError, *, where: str = "") -> Problem:
    """All wrong fields of a request at once."""
    errors = [
        FieldProblem(pointer=where + _pointer(item["loc"]), detail=item["msg"])
        for item in error.errors(include_url=False)
    ]
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return Problem(422, "invalid", f"{first.pointer or 'the body'}: {first.detail}{more}", errors=errors)


def _pointer(location: Sequence[str | int]) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)
