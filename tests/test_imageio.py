"""Images of every kind: read, as a tensor, written as they were; equal to what the datasets read; limits and faults."""

import dataclasses
import functools
import io
import os
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
import torch
from basicsr.utils import imfrombytes, img2tensor, tensor2img
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin

from ucdir_plugin.utils import image_reading, image_writing
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_reading import Photo, decode_image, image_size, list_images, read_photo, to_tensor
from ucdir_plugin.utils.image_writing import check_output, encode_result

LIMIT = 10**8
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PROFILES = {colours: SRGB[:16] + colours + SRGB[20:] for colours in (b"RGB ", b"GRAY", b"CMYK")}


def noise(height=20, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 4)).astype(np.uint8)


def smooth(height=20, width=24):
    """(H, W, 4) uint8, such that JPEG keeps it nearly; no orientation of it equals another."""
    y, x = np.mgrid[: max(height, 2), : max(width, 2)][:, :height, :width]
    planes = (
        150 * x / width + 100 * y / height,
        250 * y / height,
        120 * (x / width + (y / height) ** 2),
        200 * y / height + 50 * x / width,
    )
    return np.stack(planes, 2).astype(np.uint8)


def wide(image):
    """16 bits, whose lower 8 differ from the upper 8."""
    return image.astype(np.uint16) * 256 + image[::-1, ::-1]


def unit(image):
    return wide(image).astype(np.float32) / 65535


def rgb(image):
    return np.ascontiguousarray(image[..., :3])


def gray(image):
    return np.ascontiguousarray(image[..., 0])


def alpha(image):
    return np.ascontiguousarray(image[..., 3])


def gray_alpha(image):
    return np.ascontiguousarray(image[..., [0, 3]])


def bit(image):
    return (gray(image) > 127) * np.uint8(255)


def cmyk(image):
    return Image.frombytes("CMYK", image.shape[1::-1], image.tobytes())


def transparent_level(plane):
    """The alpha of a gray image whose first pixel's level is transparent."""
    return np.where(plane == plane[0, 0], 0, np.iinfo(plane.dtype).max).astype(plane.dtype)


def saved(image, form, **options):
    """A file's content by Pillow, from RGB order or a Pillow image."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def encoded(image, extension=".png"):
    """A file's content by OpenCV, from RGB order."""
    return cv2.imencode(extension, image if image.ndim == 2 else image[..., [2, 1, 0, 3][: image.shape[2]]])[
        1
    ].tobytes()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def written_png(rows, width, depth, colour_type, before=b"", behind=b""):
    """A PNG written by hand: ``rows`` as bytes; chunks before and behind the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(row) for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + before + body + behind + chunk(b"IEND", b"")


def written_png16(image, colour_type, before=b""):
    rows = [row.astype(">u2").tobytes() for row in image]
    return written_png(rows, image.shape[1], 16, colour_type, before)


def png_2_bit(image):
    """Gray of 2 bits, whose first pixel's level is transparent, and that gray in 8 bits."""
    levels = gray(image) >> 6
    padded = np.pad(levels, ((0, 0), (0, -levels.shape[1] % 4))).reshape(len(levels), -1, 4)
    rows = (padded @ np.array([64, 16, 4, 1])).astype(np.uint8)
    key = chunk(b"tRNS", struct.pack(">H", levels[0, 0]))
    return written_png(rows, levels.shape[1], 2, 0, key), levels * np.uint8(85)


def palette_png(image, **options):
    """(content, colours, indices)"""
    quantized = Image.fromarray(rgb(image)).quantize(16)
    return saved(quantized, "PNG", **options), np.asarray(quantized.convert("RGB")), np.asarray(quantized)


def palette_with_alpha(image):
    opacity = bytes(range(0, 240, 15))
    content, colours, index = palette_png(image, transparency=opacity)
    return content, colours, np.frombuffer(opacity, np.uint8)[index]


def bmp_with_alpha(image):
    height, width = image.shape[:2]
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(64)
    header = struct.pack("<IiiHHIIiiII", 124, width, -height, 1, 32, 3, image.nbytes, 2835, 2835, 0, 0) + masks
    body = image[..., [2, 1, 0, 3]].tobytes()
    return struct.pack("<2sIHHI", b"BM", 14 + len(header) + len(body), 0, 0, 14 + len(header)) + header + body


def tiff(image, photometric, **tags):
    """An uncompressed TIFF written by hand; ``tags``: t338=(2,) and the like."""
    samples = 1 if image.ndim == 2 else image.shape[2]
    fields = {256: (image.shape[1],), 257: (len(image),), 258: (8 * image.itemsize,) * samples, 259: (1,)}
    fields.update({262: (photometric,), 273: (8,), 277: (samples,), 278: (len(image),), 279: (image.nbytes,)})
    fields.update({339: ({"u": 1, "i": 2, "f": 3}[image.dtype.kind],) * samples})
    fields.update({int(name[1:]): value for name, value in tags.items()})
    data = image.astype(image.dtype.newbyteorder("<")).tobytes() + b"\0" * (image.nbytes % 2)
    entries = b""
    for tag, values in sorted(fields.items()):
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            data, packed = data + packed, struct.pack("<I", 8 + len(data))
        entries += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(fields)) + entries + bytes(4)


VISIBLE = np.array([0, 0, 0, 1], np.uint8)  # WebP drops the colours of pixels without alpha

