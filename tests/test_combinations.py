"""Settings that do not go together are refused, with what to set."""

from __future__ import annotations

import pytest

from dit_ds.config.load import validate
from dit_ds.errors import UserError


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"data": {"prompts": ["text", "text"]}}, "names one twice"),
        ({"data": {"prompts": []}}, "data.prompts"),
        ({"data": {"prompts": ["mask"]}}, "data.prompts"),
        ({"data": {"scales": [600]}}, "data.scales"),
        (
            {"data": {"train_mask_rule": "soft"}, "model": {"name": "lavt", "size": "swin_b"}},
            "data.train_mask_rule half or any",
        ),
        ({"data": {"prompts": ["box"]}, "model": {"name": "rela", "size": "swin_b"}}, "knows no data.prompts"),
        ({"eval": {"mask_rule": "any"}}, "eval.mask_rule"),
    ],
)
def test_settings_that_do_not_go_together(values, says):
    with pytest.raises(UserError, match=says):
        validate(values)
