"""Every picture is read as people see it, whoever opens it, and as the model's own chat template reads it."""

import base64
import functools
import http.server
import threading
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from sinkscope.errors import InputError
from sinkscope.models.pictures import open_image

GREY = np.add.outer(np.arange(30) * 4, np.arange(44) * 3).astype(np.uint8)
COLOURS = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
HOLE = np.zeros(GREY.shape, dtype=bool)
HOLE[:10, :10] = True
FAMILIES = ("llava-clip-llama", "llava-siglip-qwen2", "qwen2.5-vl", "gemma3")
TURNED = {  # orientation -> what a camera did to the picture before it stored it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def grey(values):
    return Image.fromarray(values).convert("RGB")


def on_white(values):
    """Colours with a white corner, where the picture is transparent."""
    seen = np.array(Image.fromarray(values).convert("RGB"))
    seen[HOLE] = 255
    return Image.fromarray(seen)


def turned(orientation):
    picture = Image.fromarray(COLOURS).transpose(TURNED[orientation])
    picture.getexif()[274] = orientation
    return picture


def see_through(mode):
    alpha = np.where(HOLE, 0, 255).astype(np.uint8)
    if mode == "RGBA":
        return Image.fromarray(np.dstack([COLOURS, alpha]))
    return Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])


def palette():
    holes = np.where(HOLE, 7, GREY % 7).astype(np.uint8)
    picture = Image.fromarray(holes, "P")
    picture.putpalette(list(range(24)) + [0] * 744)
    return picture, holes


def saved(picture, form, **options):
    file = BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


# name -> (bytes of a file, what people see of it, or None for what transformers' loader sees)
def files():
    for orientation in TURNED:
        picture = turned(orientation)
        data = saved(picture, "PNG", exif=picture.getexif())
        yield f"orientation {orientation}", data, Image.fromarray(COLOURS)
    exif = Image.Exif()
    exif[274] = 6
    yield "a phone's JPEG", saved(Image.fromarray(COLOURS), "JPEG", exif=exif), None
    sixteen = Image.fromarray(GREY.astype(np.uint16) * 257)
    yield "I;16", saved(sixteen, "PNG"), grey(GREY)
    yield "I;16B", saved(sixteen, "TIFF", tiffinfo={}), grey(GREY)
    yield "I", saved(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"), grey(GREY)
    yield "I of 8 bits", saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), grey(GREY)
    yield "F to 1", saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), grey(GREY)
    yield "F to 255", saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), grey(GREY)
    yield "RGBA", saved(see_through("RGBA"), "PNG"), on_white(COLOURS)
    yield "LA", saved(see_through("LA"), "PNG"), on_white(GREY)
    colours, holes = palette()
    table = np.arange(24, dtype=np.uint8).reshape(8, 3)
    yield "P", saved(colours, "PNG"), Image.fromarray(table[holes])
    yield "P, one colour clear", saved(colours, "PNG", transparency=7), on_white(table[holes])
    clear = np.where(HOLE, 200, GREY % 200).astype(np.uint8)
    yield (
        "L, one grey clear",
        saved(Image.fromarray(clear), "PNG", transparency=200),
        on_white(clear),
    )
    yield "1", saved(Image.fromarray(HOLE), "PNG"), grey(HOLE.astype(np.uint8) * 255)
    yield "CMYK", saved(Image.fromarray(COLOURS).convert("CMYK"), "JPEG"), None
    moving = saved(grey(HOLE * np.uint8(255)), "GIF", save_all=True, append_images=[grey(GREY)])
    yield "animated", moving, grey(HOLE * np.uint8(255))


FILES = {name: (data, seen) for name, data, seen in files()}
ODD = ("I", "F", "L,", "P,", "RGBA", "LA")
"""Where transformers' loader of files clips, or drops transparency and shows what lies under it."""


