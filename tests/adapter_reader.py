"""An independent reader of adapter files: the formulas that kohya's tools and LyCORIS document.

Nothing of it comes from the code under test, but for the names of the modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdtrain.formats.lora_keys import kohya_stem

Ends = dict[str, Tensor]


def merge_kohya(family: Any, tensors: dict[str, Tensor]) -> int:
    """Add a file to the base weights of a model; returns how many keys found no place."""
    stems: dict[str, Ends] = {}
    for key, tensor in tensors.items():
        stem, _, end = key.partition(".")
        stems.setdefault(stem, {})[end] = tensor
    two = "text_encoder_2" in family.parts
    for path, parameter in family.named_parameters():
        if not path.endswith(".weight") or parameter.dim() < 2 or path.startswith("vae."):
            continue
        module = path.removesuffix(".weight")
        if module.startswith("text_encoder") and ".encoder." not in module:
            continue
        config = family.parts["unet"].config
        found = stems.pop(kohya_stem(module, has_two_encoders=two, unet_config=config), None)
        if found is not None:
            with torch.no_grad():
                parameter.copy_(changed(parameter, found))
            assert not found, f"{module}: unread {sorted(found)}"
    return sum(len(ends) for ends in stems.values())


def changed(weight: Tensor, ends: Ends) -> Tensor:
    """The weight after one module's tensors, which are taken out of `ends`."""
    alpha = ends.pop("alpha", None)
    if "weight" in ends:  # (IA)³
        gain, on_input = 1 + ends.pop("weight"), bool(ends.pop("on_input"))
        return weight * gain if on_input else weight * gain[:, None]
    if "oft_blocks" in ends:
        blocks, rescale = ends.pop("oft_blocks"), ends.pop("rescale", torch.tensor(1.0))
        assert alpha == 0
        return rescale * (oft if blocks.dim() == 3 else boft)(weight, cayley(blocks))
    delta, rank = product(weight, ends)
    new = weight + delta.reshape(weight.shape) * (alpha / rank if rank else 1.0)
    if "dora_scale" in ends:
        scale = ends.pop("dora_scale")
        assert scale.shape == (weight.shape[0], *[1] * (weight.dim() - 1))
        new = new * scale / new.flatten(1).norm(dim=1).view(scale.shape)
    return new


def product(weight: Tensor, ends: Ends) -> tuple[Tensor, int | None]:
    """What is added before scaling, and the rank that alpha is divided by; None for no scale."""
    if "lora_up.weight" in ends:
        up, down = ends.pop("lora_up.weight"), ends.pop("lora_down.weight")
        if "lora_mid.weight" in ends:
            mid = ends.pop("lora_mid.weight")
            return tucker(mid, up.flatten(1).T, down.flatten(1)), len(down)
        return up.flatten(1) @ down.flatten(1), len(down)
    if "hada_w1_a" in ends:
        pair = []
        for side in ("1", "2"):
            left, right = ends.pop(f"hada_w{side}_a"), ends.pop(f"hada_w{side}_b")
            core = ends.pop(f"hada_t{side}", None)
            pair.append(left @ right if core is None else tucker(core, left, right))
        return pair[0] * pair[1], len(right)
    sides, rank = [], None
    for side in ("1", "2"):
        whole = ends.pop(f"lokr_w{side}", None)
        if whole is None:
            left, right = ends.pop(f"lokr_w{side}_a"), ends.pop(f"lokr_w{side}_b")
            core, rank = ends.pop(f"lokr_t{side}", None), len(right)
            whole = left @ right if core is None else tucker(core, left, right)
        sides.append(whole)
    one, two = sides
    if weight.dim() == 4:
        inputs = weight.shape[1] // one.shape[1]
        one, two = one[:, :, None, None], two.reshape(len(two), inputs, *weight.shape[2:])
    return torch.kron(one.contiguous(), two.contiguous()), rank


def tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """core (p, q, k, l), outputs (p, out), inputs (q, in) to (out, in, k, l)."""
    return torch.einsum("pqkl,po,qi->oikl", core, outputs, inputs)


def cayley(blocks: Tensor) -> Tensor:
    """Rotations of the blocks of a file."""
    skew, one = blocks - blocks.mT, torch.eye(blocks.shape[-1])
    return (one + skew) @ torch.linalg.inv(one - skew)


def oft(weight: Tensor, rotations: Tensor) -> Tensor:
    """Each block of outputs by the transpose of its rotation, as LyCORIS does."""
    return (torch.block_diag(*rotations).T @ weight.flatten(1)).reshape(weight.shape)


def boft(weight: Tensor, stages: Tensor) -> Tensor:
    """Stage after stage, each as one whole matrix: permutation, blocks, permutation back."""
    rows, side = len(weight), stages.shape[-1]
    new = weight.flatten(1)
    for number, rotations in enumerate(stages):
        half = 2**number * side // 2
        order = [
            group * 2 * half + which * half + place
            for group in range(rows // (2 * half))
            for place in range(half)
            for which in range(2)
        ]
        permutation = torch.eye(rows)[order]
        new = permutation.T @ torch.block_diag(*rotations) @ permutation @ new
    return new.reshape(weight.shape)
