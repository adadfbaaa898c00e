"""The OpenAI HTTP interface: what clients get is what `generate` gives, and what they do wrong is said in JSON."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
import time
import urllib.request

import aiohttp
import jax
import numpy as np
import openai
import pytest

import atom_jax
from atom_jax.__main__ import main
from atom_jax.inference.engine import Engine
from atom_jax.serving.http import Server, listening
from atom_jax.session.sampling import row_keys
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM
from tests.reliability import rows as examples
from tests.tokenizers.test_chat_template import CHATML

ASK = [{"role": "user", "content": "hi"}]


class Chatty(ByteTokenizer):
    chat_template = CHATML


@pytest.fixture(scope="module")
def lm():
    plain = examples.plain("llama", "plain")
    return LM(dataclasses.replace(plain.config, max_length=220), plain.params, Chatty())


def serving(lm, use, **options):
    """Runs `use(address, engine)` next to a server."""

    async def run(engine):
        async with listening(Server(engine, "tiny"), body=4000, grace=5) as address:
            return await use(address, engine)

    with Engine(lm, **({"rows": 4, "part": 64} | options)) as engine:
        result = asyncio.run(run(engine))
    assert engine.tally.running == 0 and engine.tally.nbytes == engine._beginnings.nbytes
    return result


def seeded(seed):
    return np.asarray(jax.random.key_data(row_keys(jax.random.key(seed), 1)))


def test_the_official_client(lm):
    def use(address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        made = client.completions.create(
            model="tiny", prompt=["abc", "defgh"], max_tokens=9, temperature=0, n=1, logprobs=2
        )
        drawn = client.completions.create(model="tiny", prompt="abc", max_tokens=9, n=2, seed=7)
        streamed = list(client.completions.create(
            model="tiny", prompt="abc", max_tokens=9, seed=7, stream=True, stream_options={"include_usage": True}
        ))  # fmt: skip
        chat = client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=9, temperature=0, logprobs=True, top_logprobs=3
        )
        parts = list(client.chat.completions.create(
            model="tiny", messages=ASK, max_completion_tokens=9, temperature=0, stream=True
        ))  # fmt: skip
        whole = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, stop=["never"])
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="abc")
        with pytest.raises(openai.BadRequestError, match="exceed the 220 tokens"):
            client.completions.create(model="tiny", prompt="a" * 300)
        return made, drawn, streamed, chat, parts, whole

    made, drawn, streamed, chat, parts, whole = serving(lm, lambda address, _: asyncio.to_thread(use, address))
    alone = atom_jax.generate(lm, ["abc", "defgh"], 9)
    assert [choice.text for choice in made.choices] == alone.text
    assert {choice.finish_reason for choice in made.choices} == {"length"}
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (10, 18)
    assert made.usage.cache_entries == pytest.approx(4 + 8 + 6 + 8)
    for choice, ids in zip(made.choices, alone.ids):
        said = choice.logprobs
        assert len(said.tokens) == len(said.token_logprobs) == len(ids) and max(map(len, said.top_logprobs)) <= 2
    both = atom_jax.generate(lm, ["abc"] * 2, 9, 1.0, jax.random.key(7)).text
    assert [choice.text for choice in drawn.choices] == both
    *pieces, last = streamed
    assert "".join(piece.choices[0].text for piece in pieces) == both[0] and last.usage.completion_tokens == 9
    answer = atom_jax.generate(lm, [lm.tokenizer.encode(atom_jax.inference.chat.prompt(lm, ASK)).tolist()], 9)
    assert chat.choices[0].message.content == answer.text[0]
    top = [token.top_logprobs[0] for token in chat.choices[0].logprobs.content]
    assert [bytes(token.bytes) for token in top] == [lm.tokenizer.decode_bytes([i]) for i in answer.ids[0]]
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer.text[0]
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "length"
    assert whole.choices[0].finish_reason == "length" and whole.usage.total_tokens == 220


COMPLETIONS = [
    (b"{", 400, None), (b"[1]", 400, None), (b"\xff\xfe", 400, None), (b"[" * 3000, 400, None),
    (b'{"prompt": "a", "temperature": NaN}', 400, None), (b" " * 5000, 413, None),
    ({}, 400, "missing_required_parameter"), ({"prompt": "a", "model": "gpt"}, 404, "model_not_found"),
    ({"prompt": "a", "model": 3}, 400, "invalid_type"), ({"prompt": {"a": 1}}, 400, "invalid_type"),
    ({"prompt": [1, "a"]}, 400, "invalid_type"), ({"prompt": []}, 400, None), ({"prompt": [9999]}, 400, None),
    ({"prompt": "a", "max_tokens": "9"}, 400, "invalid_type"),
    ({"prompt": "a", "max_tokens": 0}, 400, "invalid_value"),
    ({"prompt": "a", "max_tokens": True}, 400, "invalid_type"), ({"prompt": "a", "top_p": 0}, 400, None),
    ({"prompt": "a", "max_tokens": 400}, 400, "context_length_exceeded"), ({"prompt": "a", "stop": [""]}, 400, None),
    ({"prompt": "a", "temperature": -1}, 400, "invalid_value"), ({"prompt": "a", "n": 1000}, 400, "invalid_value"),
    ({"prompt": "a", "stop_token_ids": ["a"]}, 400, None), ({"prompt": "a", "wat": 1}, 400, "unknown_parameter"),
    ({"prompt": "a", "echo": True}, 400, "unsupported_parameter"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, None),
    ({"prompt": "a", "stream": True, "stream_options": {"include_usage": "yes"}}, 400, "invalid_type"),
    ({"prompt": "a", "stream": True, "stream_options": {"usage": True}}, 400, "unknown_parameter"),
]  # fmt: skip
CHATS = [
    ({"messages": "hi"}, 400, "invalid_type"),
    ({"messages": []}, 400, None),
    ({"messages": [3]}, 400, None),
    ({"messages": [{"role": "cat", "content": "a"}]}, 400, None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "unsupported_content"),
    ({"messages": ASK, "tools": [{"type": "function"}]}, 400, "unsupported_parameter"),
    ({"messages": ASK, "top_logprobs": 2}, 400, None),
]
REFUSED = [("completions", *one) for one in COMPLETIONS] + [("chat/completions", *one) for one in CHATS]
REFUSED += [("nothing", {}, 404, None)]


def test_what_is_wrong_is_said_in_json(lm):
    async def use(address, engine):
        async with aiohttp.ClientSession() as session:
            for path, body, status, code in REFUSED:
                data = body if isinstance(body, bytes) else json.dumps(body)
                async with session.post(f"{address}/v1/{path}", data=data) as answer:
                    error = (await answer.json())["error"]
                    assert (answer.status, error["code"]) == (status, code), (body, error)
                    assert error["message"] and "\n" not in error["message"]
            async with session.get(f"{address}/v1/completions") as answer:
                assert answer.status == 405 and (await answer.json())["error"]["message"]
            async with session.get(f"{address}/v1/models/other") as answer:
                assert answer.status == 404
            async with session.get(f"{address}/v1/chat") as answer:
                assert (
                    "served are /healthz, /metrics, /v1/chat/completions, "
                    in (await answer.json())["error"]["message"]
                )
            async with session.post(f"{address}/v1/completions", json={"prompt": "a", "temprature": 0}) as answer:
                wanted = "unknown field 'temprature' (did you mean temperature?)"
                assert (await answer.json())["error"]["message"] == wanted
            neutral = {"prompt": [40, 41], "echo": False, "frequency_penalty": 0.0, "user": "me", "stop": None}
            parts = {
                "messages": [{"role": "developer", "content": [{"type": "text", "text": "hi"}]}],
                "max_tokens": 2,
            }
            for path, body in (("completions", neutral), ("chat/completions", parts)):
                async with session.post(f"{address}/v1/{path}", json=body) as answer:
                    assert answer.status == 200

    serving(lm, use)


def test_many_at_once_and_clients_that_go(lm):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(97, 122, n).astype(np.uint8).tobytes().decode() for n in rng.integers(1, 100, 12)]
    cold = atom_jax.generate(lm, prompts, 40)
    keys = np.concatenate([seeded(i) for i in range(12)])
    warm = atom_jax.generate(lm, prompts, 40, 1.0, keys)
    expected = {0: cold, 1: warm}

    async def wrong(session, address, i):
        """What can't be read, or is too large, is refused beside all others."""
        body, status = (b'{"prompt": "a"', 400) if i % 2 else (b'{"prompt": "' + 5000 * b"a" + b'"}', 413)
        async with session.post(address, data=body, headers={"Content-Type": "application/json"}) as answer:
            assert answer.status == status and (await answer.json())["error"]["message"]

    async def one(session, address, i):
        if i % 20 == 18 or i % 20 == 7:
            return await wrong(session, address, i)
        which, drawn, most = i % 12, i // 12 % 2, 1 + 7 * i % 40
        body = {
            "prompt": prompts[which],
            "max_tokens": most,
            "temperature": drawn,
            "seed": which,
            "stream": i % 3 == 1,
        }
        if i % 10 == 9:  # goes away, waiting or in the middle
            with contextlib.suppress(asyncio.TimeoutError):
                async with (
                    asyncio.timeout(0.002 * (i % 50)),
                    session.post(address, json=body | {"max_tokens": 90}) as answer,
                ):
                    await answer.content.readany()
            return None
        async with session.post(address, json=body) as answer:
            assert answer.status == 200
            if i % 3 == 1:
                text = ""
                async for line in answer.content:
                    if i % 2:
                        await asyncio.sleep(0.003)  # a slow reader
                    if line.startswith(b"data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
            else:
                text = (await answer.json())["choices"][0]["text"]
        ids = expected[drawn].ids[which][:most]
        assert text == lm.tokenizer.decode(ids), i

    async def use(address, engine):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(one(session, f"{address}/v1/completions", i) for i in range(200)))
            while engine.tally.running or engine.tally.waiting or engine.tally.reading:
                await asyncio.sleep(0.01)
            async with session.get(f"{address}/metrics") as answer:
                lines = (await answer.text()).splitlines()
            async with session.get(f"{address}/healthz") as answer:
                assert answer.status == 200
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        ended = engine.tally.ended
        assert ended["length"] + ended["cancelled"] + ended["stop"] <= 180 and ended["failed"] == 0
        assert ended["length"] + ended["stop"] >= 160
        assert values['atom_jax_requests_total{end="length"}'] == str(ended["length"])
        assert values["atom_jax_requests_running"] == values["atom_jax_cache_bytes"] == "0"

    serving(lm, use, rows=8, beginnings=0)


