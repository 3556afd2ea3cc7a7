"""Tiny CLIP and SigLIP models with random weights, saved in the layouts that are published."""

from __future__ import annotations

from pathlib import Path

from sdprep.clip_tokens import VOCABULARY

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2}


def save_tiny_contrastive(path: Path, kind: str) -> Path:
    """A random `clip` or `siglip` of one layer that looks at 32 px."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(11)
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    text = SIZES | {"vocab_size": 49408} | ends
    vision = SIZES | {"image_size": 32, "patch_size": 8}
    if kind == "clip":
        text["max_position_embeddings"] = 77
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model = CLIPModel(config)
        side = {"height": 32, "width": 32}
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(path)
    else:
        text["max_position_embeddings"] = 64
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        torch.nn.init.constant_(model.logit_scale, 2.6)
        SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    for tensor in model.parameters():  # else a tiny random model tells nothing apart
        if tensor.dim() > 1:
            tensor.data.mul_(8)
    model.save_pretrained(path)
    CLIPTokenizer.from_pretrained(VOCABULARY).save_pretrained(path)
    return path
