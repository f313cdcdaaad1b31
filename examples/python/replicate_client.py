"""Replicate's official Python client: python examples/python/replicate_client.py [folder for the images].

REPLICATE_API_TOKEN is read by the client, REPLICATE_BASE_URL too, where another server speaks Replicate's API.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import replicate

MODEL = os.environ.get("FLUX_MODEL", "your-name/flux")
WEBHOOK = os.environ.get("FLUX_WEBHOOK")
"""An address of yours that is told when a prediction ends."""
EXAMPLES = Path(__file__).parent.parent
QUICK = {"model": "schnell", "num_inference_steps": 4, "megapixels": "0.25", "output_format": "png"}


def make(file: Path, **inputs: Any) -> None:
    """Run the model and save its first image; the client decodes data URIs and fetches addresses by itself."""
    images: Any = replicate.run(MODEL, input={**QUICK, **inputs})
    file.write_bytes(images[0].read())
    print(f"wrote {file}")


def main(folder: Path) -> None:
    """Each kind of request once."""
    folder.mkdir(parents=True, exist_ok=True)
    make(folder / "text.png", prompt="a red circle on a white background")
    with (EXAMPLES / "photo.jpg").open("rb") as photo:  # uploaded by the client
        make(folder / "image.png", prompt="a green heart on a white background", image=photo)
    with (EXAMPLES / "photo.jpg").open("rb") as photo, (EXAMPLES / "mask.png").open("rb") as mask:
        make(folder / "mask.png", prompt="a red square on a white background", image=photo, mask=mask)
    lora = os.environ.get("FLUX_LORA", "huggingface.co/owner/name")
    make(folder / "lora.png", prompt="a red circle on a white background", replicate_weights=lora)

    told: Any = {"webhook": WEBHOOK, "webhook_events_filter": ["completed"]} if WEBHOOK else {}
    blue_star = {**QUICK, "prompt": "a blue star on a yellow background"}
    later = replicate.models.predictions.create(MODEL, input=blue_star, **told)
    later.wait()
    print(f"later: {later.status}")

    slow = replicate.models.predictions.create(
        MODEL, input={"prompt": "a blue star on a yellow background", "num_inference_steps": 50}
    )
    while slow.status not in ("canceled", "succeeded", "failed"):
        slow.cancel()  # and again: a server may lose the cancellation that comes with the prediction itself
        time.sleep(0.5)
        slow.reload()
    print(f"slow: {slow.status}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