def test_a_full_queue_and_the_end(lm):
    async def use(address, engine):
        async with aiohttp.ClientSession() as session:
            body = {"prompt": "abc", "max_tokens": 200, "temperature": 0}
            engine._admit = lambda: None  # nobody is begun meanwhile
            waits = asyncio.ensure_future(session.post(f"{address}/v1/completions", json=body))
            while not engine._waiting:
                await asyncio.sleep(0.01)
            async with session.post(f"{address}/v1/completions", json=body) as answer:
                assert answer.status == 429 and answer.headers["Retry-After"]
                assert (await answer.json())["error"]["code"] == "queue_full"
            del engine._admit
            engine.refuse()
            async with session.post(f"{address}/v1/completions", json=body) as answer:
                assert answer.status == 503
            async with await waits as answer:
                assert answer.status == 200 and (await answer.json())["usage"]["completion_tokens"] == 200

    serving(lm, use, rows=1, waiting=1)


def test_the_command_serves_until_it_is_told_to_stop(tmp_path, capsys, lm):
    atom_jax.save_hf(
        LM(dataclasses.replace(lm.config, eos_ids=(257,)), lm.params, ByteTokenizer()), tmp_path / "tiny"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {"lines": []}

    def client():
        address = f"http://127.0.0.1:{port}"
        while "health" not in found:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/healthz", timeout=60) as answer:
                found["health"] = answer.read()
            time.sleep(0.02)
        body = json.dumps({"prompt": "abc", "max_tokens": 200, "temperature": 0, "stream": True}).encode()
        with urllib.request.urlopen(f"{address}/v1/completions", body, timeout=60) as answer:
            found["lines"].append(answer.readline())
            os.kill(os.getpid(), signal.SIGTERM)
            found["lines"] += answer.readlines()

    thread = threading.Thread(target=client)
    thread.start()
    code = main(["atom_jax", "serve", f"--checkpoint={tmp_path / 'tiny'}", f"--port={port}", "--cache_memory=64M"])
    thread.join()
    out, err = capsys.readouterr()
    assert code == 0 and out == "" and f"serving tiny at http://127.0.0.1:{port}/v1" in err
    pieces = [json.loads(line[6:]) for line in found["lines"] if line.startswith(b"data: {")]
    text = "".join(piece["choices"][0]["text"] for piece in pieces)
    assert found["health"] == b"ok\n" and found["lines"][-2] == b"data: [DONE]\n"
    assert text == atom_jax.generate(lm, ["abc"], 200).text[0]


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--port=70000", "--port"), ("--rows=0", "--rows"), ("--cache_memory=much", "--cache_memory=much: expected"),
     ("--memory=tov", "tov"), ("--grace=-1", "--grace")],
)  # fmt: skip
def test_bad_flags_are_one_sentence(flag, message, capsys, tmp_path):
    assert main(["atom_jax", "serve", f"--checkpoint={tmp_path}", flag]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_bodies_and_headers_that_lie(lm, caplog):
    """Refused in JSON of one sentence, without a traceback in the log; and the server goes on."""
    digits = "9" * 400

    async def use(address, _):
        async with aiohttp.ClientSession() as session:
            said = []
            bodies = [
                f'{{"prompt": "a", "{name}": {digits}}}' for name in ("n", "seed", "max_tokens", "min_p", "top_k")
            ]
            for body, headers in [*((b, {}) for b in bodies), ("{}", {"Content-Encoding": "gzip"})]:
                async with session.post(f"{address}/v1/completions", data=body, headers=headers) as response:
                    said.append((response.status, (await response.json())["error"]["message"]))
            host, port = address.removeprefix("http://").split(":")
            for raw in (
                b"GET\r\n\r\n",
                b"\x16\x03\x01" * 50,
                b"A" * 20000,
                b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            ):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(raw)
                await writer.drain()
                await asyncio.wait_for(reader.read(100), 20)
                writer.close()
            async with session.get(f"{address}/healthz") as response:
                return said, response.status

    said, health = serving(lm, use)
    assert health == 200 and all(status == 400 and 0 < len(text) < 300 for status, text in said)
    assert not [record for record in caplog.records if record.exc_info]
