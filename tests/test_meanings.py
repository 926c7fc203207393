"""Every setting of every part that YAML can name has a meaning."""

from preftune import meanings, methods, objectives


def test_every_setting_is_explained():
    for kind, parts in meanings.of_parts().items():
        for part in parts:
            assert part["meaning"].endswith((".", ":")), (kind, part["name"])
            assert all(part["settings"].values()), (kind, part["name"], part["settings"])
    names = {p["name"] for p in meanings.of_parts()["objectives"]}
    assert names == set(objectives.__all__)


def test_every_row_says_what_its_settings_are():
    for row in methods.table().values():
        shown = meanings.of_row(row)
        assert all(m["meaning"] for m in shown), [m for m in shown if not m["meaning"]]
        assert {m["path"] for m in shown} >= {"terms.0.source", "terms.0.weight"}


def test_hypo_is_told_apart():
    assert "2602.11902" in methods.get("hypo").note
