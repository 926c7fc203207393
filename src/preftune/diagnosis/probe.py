"""A short run on the given pairs, to see where a longer one would go: tier 3.

The first twentieth of a run, from the reference, through the loop that runs everything else. Its
answers are to the prompts that the reference answered, drawn with the same random numbers, and
measured as these are, but for the reward: early in training neither that nor the gap to the data
says how it ends. Whether its answers differ where the pairs do is what to look at.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from preftune import building, loading, plain_yaml, resuming, training
from preftune import config as configs
from preftune.config import Config
from preftune.diagnosis import cost, measure
from preftune.diagnosis.measure import Job, Surveyed
from preftune.diagnosis.pieces import Pieces
from preftune.errors import Saved, UserError
from preftune.events import Event
from preftune.policies.transformer import Transformer

EPOCHS = 3
"""Of the longer run, where no spend is given; as the verdict has it."""
SHARE = 0.05
LEAST = 16
"""Updates; with fewer, Adam knows nothing of its gradients' size yet. No more than the longer run
has."""
WAY = 100
"""Updates at the row's own rate that it goes as far as, at least, where no rate is given: Adam goes
about as far in fewer ones at a higher rate. Six updates at ten times the row's took a model of 135
million parameters .013 nats from the reference, at answers of 16 tokens."""
_NOT_OF_IT = {"reward", "reward_weights", "label_source", "eval_data", "output", "resume"}
_NOT_ITS_RESULT = {"output", "resume", "threads", "save_every"}
Tick = Callable[[str], Callable[[int, int], None]]


def planned(config: Config, job: Job, steps: int | None, spend: float | None) -> cost.Probe | None:
    """The probe that may be made, if one may.

    Args:
        steps: None: as many as fit the longer run; 0: no probe.
        spend: on the longer run, in units of training on one response.

    Raises:
        UserError: asked for, where it cannot be made.
    """
    if steps is not None and steps < 0:
        raise UserError(f"flag '--probe-steps': is {steps}. Give 0 or more.")
    if steps and job.rows.kind != "pairs":
        raise UserError("flag '--probe-steps': a probe trains on pairs; these are completions.")
    if steps and config.output is None:
        raise UserError("flag '--probe-steps': a probe needs a folder. Give an output.")
    if steps == 0 or job.rows.kind != "pairs" or config.output is None:
        return None
    longer = (2 * EPOCHS * len(job.rows) if spend is None else spend) / (2 * config.batch_size)
    chosen = max(1, round(min(longer, max(LEAST, SHARE * longer))))
    return cost.Probe(steps=steps or chosen, pairs=config.batch_size, asked=steps is not None)


@dataclass(frozen=True)
class Probe:
    """A run of so many updates in the folder of a diagnosis; made when first asked for."""

    config: Config
    """Of the diagnosis."""
    job: Job
    """Of the diagnosis."""
    steps: int
    tick: Tick

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Of the run, without its folder."""
        text = resources.files("preftune.diagnosis").joinpath("probe.yaml").read_text()
        given = self.config.model_dump(exclude_unset=True, exclude=_NOT_OF_IT)
        given |= plain_yaml.load(text) | {"max_steps": self.steps}
        own = building.method_of(configs.load(given)).defaults["learning_rate"]
        faster = own * max(1.0, WAY / self.steps)
        return {"learning_rate": faster} | given

    @property
    def learning_rate(self) -> float:
        """Of its updates, after the warm-up."""
        return self._settings["learning_rate"]

    @cached_property
    def _pieces(self) -> Pieces:
        """What hangs on the run besides: another run's are not taken."""
        assert self.config.output is not None, "checked when it was planned"
        run = {k: v for k, v in self._settings.items() if k not in _NOT_ITS_RESULT}
        about = json.dumps({"of": self.job.identity, "run": run}, sort_keys=True)
        return Pieces(Path(self.config.output) / "pieces", about)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(str(self.config.output)) / f"probe-{self._pieces.key}"

    @cached_property
    def _policy(self) -> Transformer:
        if not (self.folder / "model").is_dir():
            self._train()
        return loading.model_of(self.config, str(self.folder / "model"))[0]

    def _train(self) -> None:
        """From the reference, or on from where it was cut off.

        Raises:
            GuardStop: it diverged.
            Saved: the system asked for an end.
        """
        shown = self.tick("probe")

        def follow(event: Event) -> None:
            if event.kind == "step":
                shown(event.step, event.total)

        asked = self._settings | {"output": str(self.folder), "resume": True}
        try:
            training.train(configs.load(resuming.resumed(asked)), callbacks=[follow])
        except Saved as ended:
            output = self.config.output
            message = f"the probe in {self.folder}; the command with --output {output} goes on"
            raise Saved(message) from ended
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def measured(self, rows: Tensor, samples: int, data: Surveyed) -> tuple[Surveyed, Surveyed]:
        """Its answers to the prompts of `rows`, and the data's responses to them as it sees them.

        Args:
            data: of the diagnosis.

        Raises:
            GuardStop: it diverged.
        """
        job = replace(self.job, judge=None, pieces=self._pieces)
        answers = measure.own(
            job, lambda: self._policy, rows, samples, self.tick("probe's answers"),
            name="probe", stream="reference",
        )  # fmt: skip
        theirs, _ = measure.same_prompts(data, answers)
        scored = measure.rescored(
            job, lambda: self._policy, theirs, self.tick("probe's data"), name="probe-data"
        )
        return answers, scored
