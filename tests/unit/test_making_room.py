"""Who gives up its place to a stage that has lost all of its workers."""

import pytest

from captioner.making_room import Placed, who_yields
from captioner.restarts import Start

_NODES = {"here", "there"}


def model(actor: str, *, is_alive: bool = True) -> Placed:
    return Placed(actor=actor, stage="model", is_alive=is_alive, start=Start(process="1", node="here"))


def decoder(actor: str = "d", *, is_alive: bool = False, node: str | None = "gone") -> Placed:
    start = Start(process="2", node=node) if node else None
    return Placed(actor=actor, stage="decoder", is_alive=is_alive, start=start)


def test_one_of_two_model_workers_makes_room_for_the_only_decoder() -> None:
    yielding = who_yields([model("a"), model("b"), decoder()], _NODES)
    assert yielding is not None
    assert yielding.actor == "b"


@pytest.mark.parametrize(
    "workers",
    [
        [model("a"), model("b"), decoder(), decoder("e", is_alive=True)],  # the other decoder works
        [model("a"), model("b"), decoder(node="there")],  # it has found a place and is loading
        [model("a"), model("b"), decoder(node=None)],  # the job begins
        [model("a"), model("b", is_alive=False), decoder()],  # one model worker is left
        [model("a"), model("b"), decoder(node="here", is_alive=True)],
        [decoder()],
        [],
    ],
)
def test_nobody_yields_where_that_helps_no_one(workers: list[Placed]) -> None:
    assert who_yields(workers, _NODES) is None


def test_who_has_yielded_is_not_given_its_place_back() -> None:
    ended = Placed(actor="b", stage="model", is_alive=False, start=Start(process="1", node="here"))
    assert who_yields([model("a"), ended, decoder(is_alive=True, node="here")], _NODES) is None
