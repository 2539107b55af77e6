"""Data made of running statistics: properties of ZeroQ and Genie on a real decoder with batch normalisation."""

import copy

import pytest
import torch
from support import autoencoders, tiny
from torch import nn
from torch.nn.functional import conv2d, pad

import attar
from attar.calibration.generator import LATENT, Generator
from attar.calibration.swing import strided, swinging
from attar.calibration.synthesize import statistics_error, statistics_layers, synthesize
from attar.errors import AttarError
from attar.losses.statistics import EPS, statistics_distance

SHAPE = (4, 8, 8)
FEW = {"steps": 3, "input_statistics": None}


class Strided(nn.Module):
    """A classifier's body: two strided convolutions with batch normalisation."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8, momentum=None) for _ in range(2)])
        with torch.no_grad():
            self(0.5 + torch.randn(32, 3, 16, 16) / 2)
        self.eval()

    def forward(self, x):
        x = self.norms[0](self.first(x)).relu()
        return self.norms[1](self.second(x))


@pytest.fixture
def decoder():
    return autoencoders.trained_decoder()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------- the loss


def test_the_distance_is_that_of_the_formula():
    x = torch.randn(6, 5, 3, 4, generator=generator())
    mean, variance = torch.randn(5, generator=generator(1)), torch.rand(5, generator=generator(2))
    sigma = (variance + EPS).sqrt()
    own = x.transpose(0, 1).flatten(1)  # (C, B·H·W)
    expected = ((own.mean(1) - mean) ** 2).sum() + ((own.std(1, correction=0) - sigma) ** 2).sum()
    torch.testing.assert_close(statistics_distance(x, mean, variance), expected, rtol=1e-4, atol=1e-5)
    alone = [statistics_distance(one[None], mean, variance) for one in x]
    torch.testing.assert_close(statistics_distance(x, mean, variance, True), torch.stack(alone).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_of_float32(dtype):
    x = (100 + torch.randn(64, 3, 8, 8, generator=generator())).to(dtype)
    mean, variance = x.float().mean((0, 2, 3)), x.float().var((0, 2, 3), correction=0)
    distance = statistics_distance(x, mean, variance)
    assert distance.dtype == torch.float32 and distance < 1e-6


def test_own_data_are_near_and_noise_is_far(decoder):
    assert statistics_error(decoder, autoencoders.latents()) < 1e-4
    assert statistics_error(decoder, torch.randn(64, *SHAPE, generator=generator())) > 0.5
    with pytest.raises(AttarError, match="no deviation of their own"):
        statistics_distance(torch.zeros(4, 3), torch.zeros(3), torch.ones(3), True)


# ------------------------------------------------------------------------------------------------ synthesis


@pytest.mark.slow(but=["inputs-sample"])
@pytest.mark.parametrize("statistics", ["batch", "sample"])
@pytest.mark.parametrize("by", ["inputs", "generator"])
def test_the_loss_falls_tenfold_in_200_steps(decoder, by, statistics):
    losses = []
    data = attar.synthesize(
        decoder, SHAPE, 16, by=by, statistics=statistics, steps=200, input_statistics=None,
        progress=lambda done, total, loss: losses.append((done, total, loss)),
    )  # fmt: skip
    assert data.shape == (16, *SHAPE) and data.dtype == torch.float32 and not data.requires_grad
    assert [done for done, _, _ in losses] == list(range(1, 201)) and {total for _, total, _ in losses} == {
        200
    }
    assert losses[-1][2] <= losses[0][2] / 10
    assert statistics_error(decoder, data, statistics=statistics) <= losses[0][2] / 10


def test_inputs_have_the_statistics_that_are_asked_for(decoder):
    made = synthesize(decoder, SHAPE, 16, by="generator", steps=3, input_statistics=(0.5, 2.0))
    torch.testing.assert_close(made.mean((0, 2, 3)), torch.full((4,), 0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.std((0, 2, 3), correction=0), torch.full((4,), 2.0), atol=1e-2, rtol=0)
    free, held = (
        synthesize(decoder, SHAPE, 16, steps=100, input_statistics=own) for own in (None, (3.0, 0.2))
    )
    assert (held.mean() - 3).abs() < (free.mean() - 3).abs() - 0.5


@pytest.mark.parametrize("by", ["inputs", "generator"])
def test_the_same_seed_gives_the_same_data_whatever_torch_draws(decoder, by):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = synthesize(decoder, SHAPE, 4, by=by, seed=5, **FEW)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(synthesize(decoder, SHAPE, 4, by=by, seed=5, **FEW), first)
    assert not torch.equal(synthesize(decoder, SHAPE, 4, by=by, seed=6, **FEW), first)


def test_swings_are_drawn_from_the_seed_too():
    first, second = (synthesize(Strided(), (3, 16, 16), 4, swing=1, seed=s, **FEW) for s in (0, 0))
    assert torch.equal(first, second)
    assert not torch.equal(first, synthesize(Strided(), (3, 16, 16), 4, seed=0, **FEW))


def test_batches_are_as_equal_as_they_can_be(decoder):
    sizes = []
    synthesize(
        decoder, SHAPE, 7, batch_size=3, steps=1, run=lambda x: (sizes.append(len(x)), decoder(x)),
        progress=lambda done, total, loss: sizes.append((done, total)),
    )  # fmt: skip
    assert sizes == [3, (1, 3), 2, (2, 3), 2, (3, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types(decoder, dtype):
    seen = []
    decoder.to(dtype).up_blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    losses = []
    data = synthesize(
        decoder, SHAPE, 8, steps=60, input_statistics=None, progress=lambda *p: losses.append(p[2])
    )
    assert set(seen) == {dtype} and losses[-1] < losses[0] / 5
    assert data.dtype == torch.promote_types(dtype, torch.float32)


def test_a_whole_autoencoder_runs_what_it_is_told():
    model = autoencoders.make_autoencoder()
    model.decoder = autoencoders.trained_decoder()
    data = synthesize(model, SHAPE, 4, run=lambda z: model.decode(z), **FEW)
    assert torch.equal(data, synthesize(model.decoder, SHAPE, 4, **FEW))


# -------------------------------------------------------------------------------------------- left as it was


def state_of(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ]
    return (
        copy.deepcopy(model.state_dict()),
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        hooks,
    )


def assert_same_state(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    assert one[1:] == other[1:]


@pytest.mark.parametrize("by", ["inputs", "generator"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(by, error):
    model = Strided()
    model.first.requires_grad_(False)
    model.norms[1].train()  # a mixture, to be found again
    before = state_of(model)
    x = torch.randn(2, 3, 16, 16, generator=generator())
    plain = model.second(model.first(x))

    def fail(done, total, loss):
        if error is not None and done == 2:
            raise error("stop")

    def run():
        synthesize(model, (3, 16, 16), 4, by=by, swing=1, progress=fail, **FEW)

    if error is None:
        run()
    else:
        with pytest.raises(error, match="stop"):
            run()
    assert_same_state(state_of(model), before)
    assert torch.equal(model.second(model.first(x)), plain)


# ------------------------------------------------------------------------------------------------- swinging


def test_a_swing_of_nothing_is_the_plain_convolution():
    model, x = Strided(), torch.randn(2, 3, 16, 16, generator=generator())
    plain = model(x)
    with swinging(model, 0, generator()):
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("shift", [1, 2])
def test_a_swing_moves_what_strided_convolutions_see(shift):
    model, x = Strided(), torch.randn(2, 3, 16, 16, generator=generator())
    assert list(strided(model)) == ["first", "second"]
    padded = pad(x, (shift,) * 4, mode="reflect")
    places = [(i, j) for i in range(2 * shift + 1) for j in range(2 * shift + 1)]
    crops = {place: padded[..., place[0] : place[0] + 16, place[1] : place[1] + 16] for place in places}
    assert torch.equal(crops[shift, shift], x)
    weight, bias = model.first.weight, model.first.bias
    expected = {place: conv2d(crop, weight, bias, 2, 1) for place, crop in crops.items()}
    met = set()
    with swinging(model, shift, generator()):
        for _ in range(200):
            y = model.first(x)
            met |= {place for place, one in expected.items() if torch.equal(one, y)}
    assert met == set(places)


@pytest.mark.parametrize("seed", range(2))
def test_swings_take_the_checkerboard_out_of_the_data(seed):
    """Genie: the share of the energy at the highest frequency, which gradients through strides raise."""

    def share(data):
        energy = torch.fft.fft2(data - data.mean((2, 3), keepdim=True)).abs().square().sum((0, 1))
        return ((energy[8].sum() + energy[:, 8].sum() - energy[8, 8]) / energy.sum()).item()

    plain, swung = (
        share(synthesize(Strided(seed), (3, 16, 16), 16, steps=40, swing=swing, seed=seed))
        for swing in (0, 1)
    )
    white = 31 / 256  # of noise, from which data start
    assert plain > 2 * white and swung < plain / 2


def test_what_cannot_swing_says_so(decoder):
    with pytest.raises(AttarError, match="no convolution has a stride"):
        synthesize(decoder, SHAPE, 4, swing=1, **FEW)
    with pytest.raises(AttarError, match="cannot be moved by 2"):
        synthesize(Strided(), (3, 2, 2), 4, swing=2, **FEW)
    with pytest.raises(AttarError, match="swing by -1"):
        synthesize(Strided(), (3, 16, 16), 4, swing=-1, **FEW)


# ------------------------------------------------------------------------------------------------ generator


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 9), (1, 1, 2)])
def test_a_generator_makes_images_of_any_size(shape):
    network = Generator(shape, generator())
    images = network(torch.randn(6, LATENT, generator=generator()))
    assert images.shape == (6, *shape)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-5, rtol=0)


def test_a_generator_is_as_large_for_many_images_as_for_few(decoder, monkeypatch):
    sizes = {}

    class Counting(torch.optim.Adam):
        def __init__(self, parameters, **options):
            parameters = list(parameters)
            sizes.setdefault(count, []).append(sum(p.numel() for p in parameters))
            super().__init__(parameters, **options)

    monkeypatch.setattr(torch.optim, "Adam", Counting)
    for count in (4, 8):
        synthesize(decoder, SHAPE, count, by="generator", steps=1)
    (few, network), (many, other) = sizes[4], sizes[8]
    assert (few, many) == (4 * LATENT, 8 * LATENT) and network == other


# ------------------------------------------------------------------------------------------------- refusals


def test_models_without_running_statistics_are_refused():
    model = tiny.MODELS["wan"][0]()
    with pytest.raises(AttarError, match=r"no layer keeps running statistics.*WanTransformer3DModel.*traces"):
        synthesize(model, SHAPE, 4)
    norm = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(AttarError, match="no layer keeps running statistics"):
        synthesize(norm, (3, 8, 8), 4)


def test_statistics_of_no_data_are_refused():
    model = autoencoders.make_autoencoder()
    with pytest.raises(AttarError, match=r"initial values.*up_blocks\.0"):
        synthesize(model.decoder, SHAPE, 4, run=model.decoder)
    decoder = autoencoders.trained_decoder()
    next(iter(statistics_layers(decoder).values())).running_var[1] = torch.inf
    with pytest.raises(AttarError, match="not finite"):
        synthesize(decoder, SHAPE, 4)


def test_layers_that_are_not_reached_are_refused(decoder):
    with pytest.raises(AttarError, match="2 normalisation layers are not reached"):
        synthesize(decoder, SHAPE, 4, run=lambda z: decoder.conv_in(z))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "magic"}, "unknown by 'magic'"),
        ({"statistics": "channel"}, "unknown statistics"),
        ({"count": 0}, "cannot synthesise 0"),
        ({"steps": 0}, "with 0 steps"),
        ({"shape": (4, 0, 8)}, "of shape"),
        ({"by": "generator", "shape": (4, 8)}, "makes images"),
        ({"by": "generator", "count": 1}, "normalises over a batch"),
    ],
)
def test_what_cannot_be_made_is_refused(decoder, options, message):
    with pytest.raises(AttarError, match=message):
        synthesize(decoder, **{"shape": SHAPE, "count": 4, **options})
