"""Event streams, without a server: what is written, and when."""

import asyncio

from tiered.serve import sse


class Client:
    """Takes what is sent, and stays until it is told to go."""

    def __init__(self):
        self.sent, self.leaves = [], asyncio.Event()

    async def send(self, message):
        self.sent.append(message)

    async def receive(self):
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    @property
    def bodies(self):
        return [message["body"] for message in self.sent if "body" in message]


def test_a_comment_shows_a_quiet_stream_to_be_alive(monkeypatch):
    monkeypatch.setattr(sse, "QUIET_SECONDS", 0.001)

    async def run():
        client = Client()

        async def events():
            yield b"first"
            while sse.COMMENT not in client.bodies:
                await asyncio.sleep(0)
            yield b"second"

        await sse.EventStream(events())({}, client.receive, client.send)
        return client

    client = asyncio.run(run())
    assert client.sent[0]["type"] == "http.response.start"
    assert [body for body in client.bodies if body != sse.COMMENT] == [b"first", b"second", b""]
    assert client.bodies.index(sse.COMMENT) < client.bodies.index(b"second")
    assert [message.get("more_body") for message in client.sent[1:]][-1] is False


def test_events_are_closed_when_the_client_goes():
    closed = []

    async def run():
        client = Client()

        async def events():
            try:
                yield b"first"
                client.leaves.set()
                await asyncio.Event().wait()
            finally:
                closed.append(True)

        await sse.EventStream(events())({}, client.receive, client.send)
        return client

    client = asyncio.run(run())
    assert closed == [True]
    assert client.bodies == [b"first"]
