"""An engine behind the OpenAI HTTP interface. The texts are the engine's; here they only travel."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import jax
import numpy as np
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger

from atom_jax.inference import chat as chat_lib
from atom_jax.inference.engine import Busy, Closed, Engine
from atom_jax.inference.request import Piece, Request
from atom_jax.serving import answers, metrics, protocol
from atom_jax.serving.protocol import Asked, Refusal
from atom_jax.session.prompts import token_rows
from atom_jax.session.sampling import row_keys
from atom_jax.typing import AtomError

# Largest body of a request, and seconds that running requests have once the server is to stop.
BODY = 4 * 2**20
GRACE = 30.0

Events = asyncio.Queue[tuple[int, Piece]]


class Server:
    """The handlers. name: what clients call the model."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name = engine, name
        self._created, self._stopping = int(time.time()), False

    def app(self, body: int = BODY) -> web.Application:
        """The application; bodies have at most so many bytes."""
        app = web.Application(client_max_size=body, middlewares=[_refusals])
        app.add_routes([
            web.get("/v1/models", self.models), web.get("/v1/models/{name:.+}", self.model),
            web.post("/v1/completions", functools.partial(self.make, chat=False)),
            web.post("/v1/chat/completions", functools.partial(self.make, chat=True)),
            web.get("/metrics", self.metrics), web.get("/healthz", self.healthz),
        ])  # fmt: skip
        return app

    def refuse(self) -> None:
        """Takes no further requests."""
        self._stopping = True
        self.engine.refuse()

    async def models(self, request: web.Request) -> web.Response:
        """The one model."""
        return web.json_response({"object": "list", "data": [self._described()]})

    async def model(self, request: web.Request) -> web.Response:
        """The model with this name."""
        if (name := request.match_info["name"]) != self.name:
            raise Refusal(404, f"the model {name!r:.100} does not exist", "model", "model_not_found")
        return web.json_response(self._described())

    async def metrics(self, request: web.Request) -> web.Response:
        """For Prometheus."""
        return web.Response(text=metrics.text(self.engine), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def healthz(self, request: web.Request) -> web.Response:
        """Whether requests are taken."""
        return web.Response(text="stopping\n" if self._stopping else "ok\n", status=503 if self._stopping else 200)

    async def make(self, request: web.Request, chat: bool) -> web.StreamResponse:
        """Makes the texts that a chat or a completion asks for; when the client goes, they are given up."""
        asked = protocol.read(protocol.parse(await request.read()), chat, self.name)
        events: Events = asyncio.Queue()
        submitting = asyncio.ensure_future(asyncio.to_thread(self._submit, asked, events, asyncio.get_running_loop()))
        requests: list[Request] = []
        try:
            requests = await asyncio.shield(submitting)
            said = answers.Answers(chat, self.name, self.engine.lm.tokenizer)
            if asked.stream:
                return await self._streamed(request, asked, requests, events, said)
            left = len(requests)
            while left:
                _, piece = await events.get()
                left -= piece.end is not None
                _check(piece, requests)
            return web.json_response(said.whole(requests, asked.n))
        except asyncio.CancelledError:
            submitting.add_done_callback(_give_up)
            raise
        finally:
            for one in requests:
                one.cancel()

    async def _streamed(
        self, request: web.Request, asked: Asked, requests: list[Request], events: Events, said: answers.Answers
    ) -> web.StreamResponse:
        """Sends pieces as they come, as fast as the client takes them."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)

        async def send(data: Any) -> None:
            text = data if isinstance(data, str) else json.dumps(data)
            await response.write(f"data: {text}\n\n".encode())

        # A client that has gone cannot be told anything.
        with contextlib.suppress(ConnectionError):
            if asked.chat:
                for i in range(len(requests)):
                    await send(said.begin(i))
            left = len(requests)
            try:
                while left:
                    i, piece = await events.get()
                    left -= piece.end is not None
                    _check(piece, requests)
                    await send(said.piece(i, piece))
                if asked.usage:
                    await send(said.end(requests, asked.n))
            except Refusal as e:
                await send(e.body)
            await send("[DONE]")
            await response.write_eof()
        return response

    def _submit(self, asked: Asked, events: Events, loop: asyncio.AbstractEventLoop) -> list[Request]:
        """Gives the engine one request for every choice; all or none. Runs in a thread of its own."""
        requests: list[Request] = []
        try:
            for prompt in asked.prompts:
                ids, most = self._ids(asked, prompt)
                keys = np.asarray(jax.random.key_data(row_keys(jax.random.key(asked.seed & (2**63 - 1)), asked.n)))
                for i in range(asked.n):
                    listen = functools.partial(_heard, loop, events, len(requests))
                    key = keys[i : i + 1]
                    requests.append(self.engine.submit(ids, most, key=key, listen=listen, **asked.options))
        except Exception as e:
            for one in requests:
                one.cancel()
            if isinstance(e, Busy):
                raise Refusal(429, str(e), code="queue_full") from None
            if isinstance(e, Closed):
                raise Refusal(503, "the server is being stopped") from None
            if isinstance(e, AtomError):
                raise Refusal(400, str(e)) from None
            raise
        return requests

    def _ids(self, asked: Asked, prompt: Any) -> tuple[list[int], int]:
        """A prompt as ids, and how many tokens are to follow."""
        lm, length = self.engine.lm, self.engine.length
        if asked.chat:
            ids = lm.tokenizer.encode(chat_lib.prompt(lm, prompt)).tolist()
        else:
            ids = token_rows(lm, [prompt], first=True)[0].tolist()
        most = max(length - len(ids), 1) if asked.most is None else asked.most
        if len(ids) + most > length:
            message = f"a prompt of {len(ids)} tokens and {most} to be made exceed the {length} tokens of this model"
            raise Refusal(400, message, asked.about, "context_length_exceeded")
        return ids, most

    def _described(self) -> dict[str, Any]:
        return answers.model(self.name, self._created, self.engine.length)


def _heard(loop: asyncio.AbstractEventLoop, events: Events, i: int, piece: Piece) -> None:
    """Hands a piece from the engine's thread to the one of the server, where there still is one."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(events.put_nowait, (i, piece))


def _give_up(submitting: asyncio.Future[list[Request]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        for one in submitting.result():
            one.cancel()


def _check(piece: Piece, requests: list[Request]) -> None:
    """Refusal where a text ended without being made."""
    if piece.end == "failed":
        raise Refusal(500, next((r.error for r in requests if r.error), "the text could not be made"))
    if piece.end == "cancelled":
        raise Refusal(503, "the server is being stopped")


@web.middleware
async def _refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Whatever is refused is said in JSON."""
    try:
        return await handler(request)
    except Refusal as e:
        refusal = e
    except web.RequestPayloadError as e:
        refusal = Refusal(400, f"the body is not what its headers say: {e}")
    except web.HTTPRequestEntityTooLarge as e:
        refusal = Refusal(
            413, f"the body has more than the {request.client_max_size} bytes that are taken ({e.reason})"
        )
    except web.HTTPException as e:
        if e.status < 400:
            raise
        served = ", ".join(sorted({resource.canonical for resource in request.app.router.resources()}))
        more = f"; served are {served}" if e.status == 404 else ""
        refusal = Refusal(e.status, f"{request.method} {request.path[:100]}: {e.reason}{more}")
    headers = {"Retry-After": "1"} if refusal.status in (429, 503) else {}
    return web.json_response(refusal.body, status=refusal.status, headers=headers)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log is about more than what a client sent, which the client is told."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


@contextlib.asynccontextmanager
async def listening(
    server: Server, host: str = "127.0.0.1", port: int = 0, body: int = BODY, grace: float = GRACE
) -> AsyncIterator[str]:
    """The address of a server that answers until the block ends: then it refuses what is new, gives what runs
    `grace` seconds, and ends it. port: 0: any that is free."""
    server_logger.addFilter(_is_news)
    runner = web.AppRunner(server.app(body), handler_cancellation=True, access_log=None, shutdown_timeout=grace)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield f"http://{host}:{runner.addresses[0][1]}"
    finally:
        server.refuse()
        # It still listens meanwhile, to say that it stops.
        await asyncio.to_thread(server.engine.close, grace)
        await runner.cleanup()


def serve(
    engine: Engine, name: str, host: str, port: int, body: int = BODY, grace: float = GRACE,
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serves until SIGTERM or Ctrl-C, of which a second one ends what still runs. say: told the address.

    Raises AtomError where there is no such address, or another program has it.
    """

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def signalled() -> None:
            if stop.is_set():
                loop.run_in_executor(None, engine.close)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signalled)
        async with listening(Server(engine, name), host, port, body, grace) as address:
            say(address)
            await stop.wait()

    try:
        with _bound(host, port):
            asyncio.run(main())
    finally:
        engine.close()


def check_address(host: str, port: int) -> None:
    """Raises AtomError where there is no such address, or another program has it: before a model is loaded."""
    with _bound(host, port):
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[None]:
    """AtomError for what the system says of an address."""
    try:
        yield
    except (OSError, UnicodeError) as e:
        reason = "no name of a machine" if isinstance(e, UnicodeError) else e.strerror or e
        raise AtomError(f"--host={host} --port={port}: {reason}") from None
