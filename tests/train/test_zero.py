"""Which settings a user's DeepSpeed configuration may hold, and which the recipe decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spt_fast.config import Engine
from spt_fast.errors import RecipeError
from spt_fast.train.engines import uses_deepspeed
from spt_fast.train.price import Way
from spt_fast.train.zero import merged, user_config

OURS = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 1, "overlap_comm": False}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"zero_optimization": {"overlap_comm": True}}, {"zero_optimization": {"stage": 1, "overlap_comm": True}}),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, {}),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": "auto"}}, {}),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}}, {}),
        ({"communication_data_type": "bf16"}, {"communication_data_type": "bf16"}),
        ({"flops_profiler": {"enabled": True}}, {"flops_profiler": {"enabled": True}}),
        ({"train_batch_size": "auto"}, {}),
    ],
)
def test_the_users_deepspeed_settings_are_merged_into_ours(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert merged(OURS, given) == OURS | expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"train_batch_size": 64}, r"train_batch_size = 64, but batch\.sequences decides it"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization\.stage = 0, but engine\.stage decides it"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, r"offload_param\.device.*engine\.offload"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled = True, but precision decides it"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer = .*optimizer decides it"),
        ({"zero_optimization": 5}, r"zero_optimization = 5 is invalid: write a section"),
    ],
)
def test_a_setting_that_the_recipe_decides_is_refused_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=rf"engine\.config: .*{says}"):
        merged(OURS, given)


def test_an_invalid_deepspeed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    with pytest.raises(RecipeError, match=r"engine\.config: .*ds\.json cannot be read as JSON"):
        user_config(str(path))
    path.write_text("[1]")
    with pytest.raises(RecipeError, match=r"engine\.config: .*ds\.json: \[1\] is invalid: write an object"):
        user_config(str(path))


def test_auto_is_local_for_one_process_without_deepspeed_settings() -> None:
    assert not uses_deepspeed(Engine(), 1)
    assert not uses_deepspeed(Engine(name="local", offload="optimizer"), 2)
    assert uses_deepspeed(Engine(), 2)
    assert uses_deepspeed(Engine(name="deepspeed"), 1)
    assert uses_deepspeed(Engine(offload="optimizer"), 1)
    assert uses_deepspeed(Engine(config="ds.json"), 1)
    assert Way.of(Engine(stage=2, offload="optimizer"), 1) == Way(2, "optimizer")
    assert Way.of(Engine(stage=2), 1) == Way()