@pytest.mark.parametrize("family", FAMILIES)
def test_both_routes_and_the_chat_template_read_the_same_pixels(tiny, tmp_path, family):
    """Files of every kind, by path and opened, against the processor called by hand."""
    lvlm, wrong = tiny(family), {}
    for name, (data, seen) in FILES.items():
        path = tmp_path / "file"
        path.write_bytes(data)
        by_hand = path if seen is None or not name.startswith(ODD) else seen
        part = {"path": str(by_hand)} if by_hand is path else {"image": by_hand}
        content = [{"type": "image", **part}, {"type": "text", "text": "what"}]
        expected = lvlm.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with Image.open(path) as opened:
            samples = [lvlm.prepare(one, "what") for one in (path, opened, data)]
        for sample in samples:
            assert torch.equal(sample.inputs["input_ids"], expected["input_ids"])
            far = (sample.inputs["pixel_values"] - expected["pixel_values"]).abs().max()
            if far or (seen is not None and not np.array_equal(sample.images[0][0], seen)):
                wrong[name] = round(float(far), 2)
    assert wrong == {}


def test_boxes_lie_in_the_upright_picture(tiny):
    lvlm = tiny("llava-siglip-qwen2")
    data, seen = FILES["orientation 6"]
    sample = lvlm.prepare(data, "what")
    boxes = sample.tokens.box[sample.tokens.image >= 0]
    assert sample.images[0][0].size == seen.size == (44, 30)
    assert boxes[:, 2:].amax(dim=0).tolist() == [44, 30]


ARRAYS = {
    "uint8 HWC": COLOURS,
    "uint8 CHW": torch.from_numpy(COLOURS).permute(2, 0, 1),
    "torch HWC": torch.from_numpy(COLOURS),
    "float to 1": COLOURS / 255,
    "float CHW to 1": torch.from_numpy(COLOURS).permute(2, 0, 1) / 255,
    "half to 255": torch.from_numpy(COLOURS).half(),
    "float to 255": COLOURS.astype(np.float32),
    "int64": COLOURS.astype(np.int64),
    "uint16": COLOURS.astype(np.uint16) * 257,
    "needs a graph": (torch.from_numpy(COLOURS) / 255).requires_grad_(),
}
GREYS = {
    "HW": GREY,
    "1HW": GREY[None],
    "HW1": GREY[..., None] / 255,
    "bool": GREY > 90,
}


@pytest.mark.parametrize("name", [*ARRAYS, *GREYS])
def test_arrays_are_pictures(name):
    values = {**ARRAYS, **GREYS}[name]
    if name == "bool":
        expected = grey((GREY > 90).astype(np.uint8) * 255)
    else:
        expected = Image.fromarray(COLOURS) if name in ARRAYS else grey(GREY)
    assert np.array_equal(open_image(values), expected)


def test_an_array_with_alpha_is_put_on_white():
    four = np.array(see_through("RGBA"))
    for values in (four, four / 255, np.moveaxis(four, -1, 0)):
        assert np.array_equal(open_image(values), on_white(COLOURS))


