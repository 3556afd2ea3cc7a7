"""What the tensors of an adapter file make of a weight: the formulas of every known kind.

Whoever trained the file. The formulas are those of kohya's tools, peft and LyCORIS
(arXiv:2309.14859); DoRA: arXiv:2402.09353, OFT: arXiv:2306.07280, BOFT: arXiv:2311.06243,
(IA)³: arXiv:2205.05638.
"""

from __future__ import annotations

import torch
from torch import Tensor

Ends = dict[str, Tensor]
"""Tensors of one module by the end of their key, as LyCORIS calls them; taken out as they are read.
"""

OTHER_NAMES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
}
"""peft's and older diffusers' names of the same tensors."""
PEFT_LENGTHS = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
"""`dora_scale` in peft's files, where it is always of outputs, whatever its shape."""

KNOWN = (
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("oft_blocks", "rescale", "on_input", "diff", "diff_b", "w_norm", "b_norm"),
)
KINDS = "LoRA, LoCon, DoRA, DyLoRA, LoHa, LoKr, (IA)³, OFT, BOFT and plain differences"


class NoSuchKindError(Exception):
    """Tensors that are of no known kind, or do not fit the weight; says why."""


def split_key(key: str) -> tuple[str, str]:
    """Module and end of a key, such as `lora_unet_…` and `lora_down.weight`.

    Names of modules have dots in diffusers' files and none in kohya's.
    """
    ends = (*KNOWN, *OTHER_NAMES, *PEFT_LENGTHS)
    for end in sorted(ends, key=len, reverse=True):
        if key.endswith(f".{end}"):
            return key.removesuffix(f".{end}"), end
    stem, _, end = key.partition(".") if key.startswith("lora_") else key.rpartition(".")
    return stem, end


