"""Rules of adapters and of who is told of a run (see `rules`)."""

from typing import Any, get_args

from preftune.config import TRACKERS, Adapter
from preftune.from_trl.rules import Notes, Ours, Settings, Theirs

BITS = {"load_in_4bit": "4bit", "load_in_8bit": "8bit"}
_USUAL = Adapter.model_fields["target_modules"].default
_NOT_TAKEN = {
    "lora_target_parameters": "modules alone are named: target_modules",
    "lora_modules_to_save": "nothing is trained beside the adapter but a score or value head",
}


def adapter_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """LoRA's settings, of which preftune has the same but dropout; without `use_peft`, none."""
    values = theirs.values
    bits = next((here for name, here in BITS.items() if values[name]), None)
    if not values["use_peft"]:
        whole = "weights that train whole are not quantised; with use_peft, adapter.quantize is"
        return {}, {name: whole for name in BITS if values[name]}
    kinds = {"use_dora": "dora", "use_rslora": "rslora"}
    kind = next((here for name, here in kinds.items() if values[name]), "lora")
    found = {
        "kind": kind,
        "rank": theirs.whole("lora_r", least=1),
        "alpha": theirs.number("lora_alpha", least=0),
        "target_modules": _named(values["lora_target_modules"]),
        "quantize": bits,
    }
    notes = {name: why for name, why in _NOT_TAKEN.items() if values[name]}
    if values["use_dora"] and values["use_rslora"]:
        notes["use_rslora"] = "DoRA is scaled by alpha / rank"
    if values["lora_dropout"]:
        notes["lora_dropout"] = "0: policy and reference are compared as they compute"
    if not values["lora_target_modules"]:
        notes["lora_target_modules"] = "all-linear; PEFT knows a few of each architecture"
    return {"adapter": {k: v for k, v in found.items() if v is not None}}, notes


def _named(modules: Any) -> Any:
    """Names of modules; one in a list is what TRL takes for the text alone (all-linear)."""
    if isinstance(modules, list) and len(modules) == 1:
        return modules[0]
    return modules or _USUAL


def adapter_back(ours: Ours) -> dict[str, Any]:
    """The same, without dropout."""
    own = ours.config.adapter
    if own is None:
        return {}
    bits = {name: True for name, here in BITS.items() if here == own.quantize}
    switch = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}}.get(own.kind, {})
    modules = own.target_modules
    named = [modules] if isinstance(modules, str) else list(modules)
    return {
        "use_peft": True, "lora_r": own.rank, "lora_alpha": own.alpha, "lora_dropout": 0.0,
        "lora_target_modules": named, **switch, **bits,
    }  # fmt: skip


def trackers_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """The trackers that preftune knows, too."""
    given = theirs.values["report_to"]
    names = [str(n) for n in (given if isinstance(given, list) else [given])]
    known = [n for n in get_args(TRACKERS) if n in names]
    strange = [n for n in names if n not in (*known, "none", "None")]
    notes = {"report_to": f"name them in trackers: {', '.join(get_args(TRACKERS))}"}
    return ({"trackers": known} if known else {}), (notes if strange else {})


def trackers_back(ours: Ours) -> dict[str, Any]:
    """The same names; TRL's own default is none."""
    return {"report_to": list(ours.config.trackers)} if ours.config.trackers else {}
