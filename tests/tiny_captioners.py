"""Tiny captioning models with random weights, saved in the layouts that transformers publishes."""

from __future__ import annotations

from pathlib import Path

_WORDS = (
    "<pad> <s> </s> <unk> <image> USER ASSISTANT SYSTEM : . , a an the dog cat bird horse sits "
    "stands runs on near grass table hill red blue green old young big small house tree car with "
    "under sky sea sand stone wall door window man woman child boat road light dark wide"
)
_CHAT = (
    "{% for m in messages %}{{ m['role'] | upper }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT : {% endif %}"
)


def save_tiny_llava(folder: Path, *, chat_template: str | None = _CHAT) -> Path:
    """A LLaVA of two layers with a vocabulary of some sixty words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = {word: place for place, word in enumerate(_WORDS.split())}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes),
        text_config=LlamaConfig(
            vocab_size=len(words),
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.4,
            **sizes,
        ),
        image_token_index=words["<image>"],
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).eval().save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(folder)
    return folder


def save_tiny_blip(folder: Path) -> Path:
    """A BLIP of two layers with a BERT vocabulary of some sixty words."""
    import torch
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipProcessor,
        BlipTextConfig,
        BlipVisionConfig,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = special + [word for word in _WORDS.lower().split() if not word.startswith("<")]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words), encoding="utf-8")
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    text = BlipTextConfig(
        vocab_size=len(words),
        encoder_hidden_size=32,
        projection_dim=16,
        bos_token_id=5,
        sep_token_id=3,
        eos_token_id=3,
        pad_token_id=0,
        initializer_range=0.4,
        **sizes,
    )
    vision = BlipVisionConfig(image_size=28, patch_size=14, projection_dim=16, **sizes)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).eval().save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 28, "width": 28})
    BlipProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder
