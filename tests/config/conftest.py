import pytest
import yaml

from fdfo_engine.config import ConfigError, load_config

MINIMAL = """\
run: {dir: runs/x}
model: {id: some/model}
prompts: {source: prompts.txt}
rewards: [{name: brightness, weight: 1.0}]
"""


@pytest.fixture
def load(tmp_path):
    """Loads a text, bytes or tree as a config; a tree is laid over a minimal config, section by section."""

    def load_it(given="", *overrides):
        file = tmp_path / "c.yaml"
        if isinstance(given, dict):
            given = yaml.safe_dump(yaml.safe_load(MINIMAL) | given)
        file.write_bytes(given if isinstance(given, bytes) else (given or MINIMAL).encode())
        return load_config(file, overrides)

    return load_it


@pytest.fixture
def complaint(load, tmp_path):
    """The message of the ConfigError that loading raises, without the temporary folder."""

    def complain(given="", *overrides):
        with pytest.raises(ConfigError) as caught:
            load(given, *overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return complain
