from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashu_compile.bundle import images
from flashu_compile.bundle.areas import fitted
from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.images import engine_pixels, read_picture, save_picture, to_picture
from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.bundle.profiles import known_ranges
from flashu_compile.bundle.settings import Template, UnderstandingSettings
from flashu_compile.errors import BundleError, InputError, NotFiniteError, PathError
from flashu_compile.models.showo2.prompts import picture_rules

SOURCE = Source("The decoder", "float16")


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


class TestPixels:
    def test_picture_of_the_right_size_is_only_scaled(self) -> None:
        array = noise(8, 8)
        pixels = engine_pixels(array, picture_rules(8))
        assert pixels.shape == (1, 3, 8, 8)
        assert pixels.dtype == np.float32
        assert pixels.flags.c_contiguous
        np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), array / 127.5 - 1, atol=1e-6)

    @pytest.mark.parametrize(("width", "height"), [(61, 40), (40, 61), (33, 32), (32, 33), (16, 90), (8, 8)])
    def test_resize_and_crop_are_torchvisions(self, width: int, height: int) -> None:
        """The published scripts' Resize(32, BICUBIC), CenterCrop(32): sizes by int(), offsets by round()."""
        picture = Image.fromarray(noise(height, width))
        if width <= height:
            resized = picture.resize((32, int(32 * height / width)), Image.Resampling.BICUBIC)
        else:
            resized = picture.resize((int(32 * width / height), 32), Image.Resampling.BICUBIC)
        left, top = round((resized.width - 32) / 2.0), round((resized.height - 32) / 2.0)
        expected = np.asarray(resized)[top : top + 32, left : left + 32]
        np.testing.assert_allclose(
            engine_pixels(picture, picture_rules(32))[0].transpose(1, 2, 0),
            (expected / 255 - 0.5) / 0.5,
            atol=1e-6,
        )

    def test_pixels_out_are_clamped_and_truncated(self) -> None:
        row = np.array([-9, -1, -0.999, 0, 0.5, 0.9999, 1, 9], np.float32)
        picture = to_picture(np.broadcast_to(row, (3, 2, 8)), SOURCE)
        assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 0, 127, 191, 254, 255, 255]
        assert picture.size == (8, 2)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_pixels_that_are_no_numbers(self, value: float) -> None:
        pixels = np.zeros((3, 2, 8), np.float16)
        pixels[1, 1, 3] = value
        with pytest.raises(
            NotFiniteError, match=r"The decoder, computing in float16, gave pixels .* float32"
        ):
            to_picture(pixels, SOURCE)

    def test_pictures_survive_the_way_out_and_in(self) -> None:
        array = noise(8, 8)
        back = np.asarray(to_picture(engine_pixels(array, picture_rules(8))[0], SOURCE)).astype(int)
        assert np.abs(back - array).max() <= 1

    @pytest.mark.parametrize("path", ["x" * 5000, "a/" * 2500, "nul\0.png", "\ud800.png", b"x.png", 5, None])
    def test_paths_that_are_none(self, path: object) -> None:
        with pytest.raises((InputError, PathError)):
            read_picture(path)  # type: ignore[arg-type]

    def test_far_too_elongated(self) -> None:
        with pytest.raises(InputError, match="too elongated"):
            engine_pixels(np.zeros((1, 400_000, 3), np.uint8), picture_rules(32))


