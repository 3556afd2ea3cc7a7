"""Noise that is more than noise: keyed, in training only, and told apart from the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from sdprep.errors import RecipeError
from sdtrain.loader import load
from sdtrain.losses.mse import mse
from sdtrain.noise import noise_for
from sdtrain.noise_options import NoiseSection
from sdtrain.probe_sets import find_probes
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from sdtrain.step import denoising_loss
from tests.tiny import load_tiny, tiny_batch

SHAPE = (4, 8, 12)
KEY = (3, "ünï code", 2)
KINDS = {
    "offset": NoiseSection(offset=0.5),
    "pyramid": NoiseSection(multires_iterations=6, multires_discount=0.8),
    "perturbation": NoiseSection(input_perturbation=0.1),
}


def plain() -> torch.Tensor:
    return noise_for(KEY[0], "noise", KEY[1], KEY[2], SHAPE)


def test_without_options_the_noise_is_what_it_was() -> None:
    noise, extra = NoiseSection().draw(KEY, SHAPE)
    assert torch.equal(noise, plain())
    assert extra is None
    assert NoiseSection().is_plain


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_keyed_by_sample_and_visit_alone(name: str) -> None:
    state = torch.get_rng_state()
    kind = KINDS[name]
    drawn = [torch.stack([p for p in kind.draw(KEY, SHAPE) if p is not None]) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0].dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert not kind.is_plain
    for other in ((4, *KEY[1:]), (3, "another", 2), (*KEY[:2], 3)):
        again = [part for part in kind.draw(other, SHAPE) if part is not None]
        assert not any(torch.equal(a, b) for a, b in zip(drawn[0], again, strict=True))


def test_the_offset_shifts_each_channel_as_a_whole() -> None:
    shift = KINDS["offset"].draw(KEY, SHAPE)[0] - plain()
    assert float(shift.std((1, 2)).max()) < 1e-6
    assert len(set(shift[:, 0, 0].tolist())) == 4
    many = torch.stack(
        [
            KINDS["offset"].draw((0, str(i), 0), (4, 1, 1))[0]
            - noise_for(0, "noise", str(i), 0, (4, 1, 1))
            for i in range(400)
        ]
    )
    assert float(many.std()) == pytest.approx(0.5, rel=0.06)


def test_the_pyramid_has_deviation_one_and_neighbours_that_agree() -> None:
    noise, extra = KINDS["pyramid"].draw(KEY, (4, 32, 32))
    assert extra is None
    assert float(noise.std()) == pytest.approx(1, abs=1e-5)
    product = noise[:, :, 1:] * noise[:, :, :-1]
    base = noise_for(3, "noise", KEY[1], 2, (4, 32, 32))
    assert float(product.mean()) > 0.3 > float((base[:, :, 1:] * base[:, :, :-1]).mean())
    faint = NoiseSection(multires_iterations=1, multires_discount=0.01).draw(KEY, SHAPE)[0]
    torch.testing.assert_close(faint, plain() / plain().std(), rtol=0, atol=0.05)
    tiny = KINDS["pyramid"].draw(KEY, (4, 1, 1))[0]
    assert bool(torch.isfinite(tiny).all())


def test_the_target_is_the_shifted_noise_and_perturbation_is_in_the_input_alone(
    tiny_model: Callable[[str], Path],
) -> None:
    family = load_tiny(tiny_model("sd15"))
    batch = tiny_batch(family, 2)
    extra = torch.full_like(batch.noise, 0.3)
    latents = family.encode_images(batch.pixels)
    alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in family.alpha_sigma(batch.u))
    states = family.encode_prompts(batch.prompts)

    def by_hand(input_noise: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        noisy = alpha * latents + sigma * input_noise
        return mse(family.predict(noisy, batch.u, states, batch.micro), target)

    with torch.no_grad():
        shifted = denoising_loss(family, replace(batch, noise=batch.noise + extra), mse)
        perturbed = denoising_loss(family, replace(batch, input_noise=extra), mse)
        more = batch.noise + extra
        torch.testing.assert_close(shifted, by_hand(more, more))
        torch.testing.assert_close(perturbed, by_hand(more, batch.noise))
        assert not torch.equal(shifted, perturbed)


@pytest.mark.parametrize("options", ["noise.offset=0.1", "noise.input_perturbation=0.1"])
def test_training_gets_it_whatever_the_workers_and_evaluation_does_not(
    train_recipe: Callable[..., Path], options: str
) -> None:
    path = train_recipe()
    probes = ["validation.images=2", "validation.timesteps_per_image=1"]
    ordinary = open_setup(load_train_recipe(path, probes))
    setup = open_setup(load_train_recipe(path, [*probes, options]))
    micro = [m for m, _ in zip(setup.micro_batches(), range(2), strict=False)]
    here = [batch for _, batch in load(setup.reader(), micro, workers=0)]
    there = [batch for _, batch in load(setup.reader(), micro, workers=1)]
    usual = [batch for _, batch in load(ordinary.reader(), micro, workers=0)]
    for one, two, old in zip(here, there, usual, strict=True):
        assert torch.equal(one.noise, two.noise)
        if "offset" in options:
            assert one.input_noise is None
            assert not torch.equal(one.noise, old.noise)
        else:
            assert torch.equal(one.noise, old.noise)
            assert one.input_noise is not None
            assert torch.equal(one.input_noise, two.input_noise)
    means = [find_probes(each, Path("none"))[0].evaluate().mean for each in (ordinary, setup)]
    assert means[0] == means[1]
    assert "noise" not in ordinary.conditions()
    assert "noise" in setup.conditions()


def test_options_that_exclude_each_other_are_refused(train_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="offset and input_perturbation exclude each other"):
        load_train_recipe(train_recipe(), ["noise.offset=0.1", "noise.input_perturbation=0.1"])
    with pytest.raises(ValidationError, match="needs multires_iterations"):
        NoiseSection(multires_discount=0.5)
    with pytest.raises(ValidationError):
        NoiseSection(offset=float("nan"))
    assert NoiseSection.model_validate(NoiseSection().model_dump()).is_plain  # as a checkpoint says
