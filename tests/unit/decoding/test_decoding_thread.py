"""One engine serves many threads, and all of them get its error when it stops."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from captioner.config import DecodingConfig
from captioner.decoding import EngineThread, Request
from captioner.errors import EngineError, ShapeError
from tests.unit.decoding.decoding_models import captions, engine_of, random_prefixes, tiny_llama, token_ids

GREEDY = DecodingConfig(max_new_tokens=12)


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def engine(llama):
    return engine_of(llama, GREEDY)


def requests_of(llama, number, seed):
    return [Request(i, image) for i, image in enumerate(random_prefixes(llama, number, 1, seed=seed))]


def close_from_outside(thread):
    """Return when new calls are refused, while the engine's thread is still at its step."""
    threading.Thread(target=thread.close).start()
    with suppress(EngineError):
        while True:
            thread.submit([])


def test_calls_of_many_threads_each_get_their_own_captions_in_order(llama, engine):
    thread = EngineThread(engine)
    calls = [requests_of(llama, 5 + seed % 7, seed) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(thread.run, calls))
    thread.close()
    for call, generations in zip(calls, results, strict=True):
        assert [generation.id for generation in generations] == [request.id for request in call]
        assert token_ids(generations) == token_ids(captions(llama, [request.prefix for request in call], GREEDY))


def test_calls_of_two_threads_share_one_step(llama, engine):
    seen = []
    begin_step, may_begin = engine.begin_step, threading.Event()

    def begin():
        may_begin.wait(60)
        seen.append(engine.num_busy)
        begin_step()

    engine.begin_step = begin
    thread = EngineThread(engine)
    first = thread.submit(requests_of(llama, 1, 0))
    with ThreadPoolExecutor(2) as pool:
        calls = list(pool.map(lambda seed: thread.submit(requests_of(llama, 3, seed)), (1, 2)))
    may_begin.set()
    assert len([future.result(timeout=60) for futures in (first, *calls) for future in futures]) == 7
    thread.close()
    assert max(seen) >= 6


def test_captions_are_built_while_the_device_runs_the_next_step(llama, engine):
    events = []
    begin_step, end_step = engine.begin_step, engine.end_step

    def built(complete):
        for generation in complete:
            events.append("caption")
            yield generation

    engine.begin_step = lambda: events.append("begin") or begin_step()
    engine.end_step = lambda: events.append("end") or built(end_step())
    images = random_prefixes(llama, 3, 1)
    thread = EngineThread(engine)
    done = thread.run([Request(i, image, max_new_tokens=1 + i) for i, image in enumerate(images)])
    thread.close()
    assert [len(generation.best.token_ids) for generation in done] == [1, 2, 3]
    assert events == ["begin", "end", "begin", "caption", "end", "begin", "caption", "end", "caption"]


@pytest.mark.parametrize("fault", [RuntimeError("a broken weight"), None], ids=["a failing step", "close"])
def test_complete_captions_are_delivered_before_the_engine_stops(llama, engine, fault):
    steps = 0
    begin_step, end_step = engine.begin_step, engine.end_step

    def begin():
        nonlocal steps
        steps += 1
        if steps == 2 and fault:
            raise fault
        begin_step()

    def end():
        complete = end_step()
        if not fault:
            close_from_outside(thread)
        return complete

    engine.begin_step, engine.end_step = begin, end
    thread = EngineThread(engine)
    images = random_prefixes(llama, 4, 1)
    futures = thread.submit([Request(i, image, max_new_tokens=1 + 5 * (i % 2)) for i, image in enumerate(images)])
    errors = [future.exception(timeout=60) for future in futures]
    assert [error is None for error in errors] == [True, False, True, False]
    thread.close()


def test_no_more_slots_are_busy_than_there_are(llama):
    engine = engine_of(llama, GREEDY, slots=4)
    begin_step, seen = engine.begin_step, []
    engine.begin_step = lambda: begin_step() or seen.append(thread.num_busy)
    thread = EngineThread(engine)
    thread.run(requests_of(llama, 20, 1))
    assert max(seen) == 4
    assert thread.num_busy == 0
    thread.close()


def test_a_failing_engine_fails_waiting_and_later_calls_with_its_cause(llama, engine):
    calls = 0
    begin_step = engine.begin_step

    def fail_at_third():
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("a broken weight")
        begin_step()

    engine.begin_step = fail_at_third
    thread = EngineThread(engine)
    futures = thread.submit(requests_of(llama, 30, 1))
    for future in futures:
        error = future.exception(timeout=60)
        if error is not None:
            assert isinstance(error, EngineError)
            assert isinstance(error.__cause__, ValueError)
    assert futures[-1].exception(timeout=60) is not None
    with pytest.raises(EngineError, match="a broken weight") as raised:
        thread.run(requests_of(llama, 1, 1))
    assert isinstance(raised.value.__cause__, ValueError)
    thread.close()


def test_a_call_waits_while_twice_as_many_images_as_slots_wait(llama, engine):
    begin_step, has_begun, may_go_on = engine.begin_step, threading.Event(), threading.Event()

    def begin():
        has_begun.set()
        may_go_on.wait(60)
        begin_step()

    engine.begin_step = begin
    thread = EngineThread(engine)
    thread.submit(requests_of(llama, 1, 0))
    has_begun.wait(60)
    thread.submit(requests_of(llama, 2 * engine.num_slots, 1))
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(thread.submit, requests_of(llama, 3, 2))
        with pytest.raises(TimeoutError):
            late.result(timeout=0.2)
        may_go_on.set()
    assert len([future.result(timeout=60) for future in late.result()]) == 3
    thread.close()


def test_closing_ends_a_call_that_waits_for_room(llama, engine):
    thread = EngineThread(engine)
    errors = []

    def call():
        try:
            for seed in range(100):
                thread.submit(requests_of(llama, 2 * engine.num_slots, seed))
        except EngineError as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    time.sleep(0.05)
    thread.close()
    caller.join(60)
    assert "closed" in str(errors[0])


def test_closing_fails_calls_that_wait(llama, engine):
    thread = EngineThread(engine)
    futures = thread.submit(requests_of(llama, 200, 1))
    thread.close()
    assert isinstance(futures[-1].exception(timeout=60), EngineError)
    with pytest.raises(EngineError, match="closed"):
        thread.run(requests_of(llama, 1, 1))


def test_a_prefix_of_another_length_fails_its_own_call_only(llama, engine):
    thread = EngineThread(engine)
    with pytest.raises(ShapeError, match=r"float\[2, 64\].*float\[1 to 1, 64\]"):
        thread.run([Request("wide", random_prefixes(llama, 1, 2)[0])])
    assert len(thread.run(requests_of(llama, 3, 1))) == 3
    thread.close()


def test_an_idle_engine_takes_no_processor_time(llama, engine):
    torch.set_num_threads(1)
    thread = EngineThread(engine)
    thread.run(requests_of(llama, 3, 1))
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15
    thread.close()


def test_no_requests_are_no_captions(engine):
    thread = EngineThread(engine)
    assert thread.run([]) == []
    thread.close()