REFUSED = {
    "normalised": (np.linspace(-2, 2, 768).reshape(16, 16, 3), r"-2 to 2; .*inputs="),
    "a little above 1": (np.full((16, 16, 3), 1.02), r"1.02 to 1.02; .*clip\(0, 1\)"),
    "above 255": (np.full((16, 16, 3), 300.0), "300 to 300; expected"),
    "NaN": (np.full((16, 16, 3), np.nan), "NaN or infinite"),
    "two channels": (np.zeros((16, 16, 2), np.uint8), r"shape \(16, 16, 2\) .*1, 3 or 4 channels"),
    "several pictures": (np.zeros((2, 16, 16, 3), np.uint8), r"images=list\(pictures\)"),
    "no rows": (np.zeros((0, 16, 3), np.uint8), r"shape \(0, 16, 3\)"),
    "either way": (np.zeros((3, 16, 3), np.uint8), r"shape \(3, 16, 3\) .*first or last"),
    "complex": (np.zeros((16, 16, 3), complex), "dtype complex128"),
    "a float PIL image": (Image.fromarray(np.float32([[-1, 5]])), "-1 to 5; expected"),
    "a 32-bit PIL image": (Image.fromarray(np.int32([[0, 70000]])), "0 to 70000; expected"),
    "a number": (3.5, "an image of type float; expected"),
    "a folder": ("/", "'/', which is a folder"),
    "neither path nor address": ("cat.png", "'cat.png', which is neither an existing file nor"),
    "very long": ("A" * 5000, "'A{60}.*neither an existing file"),
    "an unknown scheme": ("s3://bucket/cat.png", "neither an existing file nor"),
    "bytes that are no picture": (b"no pixels", "no readable image"),
    "a dict": ({"path": None, "bytes": None}, "an image of type dict"),
    "not reachable": ("http://127.0.0.1:9/cat.png", "could not be fetched .*save it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused(name, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    value, says = REFUSED[name]
    with pytest.raises(InputError, match=says):
        open_image(value)


def test_addresses_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    picture = Image.fromarray(COLOURS)
    picture.save(tmp_path / "a b.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(open_image(f"{where}/a%20b.png"), picture)
        with pytest.raises(InputError, match=r"missing.png', which could not be fetched .*404"):
            open_image(f"{where}/missing.png")
        server.shutdown()
    inside = base64.b64encode((tmp_path / "a b.png").read_bytes()).decode()
    assert np.array_equal(open_image(f"data:image/png;base64,{inside}"), picture)
    data = (tmp_path / "a b.png").read_bytes()
    for given in (
        data,
        BytesIO(data),
        {"bytes": data, "path": None},
        {"path": tmp_path / "a b.png"},
    ):
        assert np.array_equal(open_image(given), picture)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_file_starts_another_program(tiny, tmp_path, monkeypatch):
    """PIL hands EPS to Ghostscript, whatever the file is called; by no route is it asked to."""
    started = []

    def ghostscript(*given, **options):
        started.append(given)
        return Image.new("RGB", (8, 8)).im

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript)
    Image.open(BytesIO(EPS)).load()
    assert len(started) == 1, "PIL would"
    path, lvlm = tmp_path / "photo.jpg", tiny("llava-clip-llama")
    path.write_bytes(EPS)
    inside = base64.b64encode(EPS).decode()
    part = {"type": "image", "base64": inside}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "what"}]}]
    opened = [EPS, BytesIO(EPS), path, str(path), path.as_uri(), f"data:image/png;base64,{inside}"]
    for one in (*opened, {"bytes": EPS}, {"path": str(path)}):
        with pytest.raises(InputError, match=r"expected one of JPEG, PNG, WEBP.* write Image.open"):
            open_image(one)
    for prepare in (lambda: lvlm.prepare(path, "what"), lambda: lvlm.prepare(text=chat)):
        with pytest.raises(InputError, match="expected one of JPEG"):
            prepare()
    assert len(started) == 1


@pytest.mark.parametrize(
    "form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "PPM"]
)
def test_the_usual_formats_are_read(form):
    more = (
        {"save_all": True, "append_images": [Image.new("RGB", (44, 30))]} if form == "MPO" else {}
    )
    colours = Image.fromarray(np.full((30, 44, 3), 90, np.uint8))
    read = np.asarray(open_image(saved(colours, form, **more)), dtype=int)
    assert read.shape == (30, 44, 3)
    assert abs(read - 90).max() <= 2


def test_a_format_of_a_plugin_is_read_once_it_is_there(monkeypatch):
    """What phones write needs a plugin: with it HEIF is read, without it refused by name."""
    magic = b"heif" + bytes(20)
    with pytest.raises(InputError, match=r"expected one of .*HEIF"):
        open_image(magic)

    def read(file, name):
        return Image.new("RGB", (3, 2), "red")

    Image.init()
    monkeypatch.setitem(Image.OPEN, "HEIF", (read, lambda prefix: prefix.startswith(b"heif")))
    assert open_image(magic).size == (3, 2)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(tiny, size):
    for family in FAMILIES:
        with pytest.raises(InputError, match=r"an image of \(\d, \d\) pixels; expected at least 1"):
            tiny(family).prepare(Image.new("RGB", size), "what")
