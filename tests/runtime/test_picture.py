"""PNG files appear whole or not at all."""

import pytest
from PIL import Image

from fdfo_engine.runtime.picture import save_png


def test_a_write_that_breaks_off_leaves_the_picture_before(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.png"
    save_png(Image.new("RGB", (4, 4), "red"), path, {"prompt": "a red square"})
    first = path.read_bytes()
    picture = Image.new("RGB", (64, 64), "blue")

    def breaks_off(file, **_):
        file.write_bytes(b"\x89PNG half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture, "save", breaks_off)
    with pytest.raises(OSError, match="No space left"):
        save_png(picture, path)
    assert path.read_bytes() == first
    assert list(path.parent.glob("*.png")) == [path]
    with Image.open(path) as image:
        assert (image.size, image.text) == ((4, 4), {"prompt": "a red square"})