# name: (H, W, 4) uint8 -> (content, RGB or gray pixels, alpha); the keyword arguments are for Pillow's save
KINDS = {
    "PNG 1 bit": lambda i, **o: (saved(Image.fromarray(bit(i)).convert("1"), "PNG", **o), bit(i), None),
    "PNG 2 bits, a level transparent": lambda i: (*png_2_bit(i), transparent_level(png_2_bit(i)[1])),
    "PNG gray": lambda i, **o: (saved(gray(i), "PNG", **o), gray(i), None),
    "PNG gray, a level transparent": lambda i, **o: (
        saved(gray(i), "PNG", transparency=int(i[0, 0, 0]), **o), gray(i), transparent_level(gray(i))),
    "PNG gray and alpha": lambda i, **o: (saved(gray_alpha(i), "PNG", **o), gray(i), alpha(i)),
    "PNG RGB": lambda i, **o: (saved(rgb(i), "PNG", **o), rgb(i), None),
    "PNG RGB, a colour transparent": lambda i, **o: (
        saved(rgb(i), "PNG", transparency=tuple(map(int, i[0, 0, :3])), **o),
        rgb(i), np.where((rgb(i) == i[0, 0, :3]).all(2), 0, 255).astype(np.uint8)),
    "PNG RGBA": lambda i, **o: (saved(i, "PNG", **o), rgb(i), alpha(i)),
    "PNG palette": lambda i, **o: (*palette_png(i, **o)[:2], None),
    "PNG palette and alpha": lambda i: palette_with_alpha(i),
    "PNG 16 bits gray": lambda i: (encoded(gray(wide(i))), gray(wide(i)), None),
    "PNG 16 bits gray, a level transparent": lambda i: (
        written_png16(gray(wide(i)), 0, chunk(b"tRNS", struct.pack(">H", wide(i)[0, 0, 0]))),
        gray(wide(i)), transparent_level(gray(wide(i)))),
    "PNG 16 bits gray and alpha": lambda i: (written_png16(gray_alpha(wide(i)), 4), gray(wide(i)), alpha(wide(i))),
    "PNG 16 bits RGB": lambda i: (encoded(rgb(wide(i))), rgb(wide(i)), None),
    "PNG 16 bits RGB, a colour transparent": lambda i: (
        written_png16(rgb(wide(i)), 2, chunk(b"tRNS", wide(i)[0, 0, :3].astype(">u2").tobytes())),
        rgb(wide(i)), np.where((rgb(wide(i)) == wide(i)[0, 0, :3]).all(2), 0, 65535).astype(np.uint16)),
    "PNG 16 bits RGBA": lambda i: (encoded(wide(i)), rgb(wide(i)), alpha(wide(i))),
    "TIFF 1 bit": lambda i, **o: (saved(Image.fromarray(bit(i)).convert("1"), "TIFF", **o), bit(i), None),
    "TIFF gray": lambda i, **o: (saved(gray(i), "TIFF", **o), gray(i), None),
    "TIFF gray and alpha": lambda i, **o: (saved(gray_alpha(i), "TIFF", **o), gray(i), alpha(i)),
    "TIFF RGB": lambda i, **o: (saved(rgb(i), "TIFF", **o), rgb(i), None),
    "TIFF RGB, LZW": lambda i: (saved(rgb(i), "TIFF", compression="tiff_lzw"), rgb(i), None),
    "TIFF RGBA": lambda i, **o: (saved(i, "TIFF", **o), rgb(i), alpha(i)),
    "TIFF 16 bits gray": lambda i, **o: (saved(gray(wide(i)), "TIFF", **o), gray(wide(i)), None),
    "TIFF 16 bits RGB": lambda i: (encoded(rgb(wide(i)), ".tif"), rgb(wide(i)), None),
    "TIFF 16 bits RGBA": lambda i: (encoded(wide(i), ".tif"), rgb(wide(i)), alpha(wide(i))),
    "TIFF float gray": lambda i, **o: (saved(gray(unit(i)), "TIFF", **o), gray(unit(i)), None),
    "TIFF float RGB": lambda i: (tiff(rgb(unit(i)), 2), rgb(unit(i)), None),
    "TIFF float RGBA": lambda i: (tiff(unit(i), 2, t338=(2,)), rgb(unit(i)), alpha(unit(i))),
    "BMP gray": lambda i: (saved(gray(i), "BMP"), gray(i), None),
    "BMP RGB": lambda i: (saved(rgb(i), "BMP"), rgb(i), None),
    "BMP RGBA": lambda i: (bmp_with_alpha(i), rgb(i), alpha(i)),
    "WebP RGB": lambda i, **o: (saved(rgb(i), "WEBP", lossless=True, **o), rgb(i), None),
    "WebP RGBA": lambda i, **o: (saved(i | VISIBLE, "WEBP", lossless=True, **o), rgb(i), alpha(i | VISIBLE)),
    "PPM": lambda i: (saved(rgb(i), "PPM"), rgb(i), None),
    "PGM": lambda i: (saved(gray(i), "PPM"), gray(i), None),
    "PGM 16 bits": lambda i: (encoded(gray(wide(i)), ".pgm"), gray(wide(i)), None),
}  # fmt: skip
LOSSY = {  # to a level or a few
    "TIFF CMYK": lambda i, **o: (saved(cmyk(i), "TIFF", **o), np.asarray(cmyk(i).convert("RGB")), None),
    "JPEG gray": lambda i, **o: (saved(gray(i), "JPEG", quality=100, **o), gray(i), None),
    "JPEG RGB": lambda i, **o: (saved(rgb(i), "JPEG", quality=100, subsampling=0, **o), rgb(i), None),
    "JPEG CMYK": lambda i, **o: (
        saved(cmyk(i), "JPEG", quality=100, subsampling=0, **o), np.asarray(cmyk(i).convert("RGB")), None),
}  # fmt: skip


