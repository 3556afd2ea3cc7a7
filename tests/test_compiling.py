"""Compiled blocks: the same numbers and names at any size of picture; what is missing is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdprep.errors import RecipeError, UserError
from sdprep.plugins import config_for
from sdtrain import trainer
from sdtrain.compiling import CompileSection, blocks, compile_blocks, require_compiler
from sdtrain.conditions import changes
from sdtrain.freezing import Rule, build_plan
from sdtrain.losses.mse import mse
from sdtrain.recipe import load_train_recipe
from sdtrain.run import Run
from sdtrain.run_folder import RunFolder
from sdtrain.setup import open_setup
from sdtrain.step import denoising_loss
from tests.tiny import load_tiny, tiny_batch

torch.set_num_threads(1)

Recipe = Callable[..., Path]


def begun(path: Path, *overrides: str) -> Run:
    recipe = load_train_recipe(path, overrides)
    return Run(open_setup(recipe), RunFolder(recipe.output))


def gradients(family: Any, adapter: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch, with the adapter's outer matrices away from zero."""
    plan = build_plan(family, [Rule("unet.**", lr=1e-3)], config_for("adapter", adapter)().build())
    compile_blocks(family, SECTIONS[family])
    for path, parameter in plan.trained().items():
        if path.endswith("lora_B.weight"):
            torch.nn.init.constant_(parameter, 0.01)
    loss = denoising_loss(family, tiny_batch(family, 2), mse).mean()
    loss.backward()
    return float(loss.detach()), {
        path: p.grad for path, p in plan.trained().items() if p.grad is not None
    }


SECTIONS: dict[Any, CompileSection] = {}


@pytest.mark.parametrize(("backend", "adapter"), [("aot_eager", "full"), ("eager", "lora")])
@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients_under_the_same_names(
    tiny_model: Callable[[str], Path], backend: Any, adapter: str
) -> None:
    torch._dynamo.reset()
    plain, fast = load_tiny(tiny_model("sd15")), load_tiny(tiny_model("sd15"))
    SECTIONS[plain] = CompileSection()
    SECTIONS[fast] = CompileSection(mode="blocks", backend=backend)
    torch._dynamo.utils.counters.clear()
    (loss, found), (other, expected) = gradients(fast, adapter), gradients(plain, adapter)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it was compiled at all
    compiled = blocks(fast.parts["unet"])
    kinds = {type(block).__name__ for block in compiled}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert all(block._compiled_call_impl is not None for block in compiled)
    assert all(block._compiled_call_impl is None for block in blocks(plain.parts["unet"]))
    assert loss == pytest.approx(other, rel=1e-5)
    assert list(found) == list(expected)
    assert len(found) > 20
    for path, gradient in found.items():
        torch.testing.assert_close(gradient, expected[path], rtol=1e-5, atol=1e-6)


def test_a_second_size_of_picture_and_no_gradient_are_fine(
    tiny_model: Callable[[str], Path],
) -> None:
    torch._dynamo.reset()
    family, plain = load_tiny(tiny_model("sd15")), load_tiny(tiny_model("sd15"))
    assert compile_blocks(family, CompileSection()) == 0
    count = compile_blocks(family, CompileSection(mode="blocks", backend="eager"))
    assert count == len(blocks(family.parts["unet"])) > 5
    for height, width in ((32, 32), (48, 32)):
        batch = tiny_batch(family, 2, height=height, width=width)
        with torch.no_grad():
            found = denoising_loss(family, batch, mse)
            expected = denoising_loss(plain, batch, mse)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    names = [name for name, _ in family.named_parameters()]
    assert names == [name for name, _ in plain.named_parameters()]


def test_checkpointing_covers_text_encoders_and_changes_no_number(train_recipe: Recipe) -> None:
    rules = 'train.rules=[{ match = "**", lr = 1e-4 }]'
    runs = {
        kind: begun(train_recipe("sdxl"), rules, f"model.gradient_checkpointing={kind}")
        for kind in ("false", "true")
    }
    encoders = ("text_encoder", "text_encoder_2")
    parts = runs["true"].setup.family.parts
    counted = dict.fromkeys(encoders, 0)
    for name in encoders:
        for layer in parts[name].modules():
            if type(layer).__name__ == "CLIPMLP":
                layer.register_forward_pre_hook(
                    lambda *_, name=name: counted.update({name: counted[name] + 1})
                )
    lines = {kind: trainer.take_step(run, next(trainer.steps(run))) for kind, run in runs.items()}
    assert lines["true"]["loss"] == pytest.approx(lines["false"]["loss"], rel=1e-6)
    assert lines["true"]["grad_norm"] == pytest.approx(lines["false"]["grad_norm"], rel=1e-5)
    forwards = len(list(next(trainer.steps(runs["false"]))))  # one for each micro-batch
    for name in encoders:
        layers = sum(type(m).__name__ == "CLIPMLP" for m in parts[name].modules())
        assert counted[name] > forwards * layers, "activations were not computed again"


def test_a_missing_compiler_is_said_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch, train_recipe: Recipe
) -> None:
    section = CompileSection(mode="blocks")
    monkeypatch.setattr("sdtrain.compiling.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs Triton"):
        require_compiler(section, torch.device("cuda"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setenv("PATH", "")
    from torch._inductor import cpp_builder

    for name in ("get_cpp_compiler", "_get_cpp_compiler", "cpp_compiler_search"):
        if hasattr(getattr(cpp_builder, name, None), "cache_clear"):
            getattr(cpp_builder, name).cache_clear()
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler on a cpu"):
        open_setup(load_train_recipe(train_recipe(), ["compile.mode=blocks"]))
    require_compiler(CompileSection(mode="blocks", backend="eager"), torch.device("cpu"))
    require_compiler(CompileSection(), torch.device("cpu"))
    with pytest.raises(RecipeError, match="did you mean blocks"):
        load_train_recipe(train_recipe(), ["compile.mode=block"])


def test_a_compiled_run_is_not_continued_uncompiled_unasked(train_recipe: Recipe) -> None:
    saved = load_train_recipe(train_recipe(), ["compile.mode=blocks"]).resolved()
    changed = changes(saved, load_train_recipe(train_recipe()).resolved())
    assert changed == {"compile.mode": ("blocks", "off")}
