"""The errors whose messages reach the user.

PredictionError            its message goes to the user as it is
├ InputError               missing, contradictory or unreadable inputs
├ LoraError                a LoRA cannot be used
│ ├ LoraReferenceError     the reference has no known form; the message lists the forms
│ ├ LoraAccessError        401, 403, 404 or 410; the message names the host and the token input
│ └ LoraFormatError        not a FLUX LoRA, or it does not fit this model
├ DownloadError            network failure, truncated or oversized file
│ ├ HttpStatusError        the server answered with an error status
│ └ DiskError              this machine's disk is full or failing
├ ModelError               the model produced no usable image
└ UnsafeOutputError        every image was withheld by the safety checker

SettingsError              an environment variable has an invalid value: setup stops

A message has three parts: what was asked, what was found, what to do. Programming mistakes stay ordinary exceptions.
"""


class PredictionError(Exception):
    """A prediction failed for a reason shown to the user; the message contains no secret and no server path."""


class InputError(PredictionError):
    """Inputs are missing, contradictory or unreadable."""


class LoraError(PredictionError):
    """A LoRA cannot be used."""


class LoraReferenceError(LoraError):
    """A LoRA reference has none of the known forms."""


class LoraAccessError(LoraError):
    """The service refuses the LoRA to this caller, or does not have it."""


class LoraFormatError(LoraError):
    """A file is not a FLUX LoRA, or does not fit this model."""


class DownloadError(PredictionError):
    """A file could not be fetched completely and correctly."""


class HttpStatusError(DownloadError):
    """A server answered with an error status; carries the status, the host and the beginning of the body."""

    def __init__(self, message: str, *, status: int, host: str, body: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.host = host
        self.body = body


class DiskError(DownloadError):
    """This machine's disk is full or failing."""


class ModelError(PredictionError):
    """The model produced no usable image, for instance non-finite values."""


class UnsafeOutputError(PredictionError):
    """Every image of the prediction was withheld by the safety checker."""


class SettingsError(Exception):
    """An environment variable has an invalid value; the message names it."""
