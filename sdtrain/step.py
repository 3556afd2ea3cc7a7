"""The only forward in the program: training and validation both pass through here."""

from __future__ import annotations

from torch import Tensor

from sdtrain.batch import Batch
from sdtrain.family import Conditioning, Family, Loss


def denoising_loss(
    family: Family,
    batch: Batch,
    loss: Loss,
    *,
    latents: Tensor | None = None,
    conditioning: Conditioning | None = None,
) -> Tensor:
    """How badly the network undoes the batch's noise, unweighted.

    Args:
        family: the model; networks and batch are on one device.
        batch: B samples of one bucket; its mask, if there is one, weighs the latents in the loss.
        loss: (prediction, target, u, logsnr, mask) to (B,).
        latents: scaled clean latents (B, C, h, w); else the batch's, else encoded from its pixels.
        conditioning: of the prompts; else the batch's, else encoded from its prompts.

    Returns:
        (B,) float32, with gradients into whatever is trainable.
    """
    latents = batch.latents if latents is None else latents
    conditioning = batch.conditioning if conditioning is None else conditioning
    if latents is None:
        latents = family.encode_images(batch.pixels)
    device = latents.device
    alpha, sigma = (
        scale.to(device, non_blocking=True).view(-1, 1, 1, 1)
        for scale in family.alpha_sigma(batch.u)
    )
    noise = batch.noise if batch.input_noise is None else batch.noise + batch.input_noise
    noisy_latents = alpha * latents + sigma * noise  # float32
    target = family.target(latents, batch.noise, batch.u)
    with family.autocast():
        if conditioning is None:
            conditioning = family.encode_prompts(batch.prompts)
        conditioning, micro = family.as_dropped(
            conditioning, batch.micro, batch.prompts, batch.text_draws
        )
        prediction = family.predict(noisy_latents, batch.u, conditioning, micro)
    logsnr = family.logsnr(batch.u).to(device, non_blocking=True)
    u = batch.u.float().to(device, non_blocking=True)
    return loss(prediction.float(), target, u=u, logsnr=logsnr, mask=batch.mask)