def read(folder, content, name="image.bin"):
    (folder / name).write_bytes(content)
    return read_photo(str(folder / name), LIMIT)


def dataset_tensor(content):
    return img2tensor(decode_image(content, "x"), bgr2rgb=True, float32=True).unsqueeze(0)


def colours(pixels):
    """(H, W, 3) of gray or colours."""
    return np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels


def assert_same_content(photo, expected):
    np.testing.assert_array_equal(photo.pixels, expected.pixels, strict=True)
    assert (photo.alpha is None) == (expected.alpha is None)
    if photo.alpha is not None:
        np.testing.assert_array_equal(photo.alpha, expected.alpha, strict=True)
    assert photo.gray == expected.gray


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (17, 1), (20, 24), (31, 23)])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_as_the_datasets_do_and_written_as_it_was(tmp_path, name, size):
    content, pixels, transparency = KINDS[name](noise(*size))
    photo = read(tmp_path, content)
    assert_same_content(photo, Photo(colours(pixels), transparency, pixels.ndim == 2))
    assert photo.pixels.flags.c_contiguous
    assert image_size(str(tmp_path / "image.bin")) == size
    tensor = to_tensor(photo)
    assert tensor.is_contiguous()
    if not (name.startswith("TIFF") and transparency is not None):  # see test_colours_under_alpha_in_a_tiff
        torch.testing.assert_close(tensor, dataset_tensor(content), rtol=0, atol=0)
    again = read(tmp_path, encode_result(tensor[0], photo, ".png"))
    if "float" in name:
        photo = Photo(*(x if x is None else (x * 65535).round().astype(np.uint16) for x in (pixels, transparency)))
        photo = Photo(colours(photo.pixels), photo.alpha, pixels.ndim == 2)
    assert_same_content(again, photo)


@pytest.mark.parametrize("name", LOSSY)
def test_kinds_that_are_nearly_kept(tmp_path, name):
    content, pixels, _ = LOSSY[name](smooth(31, 37))
    photo = read(tmp_path, content)
    assert photo.alpha is None and photo.pixels.dtype == np.uint8
    assert photo.gray == (pixels.ndim == 2)
    assert np.abs(photo.pixels.astype(int) - colours(pixels)).max() <= 4
    torch.testing.assert_close(to_tensor(photo), dataset_tensor(content), rtol=0, atol=0)
    assert_same_content(read(tmp_path, encode_result(to_tensor(photo)[0], photo, ".png")), photo)
    again = read(tmp_path, encode_result(to_tensor(photo)[0], photo, ".jpg"))
    assert again.gray == photo.gray
    assert np.abs(again.pixels.astype(int) - photo.pixels).mean() < 2


def test_eight_bits_equal_basicsr():
    for extension in (".png", ".jpg", ".bmp", ".tif", ".webp"):
        for image in (rgb(noise()), gray(noise())):
            content = encoded(image, extension)
            np.testing.assert_array_equal(decode_image(content, "x"), imfrombytes(content, float32=True), strict=True)


