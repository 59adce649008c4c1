"""What the server is, whether it answers, and the page's way in."""

from __future__ import annotations

import hmac

from starlette.responses import Response

from fdfo_engine import __version__
from fdfo_engine.serve.access import COOKIE
from fdfo_engine.serve.endpoints import MAX_BODY_BYTES, Call, Endpoint, answer
from fdfo_engine.serve.messages import CapabilitiesBody, Health, Session
from fdfo_engine.serve.problems import Problem
from fdfo_engine.serve.rounds import MAX_PROMPTS


async def healthz(_call: Call) -> Response:
    """The process answers."""
    return answer(Health(status="ok"))


async def readyz(call: Call) -> Response:
    """The engine is loaded."""
    if not call.backend.is_ready:
        raise Problem(503, "starting", "the engine is loading", retry_after_s=2)
    return answer(Health(status="ok"))


async def capabilities(call: Call) -> Response:
    """Read by clients before anything else."""
    config = call.backend.config
    return answer(
        CapabilitiesBody(
            engine=__version__,
            model=config.model.id,
            height=config.model.height,
            width=config.model.width,
            steps=config.sampling.steps,
            guidance_scale=config.sampling.guidance_scale,
            ranks=call.backend.ranks,
            parts=config.update.optimizer_steps,
            loss_fns=["fdfo", "weights"],
            rewards=[reward.name for reward in config.rewards],
            expected_seq=call.backend.queue.expected_seq,
            max_prompts=MAX_PROMPTS,
            max_body_bytes=MAX_BODY_BYTES,
        )
    )


async def session(call: Call) -> Response:
    """The token for a cookie that scripts cannot read."""
    if not hmac.compare_digest(call.body.token.encode(), call.backend.token.encode()):
        raise Problem(401, "token", "the token is another one")
    response = Response(status_code=204)
    response.set_cookie(COOKIE, call.backend.token, httponly=True, samesite="strict", path="/")
    return response


ENDPOINTS = (
    Endpoint("GET", "/healthz", "Whether the process answers.", healthz, {200: Health}, is_open=True),
    Endpoint("GET", "/readyz", "Whether the engine is loaded.", readyz, {200: Health}, problems=(503,), is_open=True),
    Endpoint("GET", "/v1/capabilities", "What this server is.", capabilities, {200: CapabilitiesBody}),
    Endpoint(
        "POST", "/v1/session", "Exchanges the token for a cookie.", session, {204: None}, body=Session, problems=(401,),
        is_open=True,
    ),
)  # fmt: skip
