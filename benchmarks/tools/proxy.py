"""The baseline: a bare aiohttp proxy on uvloop that forwards one request to one engine and its answer back. No authentication, no metering.

python -m benchmarks.tools.proxy PORT ENGINE_URL
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import uvloop
from aiohttp import ClientSession, TCPConnector, web

_ENGINE = web.AppKey("engine", str)
_SESSION = web.AppKey("session", ClientSession)


async def forward(request: web.Request) -> web.StreamResponse:
    """One request."""
    body = await request.read()
    headers = {"Content-Type": "application/json"}
    async with request.app[_SESSION].post(request.app[_ENGINE] + request.path, data=body, headers=headers) as answer:
        if answer.content_type != "text/event-stream":
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


async def _session(app: web.Application) -> AsyncIterator[None]:
    async with ClientSession(connector=TCPConnector(limit=0)) as session:
        app[_SESSION] = session
        yield


async def _serve(port: int, engine: str) -> None:
    app = web.Application()
    app[_ENGINE] = engine
    app.cleanup_ctx.append(_session)
    app.router.add_post("/v1/chat/completions", forward)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2]))