def test_every_level_becomes_the_datasets_number():
    for levels in (np.arange(256, dtype=np.uint8), np.arange(65536, dtype=np.uint16)):
        image = np.repeat(levels.reshape(16, -1, 1), 3, 2)
        expected = image.astype(np.float32) / np.float32(np.iinfo(levels.dtype).max)
        np.testing.assert_array_equal(decode_image(encoded(image), "x"), expected, strict=True)
        tensor = to_tensor(Photo(image))
        np.testing.assert_array_equal(tensor[0].permute(1, 2, 0), expected)
        like = Photo(image)
        again = cv2.imdecode(np.frombuffer(encode_result(tensor[0], like, ".png"), np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(again, image, strict=True)


def test_float_and_double_beyond_one():
    for dtype in (np.float32, np.float64):
        image = rgb(noise()).astype(dtype) / 200 - 0.1
        content = tiff(image, 2)
        try:
            decoded = decode_image(content, "x")
        except UserError:
            assert dtype == np.float64 and int(cv2.__version__.split(".")[0]) < 5  # which has no double in colour
            continue
        np.testing.assert_array_equal(decoded, image[..., ::-1].astype(np.float32).clip(0, 1), strict=True)


def test_colours_under_alpha_in_a_tiff(tmp_path):
    """OpenCV, and with it the datasets, multiplies 8-bit colours by alpha; a photo has the file's colours."""
    image = noise()
    content = saved(image, "TIFF")
    np.testing.assert_array_equal(read(tmp_path, content).pixels, rgb(image))
    assert not np.array_equal(decode_image(content, "x")[..., ::-1], rgb(image) / np.float32(255))
    image[..., 3] = 255
    content = saved(image, "TIFF")
    torch.testing.assert_close(to_tensor(read(tmp_path, content)), dataset_tensor(content), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- orientation
def exif(orientation, make="Camera & Co"):
    tags = Image.Exif()
    tags[0x010F] = make
    if orientation:
        tags[0x0112] = orientation
    tags[0x8769] = {0x9003: "2024:05:06 07:08:09", 0x927C: b"of the maker"}
    tags[0x8825] = {1: "N"}
    return tags.tobytes()


@functools.lru_cache(None)
def turned_files(orientation):
    """name: content of an upright-when-turned picture."""
    image, tags = smooth(24, 40), exif(orientation)
    late = chunk(b"eXIf", tags[6:])
    files = {
        "PNG": saved(rgb(image), "PNG", exif=tags),
        "PNG RGBA": saved(image, "PNG", exif=tags),
        "PNG LA": saved(gray_alpha(image), "PNG", exif=tags),
        "PNG late": written_png([row.tobytes() for row in rgb(image)], 40, 8, 2, behind=late),
        "PNG level": saved(gray(image), "PNG", exif=tags, transparency=int(image[0, -1, 0])),
        "JPEG": saved(rgb(image), "JPEG", exif=tags, quality=100, subsampling=0),
        "JPEG CMYK": saved(cmyk(image), "JPEG", exif=tags, quality=100, subsampling=0),
        "WebP": saved(rgb(image), "WEBP", exif=tags, lossless=True),
        "WebP RGBA": saved(image | VISIBLE, "WEBP", exif=tags, lossless=True),
    }
    for name, pixels in {"RGB": rgb(image), "L": gray(image), "RGBA": image, "LA": gray_alpha(image)}.items():
        files[f"TIFF {name}"] = saved(pixels, "TIFF", tiffinfo={0x0112: orientation})
    files["TIFF 16"] = saved(gray(wide(image)), "TIFF", tiffinfo={0x0112: orientation})
    files["TIFF float"] = saved(gray(unit(image)), "TIFF", tiffinfo={0x0112: orientation})
    return files


TURNS = {
    1: lambda i: i,
    2: lambda i: i[:, ::-1],
    3: lambda i: i[::-1, ::-1],
    4: lambda i: i[::-1],
    5: lambda i: i.swapaxes(0, 1),
    6: lambda i: np.rot90(i, -1),
    7: lambda i: np.rot90(i, 2).swapaxes(0, 1),
    8: lambda i: np.rot90(i),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("name", turned_files(1))
def test_every_orientation_is_turned_as_pillow_does(tmp_path, name, orientation):
    content = turned_files(orientation)[name]
    photo = read(tmp_path, content)
    assert image_size(str(tmp_path / "image.bin")) == photo.pixels.shape[:2]
    stored = read(tmp_path, turned_files(1)[name])
    np.testing.assert_array_equal(photo.pixels, TURNS[orientation](stored.pixels), strict=True)
    if stored.alpha is not None:
        np.testing.assert_array_equal(photo.alpha, TURNS[orientation](stored.alpha), strict=True)
    unturned = [o for o in TURNS if o != orientation and np.array_equal(photo.pixels, TURNS[o](stored.pixels))]
    assert not unturned  # the picture tells all orientations apart
    decoded = decode_image(content, "x")[..., ::-1]
    if name in ("TIFF RGBA",):  # see test_colours_under_alpha_in_a_tiff
        assert decoded.shape == photo.pixels.shape
    else:
        np.testing.assert_array_equal(decoded, to_tensor(photo)[0].permute(1, 2, 0).numpy(), strict=True)
    if name not in ("TIFF 16", "TIFF float"):
        image = Image.open(io.BytesIO(content))
        image.load()  # turns a TIFF, which ImageOps of old versions does not know
        image = image if name.startswith("TIFF") else ImageOps.exif_transpose(image)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - photo.pixels).max() <= 4 * name.startswith("JPEG")
        if photo.alpha is not None:
            np.testing.assert_array_equal(np.asarray(image.convert("RGBA"))[..., 3], photo.alpha)


def test_unknown_orientations_and_damaged_exif_turn_nothing(tmp_path):
    image = rgb(smooth(24, 40))
    for tags in (exif(9), exif(0), exif(6)[:12], exif(6)[:20], b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        for form, options in (("PNG", {}), ("WEBP", {"lossless": True})):
            photo = read(tmp_path, saved(image, form, exif=tags, **options))
            np.testing.assert_array_equal(photo.pixels, image)
    mention = chunk(b"tEXt", b"about\0" + chunk(b"eXIf", exif(6)[6:])[:-4] + b"none")  # no chunk: its checksum is wrong
    photo = read(tmp_path, written_png([row.tobytes() for row in image], 40, 8, 2, behind=mention))
    np.testing.assert_array_equal(photo.pixels, image)
    assert photo.exif is None


# -------------------------------------------------------------------------------------------------------- metadata
def metadata(content):
    """(make, date, maker note, hemisphere, orientation, ICC profile), as Pillow reads them."""
    with Image.open(io.BytesIO(content)) as image:
        tags = image.getexif()
        camera = tags.get_ifd(0x8769)
        date, note = camera.get(0x9003), camera.get(0x927C)
        return (
            tags.get(0x010F),
            date,
            note,
            tags.get_ifd(0x8825).get(1),
            tags.get(0x0112),
            image.info.get("icc_profile"),
        )


def takes_metadata(name):
    return not any(word in name for word in ("BMP", "PPM", "PGM", "palette and", "2 bits", "16 bits", "float R", "LZW"))


@pytest.mark.parametrize("name", [name for name in (*KINDS, *LOSSY) if takes_metadata(name)])
def test_exif_and_profile_are_kept(tmp_path, name):
    make = {**KINDS, **LOSSY}[name]
    colours = b"CMYK" if "CMYK" in name else b"GRAY" if make(noise())[1].ndim == 2 else b"RGB "
    content = make(smooth(), exif=exif(6), icc_profile=PROFILES[colours])[0]
    photo = read(tmp_path, content)
    assert photo.icc_profile == PROFILES[colours]
    kept = None if colours == b"CMYK" else PROFILES[colours]  # it became RGB
    upright = None if name.startswith("TIFF") else 1
    expected = ("Camera & Co", "2024:05:06 07:08:09", b"of the maker", "N", upright, kept)
    for extension in (".png", ".JPG") if photo.alpha is None and photo.pixels.dtype == np.uint8 else (".png",):
        result = encode_result(to_tensor(photo)[0], photo, extension)
        assert metadata(result) == expected
        again = read(tmp_path, result)
        assert (again.exif, again.icc_profile) == (photo.exif, kept)
        assert again.pixels.shape == (24, 20, 3) == photo.pixels.shape  # turned once, not twice


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("PNG 16")])
def test_metadata_of_16_bits(tmp_path, name):
    content, pixels, _ = KINDS[name](noise())
    profile = PROFILES[b"GRAY" if pixels.ndim == 2 else b"RGB "]
    chunks = chunk(b"iCCP", b"x\0\0" + zlib.compress(profile)) + chunk(b"eXIf", exif(8)[6:])
    content = content[:33] + chunks + content[33:]
    photo = read(tmp_path, content)
    np.testing.assert_array_equal(photo.pixels, np.rot90(colours(pixels)), strict=True)
    result = encode_result(to_tensor(photo)[0], photo, ".png")
    assert metadata(result) == ("Camera & Co", "2024:05:06 07:08:09", b"of the maker", "N", 1, profile)
    again = read(tmp_path, result)
    assert_same_content(again, photo)
    assert (again.exif, again.icc_profile) == (photo.exif, profile)


def test_exif_stays_as_it_was_but_for_orientation_and_thumbnail(tmp_path):
    for order in "<>":
        body = struct.pack(f"{order}HHHII", 2, 0x0112, 3, 1, 6 << 16 if order == ">" else 6)
        body += struct.pack(f"{order}HHII", 0x010F, 2, 4, int.from_bytes(b"abc\0", "little" if order == "<" else "big"))
        thumbnail = struct.pack(f"{order}HHHIII", 1, 0x0103, 3, 1, 6, 0) + b"left"
        head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
        tags = b"Exif\0\0" + head + body + struct.pack(f"{order}I", 8 + len(body) + 4) + thumbnail
        photo = read(tmp_path, saved(rgb(noise(20, 24)), "JPEG", exif=tags))
        assert photo.pixels.shape == (24, 20, 3)
        changed = [i for i, (a, b) in enumerate(zip(tags, photo.exif)) if a != b]
        assert len(photo.exif) == len(tags)
        assert changed == ([24, 40] if order == "<" else [25, 43])  # the orientation, the thumbnail's offset
        loaded = Image.Exif()
        loaded.load(photo.exif)
        assert dict(loaded) == {0x0112: 1, 0x010F: "abc"}


def test_files_without_metadata_get_none(tmp_path):
    for name in ("PNG RGB", "PNG 16 bits RGB"):
        photo = read(tmp_path, KINDS[name](noise())[0])
        assert photo.exif is None and photo.icc_profile is None
        assert metadata(encode_result(to_tensor(photo)[0], photo, ".png")) == (None,) * 6


# ---------------------------------------------------------------------------------------------------------- frames
def test_the_first_frame_is_read(tmp_path):
    first, second = Image.fromarray(rgb(noise(seed=1))), Image.fromarray(rgb(noise(seed=2)))
    for form, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        content = saved(first, form, save_all=True, append_images=[second], **options)
        assert Image.open(io.BytesIO(content)).n_frames == 2
        try:
            photo = read(tmp_path, content)
        except UserError as err:
            assert form == "WEBP" and "cannot be decoded" in str(err)  # OpenCV before 4.11 reads no animation
            continue
        np.testing.assert_array_equal(photo.pixels, np.asarray(first))
        torch.testing.assert_close(to_tensor(photo), dataset_tensor(content), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------- limits
def png_header(width, height):
    content = written_png([bytes(4)] * 2, 4, 8, 0)
    return content[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + content[33:]


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    contents = {name: KINDS[name](noise(20, 24))[0] for name in KINDS}
    contents.update({name: LOSSY[name](noise(20, 24))[0] for name in LOSSY})

    def decoded(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(image_reading.cv2, "imdecode", decoded)
    monkeypatch.setattr(Image.Image, "convert", decoded)
    for name, content in contents.items():
        path = tmp_path / f"{name}.bin"
        path.write_bytes(content)
        message = rf"^image .*{name}.bin has 24x20 = 480 pixels, more than the limit of 479; .*--max-pixels 480$"
        with pytest.raises(UserError, match=message):
            read_photo(str(path), 479)
    monkeypatch.undo()
    assert read_photo(str(path), 480).pixels.shape == (20, 24, 3)


def test_the_limit_counts_where_an_image_is_turned(tmp_path):
    (tmp_path / "a.jpg").write_bytes(saved(rgb(noise(20, 24)), "JPEG", exif=exif(6)))
    with pytest.raises(UserError, match="has 20x24 = 480 pixels"):
        read_photo(str(tmp_path / "a.jpg"), 100)


@pytest.mark.parametrize("limit", [None, 100, 10**9])
def test_pillows_limit_neither_stops_nor_changes(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = str(tmp_path / "image.bin")
    for name in ("PNG RGBA", "TIFF RGBA", "TIFF gray and alpha", "WebP RGB", "BMP RGB", "PPM"):
        photo = read(tmp_path, KINDS[name](noise())[0])
        assert limit == Image.MAX_IMAGE_PIXELS
        assert image_size(path) == (20, 24)
        assert limit == Image.MAX_IMAGE_PIXELS
        assert encode_result(to_tensor(photo)[0], photo, ".png")
    for content in (b"no image", png_header(4, 2)[:20], saved(noise(), "TIFF")[:300]):
        with pytest.raises(UserError):
            read(tmp_path, content)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_the_size_of_a_bomb_is_known_without_decoding(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_header(40000, 50000))
    with pytest.raises(UserError, match=r"bomb.png is larger than OpenCV reads: .*OPENCV_IO_MAX_IMAGE_PIXELS"):
        read_photo(str(tmp_path / "bomb.png"), 2**40)
    monkeypatch.setattr(image_reading.cv2, "imdecode", None)
    assert image_size(str(tmp_path / "bomb.png")) == (50000, 40000)
    with pytest.raises(UserError, match=r"has 40000x50000 = 2000000000 pixels, more than the limit of 1000000;"):
        read_photo(str(tmp_path / "bomb.png"), 10**6)


# ---------------------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("content", [b"", b"no image", encoded(rgb(noise()))[:60]])
def test_unreadable_images_are_named(tmp_path, content):
    with pytest.raises(UserError, match=r"image bad.png (is empty|cannot be decoded)"):
        decode_image(content, "bad.png")
    for function in (lambda path: read_photo(path, LIMIT), image_size):
        (tmp_path / "bad.png").write_bytes(content)
        if content[:4] == b"\x89PNG" and function is image_size:
            assert image_size(str(tmp_path / "bad.png")) == (20, 24)  # of which the header is left
            continue
        with pytest.raises(UserError, match=r"image .*bad.png (is empty \(0 bytes\)|cannot be decoded)"):
            function(str(tmp_path / "bad.png"))


def test_files_that_cannot_be_read_are_named(tmp_path):
    for function in (lambda path: read_photo(path, LIMIT), image_size):
        with pytest.raises(UserError, match=r"image .*none.png cannot be read: No such file"):
            function(str(tmp_path / "none.png"))
        with pytest.raises(UserError, match=r"image .* cannot be read: Is a directory"):
            function(str(tmp_path))


def test_a_cut_jpeg_is_refused_by_todays_opencv():
    content = saved(rgb(smooth(80, 90)), "JPEG")[:-20]
    if tuple(map(int, cv2.__version__.split(".")[:2])) >= (4, 11):
        with pytest.raises(UserError, match="x cannot be decoded"):
            decode_image(content, "x")
    else:
        assert decode_image(content, "x").shape == (80, 90, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_refused(tmp_path, channels, value):
    image = unit(noise())[..., :channels]
    image[3, 4, -1] = value
    content = tiff(image[..., 0] if channels == 1 else image, 1 if channels == 1 else 2)
    with pytest.raises(UserError, match=r"image .*image.bin holds NaN or infinite values"):
        read(tmp_path, content)


def test_signed_and_long_pixels_are_refused_not_clipped(tmp_path):
    for dtype in (np.int16, np.int32):
        content = saved(Image.fromarray(np.full((4, 5), 3, np.int32)), "TIFF")
        if dtype == np.int16:
            content = encoded(np.full((4, 5), -3, dtype), ".tiff")
        message = f"pixels of type {np.dtype(dtype).name}; 8 and 16 bits without sign and float are read"
        with pytest.raises(UserError, match=f"^image x has {message}"):
            decode_image(content, "x")
        with pytest.raises(UserError, match=f"^image .*image.bin has {message}"):
            read(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (tiff(gray_alpha(wide(noise())), 1, t338=(2,)), "gray and alpha at more than 8 bits"),
        (tiff(wide(noise()), 2, t338=(1,)), "colours multiplied by alpha at more than 8 bits"),
        (tiff(gray(wide(noise())), 0), "white as 0 at more than 8 bits"),
        (tiff(gray(wide(noise())), 1, t258=(12,)), "12 bits a channel"),
    ],
)
def test_tiffs_that_opencv_would_read_wrongly_are_refused(tmp_path, content, fault):
    with pytest.raises(UserError, match=f"image .*image.bin is a TIFF with {fault}, which is not read; save it as PNG"):
        read(tmp_path, content)
    assert image_size(str(tmp_path / "image.bin")) == (20, 24)


def test_tiffs_of_rarer_kinds(tmp_path):
    image = noise()
    image[..., 3] |= 1  # transparent colours have no number when they are multiplied
    associated = (image * (image[..., 3:] / 255)).round().astype(np.uint8)
    associated[..., 3] = image[..., 3]
    photo = read(tmp_path, tiff(associated, 2, t338=(1,)))
    np.testing.assert_array_equal(photo.alpha, image[..., 3])
    opaque = image[..., 3] > 200
    assert np.abs(photo.pixels.astype(int) - rgb(image))[opaque].max() <= 1
    padded = read(tmp_path, tiff(image, 2, t338=(0,)))  # a fourth channel that means nothing
    assert_same_content(padded, Photo(rgb(image)))
    assert_same_content(read(tmp_path, tiff(gray(image), 0)), Photo(colours(255 - gray(image)), None, True))


def test_alpha_that_opencv_does_not_find_is_refused(tmp_path):
    content = bytearray(saved(noise(), "WEBP", lossless=True, exif=exif(1)))
    assert content[12:16] == b"VP8X"
    content[20] &= ~16  # the header denies the alpha that the pixels have
    with pytest.raises(UserError, match="image.bin has alpha that OpenCV does not find; save it as PNG"):
        read(tmp_path, bytes(content))


def test_a_header_that_lies_about_the_size_is_refused(tmp_path, monkeypatch):
    read_header = image_reading.read_header
    monkeypatch.setattr(image_reading, "read_header", lambda file: dataclasses.replace(read_header(file), width=23))
    for name in ("PNG RGB", "TIFF RGBA"):
        with pytest.raises(UserError, match="image.bin cannot be decoded: it has another size than its header says"):
            read(tmp_path, KINDS[name](noise(20, 24))[0])


def test_other_kinds_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="cannot be decoded: it is damaged or no PNG, JPEG, TIFF, WebP, BMP or PPM"):
        read(tmp_path, saved(rgb(noise()), "GIF"))


# --------------------------------------------------------------------------------------------------------- tensors
def test_many_strips_make_one_image(tmp_path):
    """More pixels than a strip has, and a remainder."""
    image = np.resize(noise(53, 61), (1031, 1033, 4))
    assert len(list(image_reading.strips(1031, 1033))) == 2
    for pixels, transparency, is_gray in ((rgb(image), None, False), (rgb(wide(image)), alpha(wide(image)), False)):
        content = encoded(pixels if transparency is None else wide(image))
        photo = read(tmp_path, content)
        assert_same_content(photo, Photo(pixels, transparency, is_gray))
        tensor = to_tensor(photo)
        torch.testing.assert_close(tensor, dataset_tensor(content), rtol=0, atol=0)
        assert_same_content(read(tmp_path, encode_result(tensor[0], photo, ".png")), photo)


def test_a_tensor_in_memory_of_the_callers():
    photo = Photo(rgb(noise()))
    memory = torch.full((3 * 20 * 24,), -1.0)
    asked = []

    def empty(shape, *, dtype, device):
        asked.append((tuple(shape), dtype, torch.device(device).type))
        return memory.view(shape)

    tensor = to_tensor(photo, empty=empty)
    assert asked == [((1, 3, 20, 24), torch.float32, "cpu")]
    assert tensor.data_ptr() == memory.data_ptr()
    torch.testing.assert_close(tensor, to_tensor(photo), rtol=0, atol=0)


def test_no_second_image_is_held(tmp_path):
    """Of numpy's memory, where the image and all temporaries are: torch's result is not counted."""
    (tmp_path / "a.png").write_bytes(encoded(np.zeros((4096, 4096, 3), np.uint8)))
    size = 4096 * 4096 * 3
    tracemalloc.start()
    try:
        photo = read_photo(str(tmp_path / "a.png"), LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 1.3 * size
        tracemalloc.reset_peak()
        tensor = to_tensor(photo)
        assert tracemalloc.get_traced_memory()[1] < 1.8 * size  # as float it would be 5
        tracemalloc.reset_peak()
        image_writing._quantized(tensor[0], photo, 1)
        assert tracemalloc.get_traced_memory()[1] < 2.8 * size
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------------------- results
def decoded(content):
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_eight_bits_are_rounded_as_basicsr_does(dtype):
    image = torch.rand(3, 40, 50) * 1.4 - 0.2
    image[0, :8, :32] = (torch.arange(256).view(8, 32) + 0.5) / 255  # where rounding can go either way
    image = image.to(dtype)
    like = Photo(np.zeros((40, 50, 3), np.uint8))
    np.testing.assert_array_equal(decoded(encode_result(image, like, ".png")), tensor2img([image]), strict=True)


def test_sixteen_bits_are_rounded_to_the_nearest():
    image = torch.rand(3, 40, 50) * 1.4 - 0.2
    for photo in (Photo(np.zeros((40, 50, 3), np.uint16)), Photo(np.zeros((40, 50, 3), np.float32))):
        expected = (image.clamp(0, 1) * 65535).round().permute(1, 2, 0).numpy()[..., ::-1].astype(np.uint16)
        np.testing.assert_array_equal(decoded(encode_result(image, photo, ".png")), expected, strict=True)


def test_gray_is_opencvs_luma():
    image = torch.rand(3, 40, 50)
    luma = cv2.cvtColor(image.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY)
    for dtype in (np.uint8, np.uint16):
        like = Photo(np.zeros((40, 50, 3), dtype), gray=True)
        expected = (luma * np.float32(np.iinfo(dtype).max)).round().astype(dtype)
        np.testing.assert_array_equal(decoded(encode_result(image, like, ".png")), expected, strict=True)


@pytest.mark.parametrize("is_gray", [False, True])
@pytest.mark.parametrize("convert", [lambda i: i, wide, unit])
def test_alpha_grows_with_the_image(tmp_path, convert, is_gray):
    photo = Photo(convert(rgb(noise(7, 9))), convert(noise(7, 9))[..., 3].copy(), is_gray)
    result = read(tmp_path, encode_result(torch.rand(3, 14, 18), photo, ".png"))
    expected = cv2.resize(photo.alpha, (18, 14), interpolation=cv2.INTER_LINEAR)
    if photo.alpha.dtype == np.float32:
        expected = (expected * 65535).round().astype(np.uint16)
    np.testing.assert_array_equal(result.alpha, expected, strict=True)
    assert result.gray == is_gray


@pytest.mark.parametrize(
    "shape", [(3, 20, 23), (3, 21, 24), (3, 40, 24), (1, 20, 24), (4, 20, 24), (20, 24), (1, 3, 20, 24), (3, 10, 12)]
)
def test_results_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="no multiple of the photo's"):
        encode_result(torch.zeros(shape), Photo(np.zeros((20, 24, 3), np.uint8)), ".png")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_results_that_are_no_numbers_are_refused(value):
    image = torch.zeros(3, 20, 24)
    image[1, 2, 3] = value
    with pytest.raises(UserError, match="the result holds NaN or infinite values"):
        encode_result(image, Photo(np.zeros((20, 24, 3), np.uint8)), ".png")


def test_jpegs_are_written_at_95_without_subsampling(tmp_path):
    photo = Photo(rgb(smooth(40, 50)))
    content = encode_result(to_tensor(photo)[0], photo, ".jpeg")
    expected = saved(photo.pixels, "JPEG", quality=95, subsampling=0)
    with Image.open(io.BytesIO(content)) as image, Image.open(io.BytesIO(expected)) as same:
        assert image.format == "JPEG" and image.quantization == same.quantization
        assert JpegImagePlugin.get_sampling(image) == 0
    assert content == expected


def test_outputs_are_refused_before_the_work():
    pixels = np.zeros((20, 24, 3), np.uint8)
    for extension in (".png", ".PNG", ".jpg", ".JPEG"):
        check_output(extension)
        check_output(extension, Photo(pixels, gray=True, exif=exif(1), icc_profile=SRGB), scale=4)
    for extension in (".gif", ".tif", ".webp", "", "png"):
        with pytest.raises(UserError, match=r"results cannot be written as .*: use .png .*or .jpg"):
            check_output(extension)
    for excess, photo, scale in (
        ("16 bits", Photo(pixels.astype(np.uint16)), 1),
        ("float pixels", Photo(pixels.astype(np.float32)), 1),
        ("alpha", Photo(pixels, pixels[..., 0]), 1),
        ("16 bits and alpha", Photo(pixels.astype(np.uint16), pixels[..., 0]), 1),
        ("65534 bytes of EXIF", Photo(pixels, exif=bytes(65534)), 1),
        ("more than 65500 pixels a side", Photo(np.zeros((1, 65501, 3), np.uint8)), 1),
        ("more than 65500 pixels a side", Photo(np.zeros((32751, 1, 3), np.uint8)), 2),
    ):
        check_output(".png", photo, scale)
        message = f"a JPEG cannot hold {excess}, which the image has: write .png"
        with pytest.raises(UserError, match=message):
            check_output(".jpg", photo, scale)
        with pytest.raises(UserError, match=message):
            height, width = photo.pixels.shape[:2]
            encode_result(torch.zeros(3, height * scale, width * scale), photo, ".jpg")
    with pytest.raises(UserError, match="results cannot be written as .gif"):
        encode_result(torch.zeros(3, 20, 24), Photo(pixels), ".gif")


def test_the_largest_jpeg_can_be_written():
    photo = Photo(np.zeros((1, 65500, 3), np.uint8), exif=b"Exif\0\0".ljust(65533, b"\0"))
    assert decoded(encode_result(to_tensor(photo)[0], photo, ".jpg")).shape == (1, 65500, 3)


# --------------------------------------------------------------------------------------------------------- folders
def test_listing(tmp_path):
    for name in ("b.PNG", "sub/a.jpg", ".hidden.png", "notes.txt", "a.tif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert list_images(str(tmp_path), "option") == ["a.tif", "b.PNG", "sub/a.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"option: the folder .*empty holds no image"):
        list_images(str(tmp_path / "empty"), "option")
    with pytest.raises(UserError, match=r"option: the folder .*none does not exist"):
        list_images(str(tmp_path / "none"), "option")


def test_a_folder_is_left_out_of_a_listing(tmp_path, monkeypatch):
    for name in ("a.png", "sub/b.png", "sub/results/c.png", "sub/results/deep/d.png", "results/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    everything = ["a.png", "results/e.png", "sub/b.png", "sub/results/c.png", "sub/results/deep/d.png"]
    without = ["a.png", "results/e.png", "sub/b.png"]
    folder, results = str(tmp_path), str(tmp_path / "sub" / "results")
    assert list_images(folder, "option") == everything
    assert list_images(folder, "option", skip=results) == without
    assert list_images(folder, "option", skip=f"{results}/") == without
    monkeypatch.chdir(tmp_path)
    assert list_images(".", "option", skip="sub/results") == without
    os.symlink(results, tmp_path / "link")
    assert list_images(folder, "option", skip=str(tmp_path / "link")) == without
    os.remove(tmp_path / "link")
    for elsewhere in (None, str(tmp_path / "none"), str(tmp_path.parent), folder):
        assert list_images(folder, "option", skip=elsewhere) == everything


@pytest.mark.parametrize("quality", [1, 10, 33, 50, 75, 95, 100])
def test_the_quality_of_a_jpeg_is_that_of_its_encoder(tmp_path, quality):
    image = smooth(24, 40)
    for picture in (rgb(image), gray(image), cmyk(image)):
        for more in ({}, {"progressive": True}):
            assert read(tmp_path, saved(picture, "JPEG", quality=quality, **more)).quality == quality
    encoded = cv2.imencode(".jpg", rgb(image), [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    assert read(tmp_path, encoded).quality == quality
    assert read(tmp_path, saved(rgb(image), "PNG")).quality is None


def test_the_quality_of_other_tables_is_the_nearest(tmp_path):
    image, tables = smooth(24, 40), Image.open(io.BytesIO(saved(rgb(smooth(24, 40)), "JPEG", quality=30))).quantization
    changed = {i: [step + (n % 3 == 0) for n, step in enumerate(table)] for i, table in tables.items()}
    assert read(tmp_path, saved(rgb(image), "JPEG", qtables=changed)).quality in (29, 30)


def test_the_quality_is_that_of_the_table_of_the_luma(tmp_path):
    content = bytearray(saved(gray(smooth(24, 40)), "JPEG", quality=10))
    table, frame = content.index(b"\xff\xdb"), content.index(b"\xff\xc0")
    content[table + 4] |= 1  # the file's only table is called 1 now
    content[frame + 12] = 1
    assert read(tmp_path, bytes(content)).quality == 10
    image = Image.fromarray(rgb(smooth(24, 40)))
    image.save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[image], quality=10)
    assert read_photo(str(tmp_path / "camera.jpg"), LIMIT).quality == 10
