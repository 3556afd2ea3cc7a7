"""What an entry of a cache is called: a digest of everything that its value depends on.

A name of a file, a folder, a learning rate or a batch size is not among it; bytes are.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from sdprep.buckets import Bucket
from sdprep.seeding import digest, key_text
from sdtrain.pixels import Crop
from sdtrain.tensor_hashes import tensor_hashes

if TYPE_CHECKING:
    from sdtrain.cache.section import CacheSection
    from sdtrain.family import Family

KEY_BYTES = 16

FORMAT_VERSION = 1
"""Of the entries as they are stored."""

PIXELS_VERSION = 1
"""Of what becomes of a file before the VAE: decoding, colour, orientation, Lanczos, crop, flip."""

TEXT_VERSION = 2
"""Of what becomes of a prompt before the encoders. 2: "!" is a word for all of them."""

VAE_DTYPE = "float32"

_SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")


def vae_fingerprint(family: Family) -> str:
    """Digest of tensors and structure of the VAE; its scale is applied after the cache."""
    vae: Any = family.parts["vae"]
    tensors = sorted(vae.state_dict().items())
    config = dict(getattr(vae, "config", {}))
    structure = {k: v for k, v in config.items() if k not in _SCALES and not k.startswith("_")}
    text = json.dumps(structure, sort_keys=True, default=str)
    hashes = tensor_hashes(tensors)
    return digest("vae", text, *(f"{name} {hash_}" for name, hash_ in hashes.items()))


def latents_kind(family: Family, section: CacheSection) -> str:
    """What the latents of one recipe have in common."""
    # A batch mate moves a latent by a little, so those made alone and those made in batches differ.
    together = "batched" if section.vae_batch > 1 else "alone"
    return digest(
        *("latents", FORMAT_VERSION, PIXELS_VERSION, vae_fingerprint(family), VAE_DTYPE),
        *(section.dtype, section.posterior, together),
    )


def latents_key(kind: str, source_digest: str, bucket: Bucket, crop: Crop) -> bytes:
    """The name of the latents of one crop of one file."""
    top, left = crop.top_left
    return _key(kind, source_digest, bucket.width, bucket.height, top, left, crop.is_flipped)


def text_kind(family: Family, section: CacheSection) -> str:
    """What the encoded prompts of one recipe have in common."""
    return digest("text", FORMAT_VERSION, TEXT_VERSION, family.text_fingerprint(), section.dtype)


def text_key(kind: str, prompt: str) -> bytes:
    """The name of one encoded prompt."""
    return _key(kind, prompt)


def _key(*parts: object) -> bytes:
    return blake2b(key_text(*parts), digest_size=KEY_BYTES).digest()
