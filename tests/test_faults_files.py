"""Bad files through every reader: restored properly, or one clear line; never a traceback, and little memory."""

import io
import json
import os
import pickle
import shutil
import struct
import time
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from conftest import TINY, merged
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_imageio import (
    KINDS,
    LOSSY,
    PROFILES,
    chunk,
    colours,
    encoded,
    exif,
    noise,
    palette_png,
    rgb,
    saved,
    unit,
    wide,
)

from ucdir_plugin.data.paired_dataset import PairedRestorationDataset
from ucdir_plugin.utils import image_reading, memory
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_reading import decode_image, image_size, read_photo, to_tensor
from ucdir_plugin.utils.image_writing import encode_result

ALL = {**KINDS, **LOSSY}
CPU = torch.device("cpu")


def forked(function, *args):
    """(what it returns, bytes above the process at rest, seconds) of a call in a process of its own, which may die."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            memory.reset_peak(CPU)
            before, start = memory.status("VmRSS"), time.perf_counter()
            try:
                result = function(*args)
            except UserError as err:
                result = err
            took = time.perf_counter() - start
            with os.fdopen(writer, "wb") as file:
                pickle.dump((result, memory.status("VmHWM") - before, took), file)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        content = file.read()
    _, status = os.waitpid(child, 0)
    assert content, f"the process ended with status {status}"
    return pickle.loads(content)


def look(content, path):
    """The pixels (RGB) and alpha of a file, or why it is refused; all readers have one opinion of it."""
    Path(path).write_bytes(content)
    try:
        size = image_size(str(path))
    except UserError as err:
        size = err
    try:
        data = decode_image(content, str(path))
    except UserError as err:
        data = err
    try:
        photo = read_photo(str(path), image_reading.MAX_PIXELS)
    except UserError as err:
        one_line(err, path)
        # Of alpha the datasets know nothing: where only that is wrong, they read on.
        assert isinstance(data, UserError) or photo_alone(content), (path, data.shape)
        return err
    if isinstance(data, UserError):
        assert photo_alone(content)
        return data
    assert photo.pixels.shape[:2] == data.shape[:2] == size
    return photo


def photo_alone(content):
    """TIFFs with alpha have a reader of their own (test_colours_under_alpha_in_a_tiff)."""
    return image_reading.read_header(io.BytesIO(content)).alpha


def one_line(err, path):
    assert len(str(err).splitlines()) == 1 and str(path) in str(err), err


def bigger(name, seed=0):
    """(content, pixels, alpha) large enough to be cut."""
    content, pixels, alpha = ALL[name](noise(40, 50, seed))
    return content, colours(pixels), alpha


# ------------------------------------------------------------------------------------------------------------- kinds
def tiff_of(width, height, data, **changes):
    """A TIFF of gray, by hand: BigTIFF and tiles and whatever a tag may say."""
    fields = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1}
    fields.update({int(tag[1:]): value for tag, value in changes.items()})
    kept = {tag: value for tag, value in sorted(fields.items()) if value is not None}
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in kept.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(kept)) + entries + bytes(4)


def tiles(width, height, tile, data, **changes):
    return tiff_of(width, height, data, t322=tile, t323=tile, t324=8, t325=len(data), **changes)


def bmp(width, height, bits, compression, data, palette=b""):
    size = len(palette) // 4
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, size, 0) + palette
    return struct.pack("<2sIHHI", b"BM", 14 + len(header) + len(data), 0, 0, 14 + len(header)) + header + data


GRAYS = b"".join(bytes([level] * 3 + [0]) for level in range(256))


def described(image, **texts):
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text, zip=True)
    return saved(image, "PNG", pnginfo=info)


def further():
    """name -> (content, RGB pixels) of kinds that test_imageio has not."""
    image = rgb(noise())
    first, second = Image.fromarray(image), Image.fromarray(rgb(noise(seed=9)))
    palette = np.asarray(first.quantize(16).convert("RGB"))
    more = {"save_all": True, "append_images": [second]}
    square = np.zeros((32, 32), np.uint8)
    square[:20, :24] = image[..., 0]
    plane = colours(image[..., 0])
    found = {
        **{f"TIFF {c}": (saved(image, "TIFF", compression=c), image) for c in ("tiff_adobe_deflate", "packbits")},
        "BigTIFF": (saved(image, "TIFF", big_tiff=True), image),
        "TIFF tiles": (tiles(24, 20, 32, zlib.compress(square.tobytes())), plane),
        "TIFF palette": (saved(first.quantize(16), "TIFF"), palette),
        "BMP palette": (saved(first.quantize(16), "BMP"), palette),
        "BMP run length": (
            bmp(4, 2, 8, 1, bytes([4, 10, 0, 0, 4, 20, 0, 1]), GRAYS), colours(np.uint8([[20] * 4, [10] * 4]))),
        "APNG, the first not of the animation": (saved(first, "PNG", default_image=True, **more), image),
        "APNG": (saved(first, "PNG", **more), image),
        "WebP animated": (saved(first, "WEBP", lossless=True, **more), image),
        "TIFF pages": (saved(first, "TIFF", **more), image),
        "PGM in letters": (b"P2 3 1 255\n0 50 255\n", colours(np.uint8([[0, 50, 255]]))),
        "PGM with remarks": (b"P5 # of\n3 1\n# a\n255\n" + bytes([0, 50, 255]), colours(np.uint8([[0, 50, 255]]))),
        "PBM": (b"P4 8 1\n\x5a", colours(np.uint8([[255, 0, 255, 0, 0, 255, 0, 255]]))),
        "PNG with 2 MB of XMP": (described(image, **{"XML:com.adobe.xmp": "x" * 2**21}), image),
        "PNG with 2 MB of profile": (saved(image, "PNG", icc_profile=PROFILES[b"RGB "] + bytes(2**21)), image),
    }  # fmt: skip
    for size in ((1, 5000), (5000, 1), (1, 1)):
        for name in ("PNG RGB", "PNG 16 bits RGB", "TIFF RGB", "BMP RGB", "WebP RGB", "PPM"):
            content, pixels, _ = KINDS[name](noise(*size))
            found[f"{name} {size[1]}x{size[0]}"] = content, colours(pixels)
    return found


def test_further_kinds_and_sizes_are_read(tmp_path, record_property):
    found = further()
    for name, (content, pixels) in found.items():
        photo = look(content, tmp_path / "image.bin")
        assert not isinstance(photo, UserError), (name, photo)
        np.testing.assert_array_equal(photo.pixels, pixels, err_msg=name, strict=True)
    record_property("further kinds, read exactly", len(found))


def test_a_packed_tiff_with_damage_inside_is_refused(tmp_path):
    """OpenCV leaves black what it cannot unpack of 8 bits, and says nothing."""
    image = noise(64, 64)[..., 0]
    packed = zlib.compress(image.tobytes())
    for data in (packed[: len(packed) // 2], packed[:50] + bytes(50) + packed[100:]):
        err = look(tiles(64, 64, 64, data), tmp_path / "a.tif")
        assert "cannot be decoded" in str(err)
    assert not isinstance(look(tiles(64, 64, 64, packed), tmp_path / "a.tif"), UserError)


WRONG = {
    ".png": "JPEG RGB",
    ".jpg": "PNG RGB",
    ".tif": "WebP RGB",
    ".webp": "TIFF RGB",
    ".bmp": "PPM",
    ".ppm": "BMP RGB",
}


def test_the_content_counts_not_the_extension(tmp_path):
    for extension, name in WRONG.items():
        content, pixels, _ = bigger(name)
        photo = look(content, tmp_path / f"image{extension}")
        assert np.abs(photo.pixels.astype(int) - pixels).max() <= (60 if name in LOSSY else 0)


FOREIGN = {
    "PGM of 10 bits": (b"P5 4 1 1023\n" + bytes(8), "PPM with 1023 for white"),
    "PGM up to 100": (b"P5 4 1 100\n" + bytes(4), "PPM with 100 for white"),
    "PFM": (b"Pf\n2 1\n-1.0\n" + bytes(8), "rare kind"),
    "PAM": (b"P7\nWIDTH 4\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nTUPLTYPE GRAYSCALE\nENDHDR\n" + bytes(4), "cannot be decoded"),
    "GIF": (saved(rgb(noise()), "GIF"), "cannot be decoded"),
    "GIF animated": (saved(rgb(noise()), "GIF", save_all=True, append_images=[Image.fromarray(rgb(noise()))]), "cannot"),
    "JPEG 2000": (saved(rgb(noise()), "JPEG2000"), "cannot be decoded"),
    "Radiance": (encoded(rgb(unit(noise())), ".hdr"), "cannot be decoded"),
    "OpenEXR": (b"\x76\x2f\x31\x01" + bytes(100), "cannot be decoded"),
    "TIFF, zstd": (saved(rgb(noise()), "TIFF", compression="zstd"), "cannot be decoded"),
    "no bytes": (b"", "empty"),
    "text": (b"<html>404</html>", "cannot be decoded"),
    "zeros": (bytes(5000), "cannot be decoded"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_other_kinds_are_refused_by_all_readers(tmp_path, name):
    """The datasets took what OpenCV decodes: some of it at a wrong brightness, and of any size."""
    content, reason = FOREIGN[name]
    assert reason in str(look(content, tmp_path / "image.png"))


# ------------------------------------------------------------------------------------------------------ cut, damaged
CUT = [(name, tenth) for name in ALL for tenth in range(1, 10)]


def test_cut_at_every_tenth(tmp_path, record_property):
    """What is read of a cut file is what was in the whole one: only what lies behind the pixels may be lost."""
    whole = {name: bigger(name) for name in ALL}
    refused = 0
    for name, tenth in CUT:
        content, pixels, _ = whole[name]
        photo = look(content[: len(content) * tenth // 10], tmp_path / "image.bin")
        refused += isinstance(photo, UserError)
        if not isinstance(photo, UserError) and name not in LOSSY:
            np.testing.assert_array_equal(photo.pixels, pixels, err_msg=f"{name} at {tenth}/10")
    record_property("files cut at every tenth", len(CUT))
    record_property("of these refused", refused)


def flips(count, seed=0, share=None):
    """Damaged files: (name, content). ``share``: how much of the file, from its start, is hit."""
    rng = np.random.default_rng(seed)
    names = sorted(ALL)
    for number in range(count):
        name = names[number % len(names)]
        content = bytearray(ALL[name](noise(9, 11))[0])
        reach = min(len(content), share or (64, 400)[number % 2])
        for at in rng.integers(0, reach, 1 + number % 3):
            content[at] = rng.choice([0, 1, 255, content[at] ^ (1 << rng.integers(8)), rng.integers(256)])
        yield name, bytes(content)


def flipped(count, seed, folder, share=None):
    read = refused = 0
    for _, content in flips(count, seed, share):
        photo = look(content, os.path.join(folder, "image.bin"))
        refused += isinstance(photo, UserError)
        if not isinstance(photo, UserError):
            read += 1
            encode_result(to_tensor(photo)[0], photo, ".png")
    return read, refused


def test_flipped_bytes(tmp_path, record_property):
    (read, refused), peak, _ = forked(flipped, 420, 0, str(tmp_path))
    assert read and refused and peak < 2**30
    record_property("files with flipped bytes: read / refused", f"{read} / {refused}")


@pytest.mark.campaign
def test_very_many_flipped_bytes(tmp_path, record_property):
    total, most = np.zeros(2, int), 0
    for seed in range(1, 13):
        found, peak, _ = forked(flipped, 1000, seed, str(tmp_path), (64, 400, 5000)[seed % 3])
        total, most = total + found, max(most, peak)
    assert most < 2**30
    record_property("files with flipped bytes: read / refused", "{} / {}".format(*total))
    record_property("memory above the process at rest, MB", round(most / 2**20))


# ------------------------------------------------------------------------------------------------------------- bombs
def png_of(width, height):
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def jpeg_of(width, height):
    content = bytearray(saved(rgb(noise(16, 16)), "JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def many_scans():
    content = saved(np.zeros((4000, 4000, 3), np.uint8), "JPEG", progressive=True, quality=10)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 300 + b"\xff\xd9"


def texts():
    info = PngInfo()
    for number in range(100):
        info.add_itxt(f"t{number}", "x" * 2**20, zip=True)
    return saved(rgb(noise()), "PNG", pnginfo=info)


def real_bomb():
    """400 million pixels in 48 kB."""
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(2501 * 200)) for _ in range(100)) + rows.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BOMBS = {
    "PNG, 400 million pixels": (real_bomb, "400000000 pixels"),
    "PNG, header of 2^62 pixels": (lambda: png_of(2**31 - 1, 2**31 - 1), "pixels|cannot be decoded"),
    "PNG, larger than its data": (lambda: png_of(9000, 9000), "cannot be decoded"),
    "PNG, a chunk of 4 GB": (
        lambda: (p := saved(rgb(noise()), "PNG"))[:33] + b"\xff\xff\xff\xf0" + p[37:], "cannot be decoded"),
    "PNG, text of 2 GB before the pixels": (
        lambda: (p := saved(rgb(noise()), "PNG"))[:33] + b"\x7f\xff\xff\xff" + b"tEXt" + p[33:], "cannot be decoded"),
    "PNG, no width": (lambda: png_of(0, 9000), "cannot be decoded"),
    "PNG, 100 MB of texts": (texts, "cannot be decoded"),
    "PNG, a text of 100 MB": (lambda: described(rgb(noise()), a="x" * 100_000_000), "cannot be decoded"),
    "JPEG, 65500x65500": (lambda: jpeg_of(65500, 65500), "4290250000 pixels"),
    "JPEG, no height": (lambda: jpeg_of(16, 0), "cannot be decoded"),
    "JPEG, 300 scans": (many_scans, "more than 100 scans"),
    "PPM, 10^10 pixels": (lambda: b"P6 100000 100000 255\n", "10000000000 pixels"),
    "PPM, a header of 10^4 digits": (lambda: b"P6 " + b"9" * 10000 + b" 1 255\n", "cannot be decoded"),
    "PPM, larger than its data": (lambda: b"P6 15000 15000 255\nabc", "cannot be decoded"),
    "BMP, negative width": (lambda: bmp(-4, 2, 24, 0, bytes(24)), "pixels|cannot be decoded"),
    "BMP, height of -2^31": (lambda: bmp(4, -(2**31), 24, 0, bytes(24)), "pixels"),
    "BMP, larger than its data": (lambda: bmp(9000, 9000, 24, 0, bytes(24)), "cannot be decoded"),
    "TIFF, 10^8 x 10^8": (lambda: tiff_of(10**8, 10**8, bytes(8), t259=1, t273=8, t278=10, t279=8), "pixels"),
    "TIFF, a tile of 64 million pixels": (lambda: tiles(10, 10, 8192, zlib.compress(bytes(2**26))), "tiles of 8192x8192"),
    "TIFF, a tile of 2^40 pixels": (lambda: tiles(10, 10, 2**20, bytes(9)), "tiles of"),
    "TIFF, 65535 channels": (lambda: tiff_of(9, 9, bytes(9), t277=65535, t273=8, t278=9, t279=9), "less data|channels"),
    "TIFF, larger than its data": (
        lambda: tiff_of(15000, 15000, zlib.compress(b""), t273=8, t278=15000, t279=9), "less data"),
    "TIFF, a million tags": (lambda: b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(100), "cannot be decoded"),
    "TIFF, a tag of 2^32 numbers": (
        lambda: tiff_of(9, 9, bytes(9))[:-16] + struct.pack("<HHII", 34675, 7, 2**32 - 1, 8) + bytes(4), "cannot be|less data"),
    "WebP, header of another size": (
        lambda: (w := saved(rgb(noise()), "WEBP", lossless=True))[:21] + b"\xff" * 4 + w[25:], "cannot be decoded"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_little_memory(tmp_path, name):
    make, reason = BOMBS[name]
    err, peak, _ = forked(look, make(), str(tmp_path / "bomb.png"))
    assert isinstance(err, UserError) and any(part in str(err) for part in reason.split("|")), err
    assert peak < 2**29  # three readers, and the file's own bytes


# ------------------------------------------------------------------------------------------- names, links and no files
def odd_places(folder, good):
    """Entries that are no image files, or have odd names: relative path -> whether it can be restored."""
    os.makedirs(f"{folder}/sub")
    os.mkfifo(f"{folder}/pipe.png")
    os.symlink("/dev/zero", f"{folder}/zero.png")
    os.symlink("/dev/full", f"{folder}/device.png")
    os.symlink("self.png", f"{folder}/self.png")
    os.symlink("nowhere.png", f"{folder}/dangling.png")
    os.symlink("..", f"{folder}/sub/loop")
    os.symlink(".", f"{folder}/loop")
    os.mkdir(f"{folder}/folder.png")
    found = dict.fromkeys(("pipe.png", "zero.png", "device.png", "self.png", "dangling.png"), False)
    names = [
        "Gänse 鳥 🦆.png", "e\u0301.png", "a\nb.png", "a\x1b[2Jb\x07.png", "a b 'c' \"d\".png", "-opt.png", "%s{}.png",
        "x" * 240 + ".png", "鳥" * 83 + ".png", "<script>alert(1)</script>.png".replace("/", "_"),
        "sub/\u202egnp.png", os.fsdecode(b"\xff\xfe.png"), "a.b.c.png", "con.png", "~.png", "$(touch canary).png",
    ]  # fmt: skip
    for name in names:
        Path(f"{folder}/{name}").write_bytes(good)
        found[name] = True
    return found


def listed(folder):
    return {os.path.join(root, name) for root, _, names in os.walk(folder) for name in names}


def refusals(done):
    """key -> line of stderr; nothing else is there."""
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("failed: ") for line in lines), done.stderr
    return lines


def test_odd_names_and_no_files_through_restore(place):
    good = saved(rgb(noise(16, 16)), "PNG")
    entries = odd_places("in", good)
    bad = [name for name, fine in entries.items() if not fine]
    done = place.run("restore.py", "-opt", "options.yml", "-i", "in", "-o", "out", "--steps", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = refusals(done)
    assert len(lines) == len(bad) and all(
        any(line.startswith(f"failed: {b}: ") or f"/{b} " in line for b in bad) for line in lines
    )
    assert any("pipe.png" in line and "pipe or a device" in line for line in lines)
    assert "\x1b" not in done.stdout + done.stderr and "\x07" not in done.stdout
    stems = {os.path.splitext(name)[0] for name, fine in entries.items() if fine}
    assert listed("out") == {f"out/{stem}.{end}" for stem in stems for end in ("png", "json")}
    again = place.run("restore.py", "-opt", "options.yml", "-i", "in", "-o", "out", "--steps", "1")
    assert f"{len(stems)} finished before" in again.stdout
    assert not os.path.exists("canary")


def test_a_name_too_long_for_its_results_fails_alone(place):
    """NAME.json, NAME_sample1.png: the longest names have no room for what is added to them."""
    os.mkdir("in")
    for name in ("y" * 251 + ".png", "a.png"):
        Path(f"in/{name}").write_bytes(saved(rgb(noise(16, 16)), "PNG"))
    done = place.run("restore.py", "-opt", "options.yml", "-i", "in", "-o", "out", "--steps", "1", "--samples", "2")
    assert done.returncode == 1
    (line,) = refusals(done)
    assert "263 bytes, 255 are possible" in line
    assert sorted(os.listdir("out")) == ["a.json", "a_mean.png", "a_sample1.png", "a_sample2.png", "a_spread.png"]


@pytest.mark.parametrize(
    "record", [b"[" * 10**5, b"{", b"1" * 5000, b"\xff", b'{"input": "a.png", "outputs": ["../../x"], "settings": 1}']
)
def test_records_of_any_kind_beside_results(tmp_path, record):
    from ucdir_plugin.restoration.jobs import read_record

    (tmp_path / "a.json").write_bytes(record)
    found = read_record(str(tmp_path / "a"))
    assert found is None or found["outputs"] == ["../../x"]  # which is looked for, and never written or removed


# ------------------------------------------------------------------------------------------------------------- LMDBs
def make_lmdb(folder, images, names=None):
    base = lmdb.open(str(folder), map_size=2**24)
    with base.begin(write=True) as writer:
        for key, content in images.items():
            writer.put(key.encode(), content)
    base.close()
    lines = names or [f"{key}.png (16,16,3) 1" for key in images]
    (folder / "meta_info.txt").write_text("\n".join(lines) + "\n")


def pair_options(folder, **changes):
    return {
        "name": "val", "type": "PairedRestorationDataset", "phase": "val", "dataroot_gt": str(folder / "gt.lmdb"),
        "dataroot_lq": str(folder / "lq.lmdb"), "io_backend": {"type": "lmdb"}, "filename_tmpl": "{}", **changes,
    }  # fmt: skip


def all_samples(options):
    dataset = PairedRestorationDataset(options)
    return [dataset[index]["lq"].shape for index in range(len(dataset))]


def test_lmdbs_cut_at_every_tenth(tmp_path, record_property):
    """Reading behind the end of a mapped file ends a process by SIGBUS, without a word."""
    images = {f"i{n:03d}": saved(rgb(noise(64, 64, n)), "PNG") for n in range(60)}
    make_lmdb(tmp_path / "gt.lmdb", images)
    make_lmdb(tmp_path / "lq.lmdb", images)
    data = (tmp_path / "lq.lmdb" / "data.mdb").read_bytes()
    used = max(i for i, byte in enumerate(data) if byte) + 1
    for tenth in range(10):
        (tmp_path / "lq.lmdb" / "data.mdb").write_bytes(data[: used * tenth // 10])
        (tmp_path / "lq.lmdb" / "meta_info.txt").write_text("".join(f"{key}.png (64,64,3) 1\n" for key in images))
        (tmp_path / "gt.lmdb" / "meta_info.txt").write_text("".join(f"{key}.png (64,64,3) 1\n" for key in images))
        err, _, _ = forked(all_samples, pair_options(tmp_path))
        assert isinstance(err, UserError) and "make it again" in str(err), (tenth, err)
    record_property("LMDBs cut at every tenth", 10)


def test_bad_images_in_lmdbs(tmp_path, record_property):
    good, count = saved(rgb(noise(16, 16)), "PNG"), 0
    bad = {
        **{k: v[0] for k, v in FOREIGN.items()},
        "cut": good[:-60],
        "bomb": real_bomb(),
        "large": png_of(30000, 9000),
    }
    for number, (name, content) in enumerate(bad.items()):
        folder = tmp_path / str(number)
        for kind, image in (("gt", good), ("lq", content)):
            (folder / f"{kind}.lmdb").mkdir(parents=True)
            make_lmdb(folder / f"{kind}.lmdb", {"a": image or b""})
        err, peak, _ = forked(all_samples, pair_options(folder))
        assert isinstance(err, UserError) and "a" in str(err) and peak < 2**29, (name, err)
        count += 1
    record_property("bad images in LMDBs", count)


OUTSIDE = ["../../x", "/tmp/x", "a/../../../x", "../x", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_folder(tmp_path, name):
    """An image's name below its folder is the name of its results below theirs."""
    good = saved(rgb(noise(16, 16)), "PNG")
    for kind in ("gt", "lq"):
        (tmp_path / f"{kind}.lmdb").mkdir()
        make_lmdb(tmp_path / f"{kind}.lmdb", {"a": good}, [f"{name}.png (16,16,3) 1"])
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.png").write_bytes(good)
    with pytest.raises(UserError, match="leads out of its folder"):
        PairedRestorationDataset(pair_options(tmp_path))
    (tmp_path / "list.txt").write_text(f"{name}.png (16,16,3)\n")
    files = {"dataroot_gt": str(tmp_path / "gt"), "dataroot_lq": str(tmp_path / "lq"), "io_backend": {"type": "disk"}}
    with pytest.raises(UserError, match="leads out of its folder"):
        PairedRestorationDataset(pair_options(tmp_path, **files, meta_info_file=str(tmp_path / "list.txt")))


