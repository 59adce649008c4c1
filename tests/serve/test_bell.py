"""The bell that wakes who waits for an operation."""

import asyncio
import threading

from fdfo_engine.serve.backend import Bell


def test_it_wakes_those_of_every_event_loop():
    """An application may be run in a second loop beside the first: by a test client, by another server."""
    bell, is_over, both_wait = Bell(), threading.Event(), threading.Barrier(3)
    answers = []

    def look():
        return "over" if is_over.is_set() else None

    async def waiting():
        answer = asyncio.create_task(bell.until(look, 60))
        await asyncio.sleep(0.2)  # it has looked, and waits
        await asyncio.to_thread(both_wait.wait)
        answers.append(await answer)

    threads = [threading.Thread(target=lambda: asyncio.run(waiting()), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    both_wait.wait()
    is_over.set()
    bell.ring()
    for thread in threads:
        thread.join(20)
    assert answers == ["over", "over"]
