"""Events that wait for the next forward pass: each loop gets its own together, in order."""

import asyncio

from tiered.serve.outbox import Outbox


def test_events_wait_and_then_come_in_order():
    outbox, got = Outbox(), {"a": [], "b": []}

    async def program():
        loop = asyncio.get_running_loop()
        receivers = {name: outbox.to(events.append, loop) for name, events in got.items()}
        for event in range(3):
            for receive in receivers.values():
                receive(event)
        await asyncio.sleep(0)
        assert got == {"a": [], "b": []}
        outbox.send()
        outbox.send()  # nothing twice
        for receive in receivers.values():
            receive(3)
        outbox.send()
        while 3 not in got["b"]:
            await asyncio.sleep(0)

    asyncio.run(program())
    assert got == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}


def test_a_loop_that_has_ended_takes_nothing_from_others():
    outbox, got = Outbox(), []
    ended = asyncio.new_event_loop()
    ended.close()
    outbox.to(got.append, ended)("nobody waits")

    async def program():
        outbox.to(got.append, asyncio.get_running_loop())("somebody does")
        outbox.send()
        while not got:
            await asyncio.sleep(0)

    asyncio.run(program())
    assert got == ["somebody does"]