# --------------------------------------------------------------------------------------------------------------- raw
def test_damaged_raw_files(tmp_path, record_property):
    from test_raw import write_dng

    from ucdir_plugin.data.raw import develop

    pytest.importorskip("rawpy")
    rng = np.random.default_rng(0)
    write_dng(tmp_path / "a.dng", rng.integers(600, 16000, (32, 48)).astype(np.uint16))
    content = (tmp_path / "a.dng").read_bytes()
    path = tmp_path / "b.dng"

    def developed(content):
        path.write_bytes(content)
        try:
            return develop(str(path)).shape
        except UserError as err:
            one_line(err, path)
            return None

    def every():
        cut = [developed(content[: len(content) * tenth // 10]) for tenth in range(10)]
        for _ in range(150):
            damaged = bytearray(content)
            for at in rng.integers(0, 400, 2):
                damaged[at] = rng.integers(256)
            cut.append(developed(bytes(damaged)))
        return cut

    found, peak, _ = forked(every)
    assert found[:9] == [None] * 9 and None in found[10:] and any(found[10:]) and peak < 2**30
    record_property("raw files, cut and flipped", len(found))


# ------------------------------------------------------------------------------------------------ the tools, in earnest
def archive(folder, good):
    """A folder of all the kinds of good and bad files: path below it -> content's reader says it can be restored."""
    found = odd_places(folder, good)

    def add(name, content, fine=None):
        Path(f"{folder}/{name}").write_bytes(content)
        if fine is None:
            try:
                read_photo(f"{folder}/{name}", image_reading.MAX_PIXELS)
                fine = True
            except UserError:
                fine = False
        found[name] = fine

    for number, name in enumerate(ALL):
        content = bigger(name)[0]
        add(f"good_{number}.png", content, True)
        for tenth in range(1, 10, 2):
            add(f"cut_{number}_{tenth}.jpg", content[: len(content) * tenth // 10])
    for number, (_, content) in enumerate(flips(120)):
        add(f"flip_{number}.tif", content)
    for number, (content, _) in enumerate(FOREIGN.values()):
        add(f"foreign_{number}.png", content, False)
    for number, (make, _) in enumerate(BOMBS.values()):
        add(f"bomb_{number}.png", make(), False)
    for orientation in range(1, 9):
        add(f"turned_{orientation}.jpg", saved(rgb(noise(16, 24)), "JPEG", exif=exif(orientation)), True)
    content, _, _ = palette_png(noise(16, 16))
    add("palette.bmp", content, True)
    add("wide.webp", encoded(rgb(wide(noise(3, 400)))), True)
    return found


@pytest.mark.campaign
def test_an_archive_of_bad_files_through_restore(place, record_property):
    entries = archive("in", saved(rgb(noise(16, 16)), "PNG"))
    bad = {name for name, fine in entries.items() if not fine}
    done = place.run("restore.py", "-opt", "options.yml", "-i", "in", "-o", "out", "--steps", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    others = [line for line in done.stderr.splitlines() if not line.startswith("failed: ")]
    assert len(lines) == len(bad)
    for name in bad:
        assert sum(f"in/{name} " in line or line.startswith(f"failed: {name}: ") for line in lines) == 1, name
    written = {os.path.join(root, name) for root, _, names in os.walk("out") for name in names}
    assert len([name for name in written if name.endswith(".png")]) == len(entries) - len(bad)
    assert not [name for name in written if os.path.basename(name).startswith(".")]
    record_property("files in the folder: restored / one line each", f"{len(entries) - len(bad)} / {len(bad)}")
    record_property("lines on stderr of the image libraries themselves", len(others))
    peaks = [json.loads(Path(name).read_text())["peak_memory"] for name in written if name.endswith(".json")]
    record_property("peak memory of the process, MB", round(max(peaks) / 2**20))


@pytest.mark.campaign
def test_the_time_and_memory_of_refusals(tmp_path, record_property):
    slowest, most = (0.0, ""), 0
    for name, (make, _) in BOMBS.items():
        err, peak, took = forked(look, make(), str(tmp_path / "bomb.png"))
        assert isinstance(err, UserError)
        slowest, most = max(slowest, (took, name)), max(most, peak)
    assert slowest[0] < 10 and most < 2**30
    record_property("slowest refusal by three readers together, s", f"{slowest[0]:.2f} ({slowest[1]})")
    record_property("memory above the process at rest, MB", round(most / 2**20))


@pytest.mark.campaign
def test_bad_files_through_the_other_tools(place, record_property):
    """Training, testing, measuring and preparing: each names the file in one line."""
    good = saved(rgb(noise(24, 24)), "PNG")
    bad = {"cut": good[:-60], "empty": b"", "large": real_bomb(), "text": b"no image", "gif": FOREIGN["GIF"][0]}
    runs = 0
    for name, content in bad.items():
        for kind in ("set", "lq", "gt"):
            os.makedirs(f"{name}/{kind}")
            for number in range(3):
                Path(f"{name}/{kind}/{number}.png").write_bytes(good)
        Path(f"{name}/set/1.png").write_bytes(content)
        Path(f"{name}/lq/1.png").write_bytes(content)
        for part, blurred in (("train", "lq"), ("test", "gt")):
            shutil.copytree(f"{name}/{blurred}", f"{name}/gopro/{part}/scene/blur")
            shutil.copytree(f"{name}/gt", f"{name}/gopro/{part}/scene/sharp")
        sets = {"train": {"dataroot_gt": f"{name}/set"}, "val": {"dataroot_gt": f"{name}/set"}}
        options = place.write(merged(TINY, {"name": name, "datasets": sets, "train": {"total_iter": 3}}), "bad.yml")
        pairs = {
            "type": "PairedRestorationDataset",
            "dataroot_lq": f"{name}/lq",
            "dataroot_gt": f"{name}/gt",
            "quality": None,
        }
        test = merged(
            TINY,
            {
                "name": name,
                "train": None,
                "datasets": {"train": None, "val": pairs},
                "path": {"pretrain_network_g": "net.pth"},
            },
        )
        paired = place.write(test, "paired.yml")
        for tool, *args in (
            ("train.py", "-opt", options),
            ("test.py", "-opt", paired),
            ("evaluate.py", f"{name}/lq", f"{name}/gt", "--metrics", "psnr", "-o", f"{name}/table"),
            (
                "../datasets/prepare_gopro.py",
                "--source",
                f"{name}/gopro",
                "--out",
                f"{name}/prepared",
                "--workers",
                "1",
            ),
        ):
            done = place.run(tool, *args)
            lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "failed: "))]
            assert done.returncode in (1, 2), (tool, name, done.stdout, done.stderr)
            assert "Traceback" not in done.stderr + done.stdout, (tool, name, done.stderr)
            assert len(lines) == 1 and "1.png" in lines[0], (tool, name, done.stderr)
            runs += 1
    record_property("runs of train, test, evaluate and prepare with a bad file", runs)


def test_pictures_of_a_stopped_run_that_are_damaged(tmp_path):
    """What a run keeps until its tables are written is made again where it cannot be read."""
    from ucdir_plugin.evaluation.report import Store

    store = Store(str(tmp_path))
    image = rgb(noise())
    store.keep("a", {"input": image}, stamp="s")
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    assert np.array_equal(store.find("a", "s")[0]["input"], image)
    for tenth in range(10):
        file.write_bytes(content[: len(content) * tenth // 10])
        assert store.find("a", "s") is None, tenth
