"""A configuration that TRL can follow comes back from TRL's settings as it was."""

from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from preftune import from_trl
from preftune.config import Config
from preftune.from_trl import rows

TABLE = from_trl.table()
POSITIVE = st.floats(min_value=1e-6, max_value=8, allow_nan=False)
SMALL = st.integers(min_value=1, max_value=9)
RUN: dict[str, Any] = {
    "model": st.sampled_from(["smollm2-135m", "org/model", "runs/a/model"]),
    "data": st.sampled_from(["org/rows", "pairs.jsonl", "deep/pairs.parquet", "a folder/x.csv"]),
    "output": st.sampled_from(["out", "runs/x"]),
    "seed": st.integers(min_value=0, max_value=999),
    "epochs": st.sampled_from([1.0, 2.5, 3.0]),
    "max_steps": st.none() | SMALL,
    "batch_size": SMALL,
    "learning_rate": POSITIVE,
    "lr_schedule": st.sampled_from(["linear", "cosine", "constant"]),
    "warmup_ratio": st.just(0.0) | st.floats(min_value=0.001, max_value=0.9),
    "weight_decay": st.floats(min_value=0, max_value=1),
    "max_grad_norm": POSITIVE | st.just(1e9),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "log_every": SMALL,
    "save_every": st.none() | SMALL,
    "adapter": st.none()
    | st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["lora", "rslora", "dora"]),
            "rank": SMALL,
            "alpha": st.sampled_from([16.0, 32.0]),
            "target_modules": st.sampled_from(["all-linear", ["q_proj"], ["q_proj", "v_proj"]]),
        }
    ),
    "trackers": st.none() | st.sampled_from([["tensorboard"], ["wandb", "mlflow"]]),
    "eval_fraction": st.just(0.0) | st.floats(min_value=0.01, max_value=0.5),
}
DRAWS: dict[str, Any] = {
    "max_new_tokens": SMALL, "temperature": POSITIVE, "top_p": st.floats(0.1, 1),
    "top_k": st.integers(0, 9), "reward": st.sampled_from(["org/judge", "a/folder"]),
}  # fmt: skip
FUNCTIONS = DRAWS | {
    "reward": st.sampled_from([["m.n:f", "o:g"], "m.n:f", ["org/judge", "m.n:f"]]),
    "samples_per_prompt": st.integers(2, 6),
}
CUT: dict[str, Any] = {
    "truncation": st.sampled_from(["left", "right"]), "max_length": st.integers(2, 999),
}  # fmt: skip
PLAIN: dict[str, Any] = {"temperature": st.just(1.0), "top_p": st.just(1.0), "top_k": st.just(0)}
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": POSITIVE} | CUT,
    "wpo": {"beta": POSITIVE} | CUT,
    "ln_dpo": {"beta": POSITIVE} | CUT,
    "robust_dpo": {"beta": POSITIVE, "label_smoothing": st.floats(0, 0.4)} | CUT,
    "dpo_nll": {"beta": POSITIVE, "weight": POSITIVE} | CUT,
    "pref_ft": {"unit": st.just("token")} | CUT,
    "sft": {"unit": st.just("token")} | CUT,
    "reward": CUT | {"truncation": st.just("drop")},
    "kto": {"beta": POSITIVE} | CUT | {"truncation": st.just("right")},
    "on_policy_dpo": {"beta": POSITIVE, "passes": st.just(1)} | CUT | DRAWS
    | {"truncation": st.just("left")},
    "on_policy_ipo": {"tau": POSITIVE, "passes": st.just(1)} | CUT | DRAWS
    | {"truncation": st.just("left")},
    "rloo": {"kl": st.floats(0, 1)} | FUNCTIONS | PLAIN,
    "grpo": {"weight": POSITIVE, "clip": POSITIVE, "passes": SMALL} | FUNCTIONS | PLAIN,
}  # fmt: skip
SAID = (
    "warmup_steps", "weight_decay", "truncation_mode", "max_length", "eval_strategy",
    "reward_funcs",
)  # fmt: skip
"""Where preftune does the same but for what is said of it."""


@st.composite
def configs(draw: st.DrawFn) -> Config:
    name = draw(st.sampled_from(sorted(METHODS)))
    own = {"method": st.just(name)} | RUN | METHODS[name]
    return Config(**{k: v for k, s in own.items() if (v := draw(s)) is not None})


# without shrinking, which takes minutes of rows that are built anew
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(configs())
def test_there_and_back(config):
    exported = from_trl.export(TABLE, config)
    assert exported.lost == []
    given = from_trl.Given(trainer=exported.trainer, values=exported.config)
    found = from_trl.convert(TABLE, given)
    back = Config(**found.config)
    assert all(getattr(config, n) == getattr(back, n) for n in rows.OF_ROW) or rows.same_row(
        config, back
    )
    for name in config.model_fields_set - set(rows.OF_ROW):
        assert getattr(back, name) == getattr(config, name), name
    assert not [d for d in found.differs if d["trl"] not in (None, *SAID)], found.differs


def test_every_row_that_trl_has_goes_there():
    methods = {t.method for trainer in TABLE.trainers.values() for t in trainer.templates}
    assert methods - set(METHODS) == {"ipo"}, "ipo by sums, as the table has it, is not TRL's"
