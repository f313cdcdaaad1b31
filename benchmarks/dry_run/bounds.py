"""What the dry run holds the engine to, as numbers; a figure beyond its bound is a problem, and the run fails."""

from __future__ import annotations

PLAN_ACCURACY = 0.05
"""How far the most memory may be from the plan's, as a part of the plan's."""
STEP_TFLOP = 74.4
"""Of one step of FLUX.1 [dev] at 1024x1024 with 512 text tokens: 59.5 in linear layers and 14.9 in attention."""
FLOP_ACCURACY = 0.01
STEP_LAUNCHES = {"exact": 1200, "fast": 520}
STEP_ELEMENTWISE_GB = {"exact": 40.0, "fast": 28.0}
CHANGE_GB = {0: 60.0, 1: 60.0, 2: 60.0}
"""Read and written by the change of the fp8 copy to this many LoRAs, from none or, for 0, from one."""
CHANGE_LAUNCHES = {0: 520, 1: 520, 2: 520}
COPIES_A_LORA = 8
MODELLED_SECONDS = {"fast dev": 2.45, "fast schnell": 0.38, "change": 0.030}
"""Whole images at 1024x1024, and a change of LoRAs or of the model."""

SCHEDULER = "schedulers/scheduling_flow_match_euler_discrete.py"
PLANNED_SYNCS = {
    "engine/engine.py:_encoded": "the prompt's states are checked to be finite, once a prompt",
    "engine/engine.py:_to_image": "the image is checked to be finite",
    "torch.tensor of device tensors in flux/pipeline_flux_inpaint.py:__call__": "diffusers' own, each step",
}
TO_THE_DEVICE = {
    "pipeline_flux.py:_get_clip_prompt_embeds": "the prompt's tokens, once a prompt",
    "pipeline_flux.py:_get_t5_prompt_embeds": "the same",
    "pipeline_flux.py:encode_prompt": "empty positions of the text",
    "pipeline_flux_img2img.py:encode_prompt": "the same",
    "pipeline_flux_inpaint.py:encode_prompt": "the same",
    "pipeline_flux.py:_prepare_latent_image_ids": "positions of the image's tokens",
    "pipeline_flux_img2img.py:_prepare_latent_image_ids": "the same",
    "pipeline_flux_inpaint.py:_prepare_latent_image_ids": "the same",
    "pipeline_flux_inpaint.py:prepare_mask_latents": "the mask",
}
PLANNED_COPIES = {
    "to the host in engine/engine.py:_to_image": "the image",
    "to the device in engine/image_to_latents.py:encode_image": "the image that is given, once a request",
    f"to the device in {SCHEDULER}:set_timesteps": "the schedule",
    f"to the device in {SCHEDULER}:scale_noise": "the schedule, for a given image; in inpainting each step",
    "to the device in utils/torch_utils.py:randn_tensor": "noise, which a real device draws itself",
    **{f"to the device in flux/{caller}": reason for caller, reason in TO_THE_DEVICE.items()},
}
"""Waits and copies that a request has, by caller, and why. Any other is a problem. Only the first two are ours."""
