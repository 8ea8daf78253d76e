import torch

from attnctrl.guidance import add_to_all, guidance_delta


def test_any_affine_cfg_yields_the_formula():
    torch.manual_seed(0)
    uncond, cond, weak = torch.randn(3, 2, 4, 3, 3).unbind(0)
    delta = guidance_delta(cond, weak, 1.7)
    both = add_to_all(torch.cat([uncond, cond]), delta)
    for g in (0.0, 1.0, 4.5):
        u, c = both.chunk(2)
        torch.testing.assert_close(u + g * (c - u), uncond + g * (cond - uncond) + 1.7 * (cond - weak))


def test_extra_channels_stay():
    prediction, delta = torch.zeros(2, 6, 2, 2), torch.ones(1, 4, 2, 2)
    out = add_to_all(prediction, delta)
    assert (out[:, :4] == 1).all() and (out[:, 4:] == 0).all() and (prediction == 0).all()


def test_packed_tokens():
    out = add_to_all(torch.zeros(4, 9, 8), torch.ones(2, 9, 8))
    assert (out == 1).all()
