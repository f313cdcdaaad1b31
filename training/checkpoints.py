"""Training that can be interrupted at any point: what a run needs to go on to the same weights, in one file.

Batches depend on their step's number alone (`training/data.py`), so that weights and the optimizers' states are all.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Resumable:
    """Modules and optimizers whose state is kept in a file under `path` while they are trained."""

    def __init__(self, path: Path, modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
        self.path = path
        self.modules = modules
        self.optimizers = optimizers

    def save(self, step: int) -> None:
        """Write the state after this many steps; a file that is there stays whole until the new one is."""
        tensors = {"step": torch.tensor(step)}
        for name, module in self.modules.items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer {number}.{index}.{key}": value for key, value in state.items()}
        partial = self.path.with_suffix(".partial")
        save_file({key: value.clone().contiguous() for key, value in tensors.items()}, partial)
        partial.replace(self.path)

    def load(self) -> int:
        """Put the file's state back, if there is one, and return how many steps it had; 0 without a file."""
        if not self.path.exists():
            return 0
        with safe_open(self.path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for name, module in self.modules.items():
            module.load_state_dict(_below(f"{name}.", tensors))
        for number, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(f"optimizer {number}.", tensors).items():
                index, _, field = key.partition(".")
                states.setdefault(int(index), {})[field] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        return int(tensors["step"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
