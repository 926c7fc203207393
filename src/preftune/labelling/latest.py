"""A run's model while it is trained: the weights of its newest checkpoint, as they appear."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune import building, checkpoint, config
from preftune.config import Config
from preftune.errors import UserError
from preftune.policies.transformer import Transformer
from preftune.runs import RunFolder


def is_run(name: str) -> bool:
    """Whether this is a run's folder, and not a model's."""
    return (Path(name) / "config.yaml").is_file() and not (Path(name) / "config.json").exists()


def settings_of(name: str) -> Config:
    """The settings of a run's folder."""
    return config.load(RunFolder(Path(name)).read_config())


@dataclass
class Latest:
    """A policy that is given the weights of a run's checkpoints."""

    run: Path
    policy: Transformer
    step: int = 0
    """Updates behind its weights."""

    def refresh(self) -> int:
        """Take the newest checkpoint, if it is not the one that was taken; returns `step`."""
        path = checkpoint.last(self.run / "checkpoints")
        if path is None or checkpoint.step_of(path) == self.step:
            return self.step
        try:
            checkpoint.load_weights(self.policy, path)
        except UserError:  # the run has removed it meanwhile; the next one will do
            return self.step
        self.step = checkpoint.step_of(path)
        return self.step


def goes_on(name: str) -> bool:
    """Whether this is the folder of a run that has not left its model, or is at work again."""
    return is_run(name) and (not (Path(name) / "model").is_dir() or RunFolder.is_busy(Path(name)))


def latest(drawn: Config, name: str, tokenizer: Any) -> Latest:
    """The policy of a run that goes on.

    Args:
        drawn: how responses are drawn, and on which device.

    Raises:
        UserError: the run trains no policy, or its model cannot be used.
    """
    run = settings_of(name)
    method = building.method_of(run)
    if "score" in method.outputs:
        raise UserError(f"model '{name}': that run trains a reward model, which says nothing.")
    settings = drawn.model_copy(update={"model": run.model, "adapter": run.adapter})
    return Latest(Path(name), building.make_policy(settings, None, tokenizer, method))
