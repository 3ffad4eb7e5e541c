"""Random numbers depend on their key alone."""

import torch

from hrmtext.runtime.rng import keyed_seed, numpy_generator, torch_generator


def test_each_part_of_the_key_matters_and_its_type_too():
    keys = [(0,), (1,), (0, "a"), (0, "a", 1), (0, "a", "1"), (0, "a1"), (0, 1, "a")]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)


def test_the_seed_is_the_same_in_every_process_and_version():
    assert keyed_seed(0, "init", "lm_head.weight") == 4926531573083978071


def test_draws_do_not_depend_on_other_draws():
    first = torch.rand(3, generator=torch_generator(5, "x"))
    torch.rand(100, generator=torch_generator(5, "y"))
    assert torch.equal(first, torch.rand(3, generator=torch_generator(5, "x")))
    assert (numpy_generator(5, "x").random(3) == numpy_generator(5, "x").random(3)).all()
