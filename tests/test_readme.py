"""What the README shows is run here, so that it stays true."""

import re
from pathlib import Path

import pytest

from imp_jax import config as configs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_notebook_example_runs_and_gives_what_its_comments_say():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = {}
    exec(code, names)
    assert names["masking"].density(names["mask"]) == pytest.approx(0.8)
    assert not names["updates"]["Dense_0"]["kernel"][~names["mask"]["Dense_0"]["kernel"]].any()
    distance = names["similarity"].angular_distance(
        names["params"], names["mask"], names["other"], names["mask"]
    )
    assert distance == pytest.approx(1, abs=0.01)
    barrier = names["connectivity"].error_barrier(names["jnp"].array([0.1, 0.4, 0.3]), baseline="mean")
    assert barrier == pytest.approx(0.2)


def test_every_override_it_shows_is_a_field():
    fields = set(re.findall(r"--config\.([\w.]+)=", README))
    assert len(fields) > 8
    for field in fields:
        assert configs.describe_type(field), field


def test_every_file_it_names_is_there():
    root = Path(__file__).parent.parent
    named = re.findall(r"\((experiments/[\w/.]+)\)|(configs/\w+\.py)|`((?:models|data)/\w+\.py)`", README)
    assert named
    for image, config, module in named:
        assert (root / (image or config or f"imp_jax/{module}")).exists()
