"""Models of the page in workers of their own: which one makes room, and what becomes of its answers and its pool."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from scripted_pool import TOKENIZER, scripted, served  # noqa: E402

from llm.errors import UserError  # noqa: E402
from llm.inference.sampling import SamplingParams  # noqa: E402
from llm.serving import http, remote  # noqa: E402
from llm.serving.chat import ChatModel  # noqa: E402
from llm.serving.errors import ApiError  # noqa: E402
from llm.serving.models import MadeRoom  # noqa: E402
from llm.serving.pool import Pool, Source  # noqa: E402
from llm.serving.remote import RemoteEngine, RemoteModels  # noqa: E402

CFG = SimpleNamespace(workers=1, api=SimpleNamespace(rows=2, queue=1, timeout=60))


@pytest.mark.parametrize("key", ["", "  ", "secret ", "secret\n", "sécret", "se\x00cret"])
def test_a_key_that_is_blank_or_cannot_be_sent_is_refused_before_the_start(key):
    cfg = SimpleNamespace(public_names=[], ui="api", host="127.0.0.1", api=SimpleNamespace(access_key=key, origins=[]))
    with pytest.raises(UserError, match="^api.access_key"):
        http.serve(cfg, "a/b", None)
    with pytest.raises(UserError, match="^api.access_key"):
        served(scripted(), key=key)


def page(monkeypatch, loads=None) -> tuple[RemoteModels, list[str]]:
    """Models a/b (the server's own) to a/f over scripted workers, and the names of those that were ended, in order.

    loads: called with the name of a model before it is there.
    """
    ended, loop = [], asyncio.get_running_loop()

    def model(name: str) -> ChatModel:
        return ChatModel(RemoteEngine(scripted(), TOKENIZER, loop, 60), name, "", (), ())

    async def start(name: str) -> ChatModel:
        if loads is not None:
            await loads(name)
        return model(name)

    async def stop(one: ChatModel) -> None:
        await one.engine.pool.retire()
        ended.append(one.name)

    monkeypatch.setattr(remote, "find_stage", lambda root, run, stage: f"{run}/{stage}")
    models = RemoteModels(model("a/b"), None, start, stop, 4)
    models.names = lambda: ["a/b", "a/c", "a/d", "a/e", "a/f"]
    return models, ended


def test_the_model_that_answers_nobody_makes_room(monkeypatch):
    async def run():
        models, ended = page(monkeypatch)
        busy = await asyncio.to_thread(models.get, "a/c")
        busy.engine.pool.submit([[1]], {})
        for name in ("a/d", "a/b", "a/e"):
            await asyncio.to_thread(models.get, name)
        async with asyncio.timeout(10):
            while not ended:
                await asyncio.sleep(0.01)
        return ended, await asyncio.to_thread(models.get, "a/c") is busy

    ended, is_there = asyncio.run(run())
    assert ended == ["a/d"] and is_there


def test_nobody_waits_for_the_model_that_another_has_chosen(monkeypatch):
    async def run():
        begun, may_end = [], asyncio.Event()

        async def loads(name):
            begun.append(name)
            if name == "a/c":
                await may_end.wait()

        models, _ = page(monkeypatch, loads)
        slow = [asyncio.create_task(asyncio.to_thread(models.get, "a/c")) for _ in range(2)]
        async with asyncio.timeout(60):
            while not begun:
                await asyncio.sleep(0.01)
            others = [await asyncio.to_thread(models.get, name) for name in ("a/b", "a/d")]
            assert not any(one.done() for one in slow)
            may_end.set()
            first, second = await asyncio.gather(*slow)
        return begun, [one.name for one in others], first is second

    assert asyncio.run(run()) == (["a/c", "a/d"], ["a/b", "a/d"], True)


def test_a_model_that_is_gone_says_so_and_comes_again(monkeypatch):
    async def run():
        models, _ = page(monkeypatch)
        old = await asyncio.to_thread(models.get, "a/c")
        for name in ("a/d", "a/e"):
            await asyncio.to_thread(models.get, name)
        async with asyncio.timeout(60):
            while not old.engine.pool.is_draining:
                await asyncio.sleep(0.01)
        with pytest.raises(MadeRoom, match="made room for another"):
            await asyncio.to_thread(lambda: list(old.engine.stream([[1]], SamplingParams())))
        return await asyncio.to_thread(models.get, "a/c") is old

    assert asyncio.run(run()) is False


def test_answers_under_way_end_before_their_worker(monkeypatch):
    async def run():
        models, ended = page(monkeypatch)
        jobs = {}
        for name in ("a/c", "a/d"):
            pool = (await asyncio.to_thread(models.get, name)).engine.pool
            jobs[name] = pool, pool.submit([[1]], {})
        await asyncio.to_thread(models.get, "a/e")
        await asyncio.sleep(0.1)
        assert not ended
        with pytest.raises(ApiError, match="made room for another"):
            jobs["a/c"][0].submit([[1]], {})
        pool, batch = jobs["a/c"]
        pool.workers[0].writer.answer(batch.jobs[0].number, [*b"ok"])
        async with asyncio.timeout(10):
            await batch.until_done()
            while not ended:
                await asyncio.sleep(0.01)
        return ended, batch.jobs[0].ids

    assert asyncio.run(run()) == (["a/c"], [*b"ok"])


def test_a_pool_leaves_the_list_when_its_model_does(monkeypatch):
    async def ready(pool):
        pool.facts = {"name": "a/b", "summary": "", "notes": (), "examples": (), "seq_len": 64}

    async def run():
        pools = http.Pools(CFG, Source("a/b"))
        await pools.start("a/b")
        other = await pools.start("a/c")
        assert len(pools.all) == 2
        await pools.stop(other)
        monkeypatch.setattr(http, "load_tokenizer", refuse)
        with pytest.raises(UserError, match="no tokenizer"):
            await pools.start("a/d")
        return [pool.source.model for pool in pools.all]

    def refuse(model):
        raise UserError("no tokenizer")

    monkeypatch.setattr(Pool, "start", ready)
    monkeypatch.setattr(http, "load_tokenizer", lambda model: TOKENIZER)
    assert asyncio.run(run()) == ["a/b"]
