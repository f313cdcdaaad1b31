"""The fleet's own metrics, which Ray serves to Prometheus as `ray_<name>` beside its own."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

REQUESTS = Counter("flux_requests", "Requests by outcome.", tag_keys=("outcome",))
ACCEPTED = Gauge("flux_accepted", "Predictions that are accepted and not yet answered.")
RETRIES = Counter("flux_retries", "Predictions that were repeated because their replica was lost.")
WAITING_SECONDS = Histogram(
    "flux_request_seconds",
    "From acceptance to the answer, waiting included.",
    boundaries=[0.5, 1, 2, 4, 8, 16, 32, 64, 128],
)
PREDICTION_SECONDS = Histogram("flux_prediction_seconds", "On the replica.", boundaries=[0.5, 1, 2, 4, 8, 16, 32, 64])
REPLICAS_LOST = Counter("flux_replicas_lost", "Replicas that ended because their predictor died.")
STUCK = Counter("flux_predictions_stuck", "Predictions that were ended at the limit, with their predictor.")
LORA_FETCHES = Counter("flux_lora_files", "LoRA files by how they were found in the cache.", tag_keys=("outcome",))