def plain_name(end: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor by the name that `changed` knows it by."""
    if end in PEFT_LENGTHS:
        return "dora_scale", tensor.flatten()
    return OTHER_NAMES.get(end, end), tensor


def changed(weight: Tensor, ends: Ends, alpha: float | None = None) -> Tensor:
    """The weight with an adapter folded in.

    Args:
        weight: of the base model, a matrix, a convolution's kernel or a norm's vector.
        ends: of one module; what is left of them afterwards belonged to nothing that is known.
        alpha: where the file has it in its metadata; else it stands in `ends`, or is the rank.

    Returns:
        float32, of the weight's shape.

    Raises:
        NoSuchKindError: a part is missing or has another size.
    """
    weight = weight.detach().float()
    found = ends.pop("alpha", None)
    alpha = float(found) if found is not None else alpha
    ends_read = {end: tensor.to(weight.device).float() for end, tensor in ends.items()}
    ends.clear()
    try:
        new = _changed(weight, ends_read, alpha)
    except KeyError as error:
        raise NoSuchKindError(f"{error.args[0]} is missing beside it") from None
    except RuntimeError as error:
        raise NoSuchKindError(
            f"the layer's weight is {tuple(weight.shape)}: {str(error).splitlines()[0]}"
        ) from None
    ends.update(ends_read)
    return new


def _changed(weight: Tensor, ends: Ends, alpha: float | None) -> Tensor:
    if "oft_blocks" in ends:
        return _rotated(weight, ends, alpha or 0.0)
    if "on_input" in ends or "weight" in ends:
        return weight * (1 + _along(weight, ends.pop("weight"), int(ends.pop("on_input"))))
    if "w_norm" in ends or "diff" in ends:
        delta = ends.pop("w_norm" if "w_norm" in ends else "diff")
    else:
        delta, rank = _product(ends)
        delta = delta * (alpha / rank if rank and alpha is not None else 1.0)
    if delta.numel() != weight.numel() or delta.shape[0] != weight.shape[0]:
        raise RuntimeError(f"the adapter makes {tuple(delta.shape)}")
    new = weight + delta.reshape(weight.shape)
    return new * _gain(new, ends.pop("dora_scale")) if "dora_scale" in ends else new


def _along(weight: Tensor, values: Tensor, axis: int) -> Tensor:
    """A vector in the shape that multiplies a weight along its outputs (0) or inputs (1)."""
    if values.numel() != weight.shape[axis]:
        raise RuntimeError(f"the adapter has {values.numel()} factors")
    return values.reshape([-1 if each == axis else 1 for each in range(weight.dim())])


def _gain(new: Tensor, scale: Tensor) -> Tensor:
    """DoRA's lengths over the norms: of outputs, or of inputs where the file's first side is 1."""
    axis = 0 if scale.shape[0] == new.shape[0] else 1
    norms = new.transpose(0, axis).flatten(1).norm(dim=1)
    return _along(new, scale, axis) / _along(new, norms, axis).clamp_min(1e-38)


def _product(ends: Ends) -> tuple[Tensor, int | None]:
    """What is added before scaling, and the rank that alpha is over; None: not scaled."""
    if "lora_up.weight" in ends or "lora_down.weight" in ends:
        up, down = ends.pop("lora_up.weight"), ends.pop("lora_down.weight")
        mid = ends.pop("lora_mid.weight", None)
        if mid is None:
            return up.flatten(1) @ down.flatten(1), len(down)
        return _tucker(mid, up.flatten(1).mT, down.flatten(1)), len(down)
    if any(end.startswith("hada_") for end in ends):
        one, rank = _factor(ends, "hada_w1", "hada_t1")
        two, _ = _factor(ends, "hada_w2", "hada_t2")
        return one * two, rank
    if any(end.startswith("lokr_") for end in ends):
        one, rank_one = _factor(ends, "lokr_w1", "lokr_t1")
        two, rank_two = _factor(ends, "lokr_w2", "lokr_t2")
        # (a, b) ⊗ (c, d · k²): the kernel is the innermost, so its place is the same.
        return torch.kron(one.contiguous(), two.flatten(1).contiguous()), rank_two or rank_one
    raise NoSuchKindError(f"only {KINDS} can be read here")


def _factor(ends: Ends, name: str, core: str) -> tuple[Tensor, int | None]:
    """One factor, whole or of low rank or after Tucker; and its rank."""
    if name in ends:
        return ends.pop(name), None
    left, right = ends.pop(f"{name}_a"), ends.pop(f"{name}_b")
    if core in ends:
        return _tucker(ends.pop(core), left, right), len(right)
    return left @ right, len(right)


def _tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """(p, q, k, l) core, outputs (p, out), inputs (q, in) to (out, in, k, l)."""
    return torch.einsum("pq...,po,qi->oi...", core, outputs, inputs)


# --- rotations -----------------------------------------------------------------------------------


def _rotated(weight: Tensor, ends: Ends, alpha: float) -> Tensor:
    """Outputs after a rotation by blocks (OFT), or after stages of them (BOFT)."""
    blocks = ends.pop("oft_blocks")
    skew = blocks - blocks.mT
    most = alpha * len(weight)  # LyCORIS: alpha bounds the norm of all blocks together
    norm = skew.norm() + 1e-8
    if 0 < most < norm:
        skew = skew * (most / norm)
    one = torch.eye(skew.shape[-1], device=skew.device)
    rotations = torch.linalg.solve(one - skew, one + skew)
    flat = weight.flatten(1)
    if blocks.dim() == 3:
        flat = (rotations.mT @ flat.view(len(blocks), -1, flat.shape[1])).reshape(flat.shape)
    else:
        for stage, stage_rotations in enumerate(rotations):
            flat = _butterfly(flat, stage_rotations, 2**stage * skew.shape[-1] // 2)
    rescale = ends.pop("rescale", None)
    new = flat.reshape(weight.shape)
    return new if rescale is None else new * _along(weight, rescale, 0)


def _butterfly(rows: Tensor, rotations: Tensor, half: int) -> Tensor:
    """One stage: rows `half` apart come beside each other, rotate by blocks, and go back."""
    columns = rows.shape[1]
    paired = rows.view(-1, 2, half, columns).transpose(1, 2)
    mixed = rotations @ paired.reshape(len(rotations), -1, columns)
    return mixed.reshape(-1, half, 2, columns).transpose(1, 2).reshape(rows.shape)
