"""Costs as they could be measured on a GPU."""

from captioner.captioning.costs import Costs, settings_digest
from captioner.config import CaptionJobConfig

COSTS = Costs(
    device="cuda",
    num_images=256,
    captioned_share=1.0,
    read_s=0.0001,
    read_cpu_s=0.0001,
    fetch_s=0.004,
    fetch_cpu_s=0.001,
    decode_s=0.020,
    encode_s=0.004,
    generate_s=0.016,
    tokens_per_image=30.0,
    slots=256,
    model_threads=1,
    start_s=60.0,
    fingerprint="f",
    settings=settings_digest(CaptionJobConfig(output="out")),
)
