"""Measure what compressing cached latents would save, and what it would cost.

Usage: python tools/bench/latent_compression.py [PHOTOS] [STEPS]
PHOTOS is a folder of pictures (default: the photos of the demonstration). No published VAE is at
hand offline, so a small one of the same kind is trained on these photos for STEPS steps (default
300), with a slight KL term as the published ones were. Its latents are compressed, and as a bound
from above so is Gaussian noise of the same deviation, which has no structure between its values.
Prints for each codec the saving in percent of plain float16, and GB/s of packing and unpacking.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

DEMO = Path(__file__).resolve().parents[1] / "demo_photos" / "photos"
SIDE_PX = 256
CROP_PX = 64
BATCH = 8
KL_WEIGHT = 1e-6

Codec = tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]


def byte_split(data: bytes) -> tuple[bytes, bytes]:
    """The low bytes, which are nearly random, and the high ones: sign and exponent."""
    planes = np.frombuffer(data, np.uint8).reshape(-1, 2)
    return planes[:, 0].tobytes(), planes[:, 1].tobytes()


def byte_joined(low: bytes, high: bytes) -> bytes:
    """What `byte_split` was given."""
    return np.stack([np.frombuffer(low, np.uint8), np.frombuffer(high, np.uint8)], 1).tobytes()


def packed_halves(data: bytes, codec: Any) -> bytes:
    """Low bytes as they are, then the high ones; together zstd would give them one code table."""
    low, high = byte_split(data)
    return low + codec.compress(high, asbytes=True)


def unpacked_halves(data: bytes, size: int, codec: Any) -> bytes:
    """What `packed_halves` was given."""
    half = size // 2
    return byte_joined(data[:half], codec.decompress(data[half:], half, asbytes=True))


def codecs() -> dict[str, Codec]:
    """Name to (pack, unpack); unpacking is told the plain size."""
    found: dict[str, Codec] = {"plain": (bytes, lambda data, size: bytes(data))}
    for name in ("lz4", "gzip", "zstd"):
        codec = pa.Codec(name)
        found[name] = (
            lambda data, codec=codec: codec.compress(data, asbytes=True),
            lambda data, size, codec=codec: codec.decompress(data, size, asbytes=True),
        )
    zstd = pa.Codec("zstd")
    found["byte-split + zstd"] = (
        lambda data: packed_halves(data, zstd),
        lambda data, size: unpacked_halves(data, size, zstd),
    )
    return found


def measure(latents: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Saving in percent and speed in GB/s of each codec over (C, h, w) float16 latents."""
    blobs = [np.ascontiguousarray(latent).tobytes() for latent in latents]
    total, table = sum(map(len, blobs)), {}
    for name, (pack, unpack) in codecs().items():
        started = time.perf_counter()
        packed = [pack(blob) for blob in blobs]
        packing = time.perf_counter() - started
        started = time.perf_counter()
        plain = [unpack(data, len(blob)) for data, blob in zip(packed, blobs, strict=True)]
        unpacking = time.perf_counter() - started
        assert plain == blobs, name
        table[name] = {
            "saves_percent": 100 * (1 - sum(map(len, packed)) / total),
            "pack_gb_s": total / packing / 1e9,
            "unpack_gb_s": total / unpacking / 1e9,
        }
    return table


def photos(folder: Path) -> list[torch.Tensor]:
    """(3, SIDE_PX, SIDE_PX) in [-1, 1] of every picture of a folder."""
    found = []
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as picture:
            small = picture.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
        found.append(torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1)
    return found


def trained_vae(pictures: list[torch.Tensor], steps: int) -> Any:
    """A small VAE with 4 channels and a factor of 8, after some steps of reconstruction."""
    from diffusers import AutoencoderKL

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 64, 64),
            latent_channels=4,
            norm_num_groups=8,
        )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator).tolist()
        corners = torch.randint(SIDE_PX - CROP_PX + 1, (BATCH, 2), generator=generator).tolist()
        cut = zip(chosen, corners, strict=True)
        batch = torch.stack([pictures[n][:, y : y + CROP_PX, x : x + CROP_PX] for n, (y, x) in cut])
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        again = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = (again - batch).square().mean() + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after {steps} steps the error of reconstruction is {float(loss):.4f}")
    return vae.eval()


def main(folder: Path = DEMO, steps: int = 300) -> None:
    """Train, encode, measure, print."""
    pictures = photos(folder)
    vae = trained_vae(pictures, steps)
    with torch.no_grad():
        latents = [vae.encode(p[None]).latent_dist.mode()[0].half().numpy() for p in pictures]
    deviation = float(np.std(np.stack(latents).astype(np.float32)))
    rng = np.random.default_rng(0)
    shape = latents[0].shape
    noise = [(deviation * rng.standard_normal(shape)).astype(np.float16) for _ in latents]
    print(f"{len(latents)} latents of {shape}, standard deviation {deviation:.2f}")
    for name, group in (("latents of photos", latents), ("Gaussian noise", noise)):
        print(name)
        for codec, line in measure(group).items():
            print(
                f"  {codec:<18} saves {line['saves_percent']:5.1f} %, packs "
                f"{line['pack_gb_s']:.2f} GB/s, unpacks {line['unpack_gb_s']:.2f} GB/s"
            )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(Path(arguments[0]) if arguments else DEMO, int(arguments[1]) if arguments[1:] else 300)
