from threading import Event, Thread

import torch
from torch import nn
from transformers import PreTrainedModel

from captioner.model.module import allocate


def global_state() -> tuple[object, ...]:
    return nn.init.kaiming_uniform_, nn.init.normal_, PreTrainedModel.init_weights, torch.get_default_dtype()


def test_two_threads_that_allocate_at_once_leave_torch_as_it_was() -> None:
    second_is_in, first_is_out = Event(), Event()

    def first(width: int) -> nn.Module:
        second_is_in.wait(0.3)  # in vain, where one waits for the other
        return nn.Linear(width, width)

    def second(width: int) -> nn.Module:
        second_is_in.set()
        first_is_out.wait(30)
        return nn.Linear(width, width)

    def make_first() -> None:
        allocate(first, 8, dtype=torch.bfloat16, device=torch.device("cpu"))
        first_is_out.set()

    threads = [
        Thread(target=make_first),
        Thread(target=lambda: allocate(second, 8, dtype=torch.float16, device=torch.device("cpu"))),
    ]
    before = global_state()
    for thread in threads:
        thread.start()
        second_is_in.wait(0.05)
    for thread in threads:
        thread.join(60)
    assert global_state() == before
