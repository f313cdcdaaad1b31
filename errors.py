"""The errors whose messages reach the user.

PredictionError            its message goes to the user as it is
├ InputError               missing or contradictory inputs
├ LoraError                a LoRA that cannot be used
│ ├ LoraReferenceError     not a form that we know; the message lists the forms
│ ├ LoraAccessError        the service refuses it, or has no such thing; names the host and the token's input
│ └ LoraFormatError        no FLUX LoRA, or one that does not fit this model
├ DownloadError            network, disk, a truncated or an oversized file
│ ├ HttpStatusError        the server answered, but not with the file
│ └ DiskError              this machine's disk is full or fails
├ ModelError               the model gave no usable image
└ UnsafeOutputError        every image was withheld

SettingsError              a setting of the operator's is wrong: setup stops

A message has three parts: what was asked, what was found, what to do. Everything else that is raised is a mistake of
ours and stays an ordinary exception.
"""


class PredictionError(Exception):
    """A prediction that failed for a reason its user can read; the message carries no secret and no server path."""


class InputError(PredictionError):
    """Inputs that are missing, contradictory or unreadable."""


class LoraError(PredictionError):
    """A LoRA that cannot be used."""


class LoraReferenceError(LoraError):
    """A text that names a LoRA in no form that we know."""


class LoraAccessError(LoraError):
    """A LoRA that its service does not give to this caller, or that is not there."""


class LoraFormatError(LoraError):
    """A file that is no FLUX LoRA, or one that does not fit this model."""


class DownloadError(PredictionError):
    """A file that could not be fetched whole and right."""


class HttpStatusError(DownloadError):
    """An answer other than the one asked for: its status, the host that gave it, and the beginning of its body."""

    def __init__(self, message: str, *, status: int, host: str, body: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.host = host
        self.body = body


class DiskError(DownloadError):
    """The disk of this machine is full or fails."""


class ModelError(PredictionError):
    """The model gave no usable image, for instance numbers that are not finite."""


class UnsafeOutputError(PredictionError):
    """Every image of the prediction was withheld by the safety checker."""


class SettingsError(Exception):
    """A setting with a value that cannot be; the message names the environment variable."""
