"""JoyTag's vision transformer, computed straight from the tensors of its file.

Source: the model's own code and files, `fancyfeast/joytag`; names below are those of its tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError, model_validator

from sdprep.errors import DataError
from sdprep.recipe import Section

if TYPE_CHECKING:
    from torch import Tensor

NUM_OLD_ROWS = 9
"""Old heads end in 3 ratings and 6 scores, which later ones do without."""

_STEM_DEFAULTS = {"c": None, "k": 3, "s": 2, "p": 1}


class ViTConfig(Section):
    """The file `config.json`; what only matters in training is read and not used."""

    class_name: Literal["ViT"] = Field(alias="class")
    n_tags: int = Field(gt=0)
    image_size: int = Field(gt=0)  # px
    num_blocks: int = Field(ge=0)
    patch_size: int = Field(gt=0)  # px
    d_model: int = Field(gt=0)
    mlp_dim: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    use_sine: bool
    cnn_stem: str | None = None
    head_mean_after: bool = False  # the head is linear: before or after the mean is the same
    stochdepth_rate: float = 0.0
    layerscale_init: float | None = None
    loss_type: str = ""
    patch_dropout: float = 0.0

    @model_validator(mode="after")
    def _sizes_divide(self) -> ViTConfig:
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        if self.use_sine and (self.d_model % 4 or self.d_model < 8):
            raise ValueError(f"sine positions need d_model in fours from 8, not {self.d_model}")
        side = self.image_size
        for kind, options in self.stem():
            if kind == "conv":
                side = (side + 2 * options["p"] - options["k"]) // options["s"] + 1
        if side != self.grid:
            raise ValueError(f"cnn_stem gives {side} tokens a side, the patches {self.grid}")
        return self

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.image_size // self.patch_size

    def stem(self) -> list[tuple[str, dict[str, int]]]:
        """Layers that turn pixels into tokens: kind, and for `conv` its c, k, s, p.

        Raises:
            ValueError: `cnn_stem` names a layer or option that there is none of.
        """
        if self.cnn_stem is None:
            size = self.patch_size
            return [("conv", {"c": self.d_model, "k": size, "s": size, "p": 0})]
        return [_stem_layer(text) for text in self.cnn_stem.split(";")]


def _stem_layer(text: str) -> tuple[str, dict[str, int]]:
    kind, _, rest = text.partition(":")
    if kind not in ("conv", "bn", "ln", "relu", "gelu"):
        raise ValueError(f"cnn_stem has a layer {kind!r}; known: conv, bn, ln, relu, gelu")
    if kind != "conv":
        return kind, {}
    options = dict(_STEM_DEFAULTS)
    for part in rest.split(","):
        key, _, value = part.partition("=")
        if key not in options or not value.isdecimal():
            raise ValueError(f"cnn_stem has {text!r}; expected such as conv:c=64,k=3,s=2,p=1")
        options[key] = int(value)
    found = {key: value for key, value in options.items() if value is not None}
    if len(found) < len(options) or min(found["c"], found["k"], found["s"]) < 1:
        raise ValueError(f"cnn_stem has {text!r}; c, k and s must be 1 at least")
    return kind, found


def read_config(data: dict[str, object], where: str) -> ViTConfig:
    """Check `config.json`.

    Raises:
        DataError: another class of model, or sizes that do not fit each other.
    """
    if data.get("class") != "ViT":
        raise DataError(
            f"{where}: class is {data.get('class')!r}, expected 'ViT'",
            "Of JoyTag's models the published one is of class ViT; this is another model.",
        )
    try:
        return ViTConfig.model_validate(data)
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, each['loc'])) or 'sizes'}: {each['msg']}"
            for each in error.errors(include_url=False)
        ]
        raise DataError(f"{where}: {'; '.join(found)}") from None


class JoyTagViT:
    """Pre-norm transformer over a convolution stem, mean over tokens, one logit a tag."""

    def __init__(self, config: ViTConfig, weights: dict[str, Tensor], where: str) -> None:
        """Check every tensor's name and shape.

        Raises:
            DataError: tensors are missing, unknown or of another shape.
        """
        expected = shapes(config)
        given = {
            name: tensor
            for name, tensor in weights.items()
            if not name.endswith((".position_ids", ".num_batches_tracked"))
        }
        for name in ("head.weight", "head.bias"):
            if name in given and len(given[name]) == config.n_tags + NUM_OLD_ROWS:
                given[name] = given[name][: config.n_tags]
        problems = [f"lacks {name}" for name in expected if name not in given]
        problems += [f"has {name}, which is unknown" for name in given if name not in expected]
        problems += [
            f"{name} is {tuple(given[name].shape)}, expected {shape}"
            for name, shape in expected.items()
            if name in given and tuple(given[name].shape) != shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise DataError(
                f"{where} does not fit its config.json: {'; '.join(problems[:3])}{more}"
            )
        self.config = config
        self.weights = {name: tensor.float() for name, tensor in given.items()}

    def to(self, device: str) -> JoyTagViT:
        """Move all tensors.

        They are copied even where they are there already: a file's tensors lie at any address, and
        the last bits of a product depend on how its factors are aligned.
        """
        self.weights = {name: tensor.to(device, copy=True) for name, tensor in self.weights.items()}
        return self

    def logits(self, pixels: Tensor) -> Tensor:
        """One logit a tag.

        Args:
            pixels: (B, 3, image_size, image_size) float32, RGB, normalised.

        Returns:
            (B, n_tags) float32.
        """
        tokens = self._stem(pixels).flatten(2).transpose(1, 2)  # (B, grid², d_model)
        tokens = tokens + self._positions(tokens)
        for index in range(self.config.num_blocks):
            tokens = self._block(tokens, f"blocks.{index}.")
        return self._linear(self._norm(tokens, "norm").mean(dim=1), "head")

    def _stem(self, x: Tensor) -> Tensor:
        from torch.nn import functional

        for index, (kind, options) in enumerate(self.config.stem()):
            name = _stem_name(self.config, index)
            if kind == "conv":
                weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
                x = functional.conv2d(x, weight, bias, options["s"], options["p"])
            elif kind == "ln":  # over channels
                x = self._norm(x.permute(0, 2, 3, 1), f"{name}.norm").permute(0, 3, 1, 2)
            elif kind == "bn":
                x = functional.batch_norm(
                    x,
                    self.weights[f"{name}.running_mean"],
                    self.weights[f"{name}.running_var"],
                    self.weights[f"{name}.weight"],
                    self.weights[f"{name}.bias"],
                )
            else:
                x = functional.relu(x) if kind == "relu" else functional.gelu(x)
        return x

    def _positions(self, tokens: Tensor) -> Tensor:
        """(grid², d_model): x before y, sine before cosine, row by row."""
        import torch

        if not self.config.use_sine:
            return self.weights["pos_embedding.embedding.weight"]
        quarter = self.config.d_model // 4
        line = torch.arange(self.config.grid, device=tokens.device)
        omega = 1.0 / 10000 ** (torch.arange(quarter, device=tokens.device) / (quarter - 1))
        angles = line[:, None] * omega[None, :]
        x = angles.repeat(self.config.grid, 1)
        y = angles.repeat_interleave(self.config.grid, dim=0)
        return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)

    def _block(self, x: Tensor, at: str) -> Tensor:
        from torch.nn import functional

        batch, length, width = x.shape
        qkv = self._linear(self._norm(x, f"{at}norm1"), f"{at}qkv_proj")
        heads = (batch, length, self.config.num_heads, width // self.config.num_heads)
        query, key, value = (part.view(heads).transpose(1, 2) for part in qkv.split(width, dim=-1))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        x = x + self._linear(mixed, f"{at}out_proj") * self.weights[f"{at}skip_init1.skip"]
        hidden = self._linear(self._norm(x, f"{at}norm2"), f"{at}mlp.linear1")
        out = self._linear(functional.gelu(hidden), f"{at}mlp.linear2")
        return x + out * self.weights[f"{at}skip_init2.skip"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        from torch.nn import functional

        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        from torch.nn import functional

        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias)


def _stem_name(config: ViTConfig, index: int) -> str:
    return "patch_embeddings" if config.cnn_stem is None else f"patch_embeddings.conv.{index}"


def shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this configuration has."""
    found: dict[str, tuple[int, ...]] = {}

    def affine(name: str, *weight: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = weight, weight[:1]

    width, channels = config.d_model, 3
    for index, (kind, options) in enumerate(config.stem()):
        name = _stem_name(config, index)
        if kind == "conv":
            affine(name, options["c"], channels, options["k"], options["k"])
            channels = options["c"]
        elif kind == "ln":
            affine(f"{name}.norm", channels)
        elif kind == "bn":
            affine(name, channels)
            found[f"{name}.running_mean"] = found[f"{name}.running_var"] = (channels,)
    if not config.use_sine:
        found["pos_embedding.embedding.weight"] = (config.grid**2, width)
    for index in range(config.num_blocks):
        at = f"blocks.{index}."
        affine(f"{at}norm1", width)
        affine(f"{at}qkv_proj", 3 * width, width)
        affine(f"{at}out_proj", width, width)
        affine(f"{at}norm2", width)
        affine(f"{at}mlp.linear1", config.mlp_dim, width)
        affine(f"{at}mlp.linear2", width, config.mlp_dim)
        found[f"{at}skip_init1.skip"] = found[f"{at}skip_init2.skip"] = (width,)
    affine("norm", width)
    affine("head", config.n_tags, width)
    return found
