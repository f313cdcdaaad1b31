"""The errors whose messages reach the user.

PredictionError            its message goes to the user as it is
├ InputError               missing or contradictory inputs
├ LoraError                a LoRA that cannot be used
└ ModelError               the model gave no usable picture

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


class ModelError(PredictionError):
    """The model gave no usable picture, for instance numbers that are not finite."""


class SettingsError(Exception):
    """A setting with a value that cannot be; the message names the environment variable."""