class TestModes:
    def test_alpha_is_laid_on_white(self) -> None:
        array = np.zeros((2, 2, 4), np.uint8)
        array[0, :, 3] = 255
        assert np.asarray(read_picture(array))[:, 0, 0].tolist() == [0, 255]
        grey = Image.new("LA", (1, 1), (0, 0))
        assert read_picture(grey).getpixel((0, 0)) == (255, 255, 255)

    def test_palette_with_a_transparent_colour(self, tmp_path: Path) -> None:
        picture = Image.new("P", (2, 1))
        picture.putpalette([10, 20, 30, 40, 50, 60])
        picture.putpixel((1, 0), 1)
        picture.save(tmp_path / "p.png", transparency=0)
        assert [read_picture(tmp_path / "p.png").getpixel((x, 0)) for x in (0, 1)] == [
            (255,) * 3,
            (40, 50, 60),
        ]

    def test_orientation_is_applied(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees to see it upright
        Image.fromarray(noise(4, 9)).save(tmp_path / "turned.jpg", exif=exif, quality=95)
        assert read_picture(tmp_path / "turned.jpg").size == (4, 9)

    def test_sixteen_bits_are_scaled_not_clipped(self, tmp_path: Path) -> None:
        deep = np.array([[0, 257 * 100, 65535]], np.uint16)
        Image.fromarray(deep).save(tmp_path / "deep.png")
        assert np.asarray(read_picture(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 100, 255]

    @pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "RGBA", "RGBX", "PA"])
    def test_other_modes_become_rgb(self, mode: str) -> None:
        assert read_picture(Image.new(mode, (3, 2))).mode == "RGB"

    @pytest.mark.parametrize("mode", ["F", "I"])
    def test_modes_without_a_range_are_refused(self, mode: str) -> None:
        with pytest.raises(InputError, match=f"mode {mode}, whose range of values is unknown"):
            read_picture(Image.new(mode, (3, 2)))

    def test_animations_give_their_first_frame(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
        frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
        assert read_picture(tmp_path / "two.gif").getpixel((0, 0)) == (255, 0, 0)

    def test_the_given_picture_is_left_alone(self) -> None:
        picture = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
        read_picture(picture)
        assert picture.mode == "RGBA"


class TestRefusals:
    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((2, 2, 3), np.float32),
            np.zeros((2, 2, 2), np.uint8),
            np.zeros((1, 2, 2, 3), np.uint8),
            np.zeros((0, 2, 3), np.uint8),
            np.zeros((2, 2, 3), np.int64),
        ],
    )
    def test_arrays(self, array: np.ndarray) -> None:
        with pytest.raises(InputError, match=r"must be uint8 .* of shape \[height, width, 3\], not"):
            read_picture(array)

    def test_other_objects(self) -> None:
        with pytest.raises(InputError, match="not bytes"):
            read_picture(b"GIF89a")  # type: ignore[arg-type]

    def test_absent_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            read_picture(tmp_path / "no.png")
        with pytest.raises(InputError, match="is not a file"):
            read_picture(tmp_path)

    def test_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_text("hello")
        with pytest.raises(InputError, match="not a picture in one of the formats PNG"):
            read_picture(tmp_path / "a.png")

    def test_postscript_is_never_interpreted(self, tmp_path: Path) -> None:
        Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
        with pytest.raises(InputError, match="not a picture in one of the formats"):
            read_picture(tmp_path / "a.eps")

    def test_unreadable_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        Image.new("RGB", (4, 4)).save(path)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user reads everything")
        with pytest.raises(InputError, match="cannot be read"):
            read_picture(path)

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tiff", "webp", "ppm"])
    def test_damaged_files_raise_nothing_else(self, tmp_path: Path, kind: str) -> None:
        """Every prefix of a file and random damage: a picture or an `InputError`."""
        whole, path = tmp_path / f"whole.{kind}", tmp_path / f"part.{kind}"
        Image.fromarray(noise(24, 24)).save(whole)
        data = whole.read_bytes()
        random = np.random.default_rng(1)
        broken = [data[:length] for length in range(0, len(data), max(1, len(data) // 40))]
        for _ in range(60):
            changed = bytearray(data)
            for position in random.integers(0, len(data), 3):
                changed[position] = int(random.integers(256))
            broken.append(bytes(changed))
        for content in broken:
            path.write_bytes(content)
            with contextlib.suppress(InputError):
                assert read_picture(path).mode == "RGB"

    def test_truncated(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        Image.fromarray(noise(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(InputError, match="cannot be read"):
            read_picture(path)

    def test_bombs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Image.new("1", (9_000, 9_000)).save(tmp_path / "big.png")
        with pytest.raises(InputError, match="the limit is 64,000,000 pixels"):
            read_picture(tmp_path / "big.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
        with pytest.raises(InputError, match="decompression bomb"):
            read_picture(tmp_path / "big.png")


class TestSaving:
    @pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])
    def test_formats(self, tmp_path: Path, suffix: str) -> None:
        save_picture(Image.fromarray(noise(8, 8)), tmp_path / f"a{suffix}")
        assert read_picture(tmp_path / f"a{suffix}").size == (8, 8)

    @pytest.mark.parametrize("name", ["a", "a.gif", "a.png.exe", "a."])
    def test_other_names(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError, match=r"must end in \.png"):
            save_picture(Image.new("RGB", (2, 2)), tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    def test_places_where_nothing_can_be_saved(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            save_picture(Image.new("RGB", (2, 2)), tmp_path / "no" / "a.png")
        (tmp_path / "a.png").mkdir()
        with pytest.raises(InputError, match="is a folder"):
            save_picture(Image.new("RGB", (2, 2)), tmp_path / "a.png")

    def test_a_failed_save_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.png"
        path.write_text("old")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(images.os, "replace", full)
        with pytest.raises(InputError, match="No space left"):
            save_picture(Image.new("RGB", (2, 2)), path)
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

    def test_permissions_are_the_users(self, tmp_path: Path) -> None:
        save_picture(Image.new("RGB", (2, 2)), tmp_path / "a.png")
        (tmp_path / "b").touch()
        modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.png", "b")}
        assert len(modes) == 1


class TestPicturesOfAnySize:
    rules = PictureRules(16, 16, (PictureStep("area", 8, area=(256, 4096)),), cell=8)

    def test_proportions_are_kept(self) -> None:
        picture = Image.fromarray(noise(31, 90))
        pixels = engine_pixels(picture, self.rules)
        assert pixels.shape == (1, 3, 32, 88)
        expected = np.asarray(picture.resize((88, 32), Image.Resampling.BICUBIC)) / 255
        np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), expected, atol=1e-6)
        assert self.rules.cells(*pixels.shape[2:]) == (4, 11)

    def test_what_is_too_thin_is_refused(self) -> None:
        with pytest.raises(InputError, match="no side may be more than 200 times the other"):
            engine_pixels(noise(1, 201), self.rules)
        with pytest.raises(InputError, match="sides are not two cells of 8 pixels or more; crop it"):
            engine_pixels(noise(1, 100), self.rules)

    @pytest.mark.parametrize(
        "changes", [{"height": 20}, {"width": 8}, {"steps": ()}, {"steps": (PictureStep("exact", 16, 16),)}]
    )
    def test_rules_that_make_no_whole_cells_are_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(BundleError, match="do not become whole cells"):
            dataclasses.replace(self.rules, **changes)

    def test_ranges_of_engines_hold_pictures_up_to_four_times_as_long_as_wide(self) -> None:
        template = Template((1, 2), after=(3,), picture=2, size=1, size_text="{height}*{width}")
        asked = UnderstandingSettings(template, (3,), 100, 50, pictures=self.rules, most_rows=700)
        known = known_ranges(None, asked, None, 702)
        for width, height in ((1, 4), (4, 1), (700, 2800), (64, 64), (5, 5), (2000, 2000)):
            columns, rows = (side // 8 for side in fitted(width, height, 8, 256, 4096))
            assert rows <= known["height"].max
            assert columns <= known["width"].max
        # Engines take memory for both at their largest: of one picture four times as large as any.
        assert known["height"].max * known["width"].max <= 4.2 * 700
        assert known["context"].max >= 700 + 2
        assert known["capacity"].max >= 702 + 100 + 50
        assert known["height"].opt == known["width"].opt == 2

    def test_settings_say_how_many_rows_there_may_be(self) -> None:
        template = Template((1,), picture=1)
        with pytest.raises(BundleError, match="how many rows its pictures of any size take"):
            UnderstandingSettings(template, (3,), 100, 50, pictures=self.rules)
        sized = dataclasses.replace(template, size=0, size_text="{width}")
        with pytest.raises(BundleError, match="tells a size in cells, which its pictures do not have"):
            UnderstandingSettings(sized, (3,), 100, 50, pictures=picture_rules(8))
        with pytest.raises(BundleError, match="tells a picture's size where no picture follows"):
            Template((1,), size=0, size_text="{width}")
