"""Captioned pictures: what is a caption, what is one concept, and that nothing leaks over the split."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from reattend.data import captioned_pictures as captions_module
from reattend.data.captioned_pictures import (
    CLIP_ART,
    HELD_OUT_EMOJI,
    MOST_OF_A_TITLE,
    SOURCES,
    SPLITS,
    CaptionedPictures,
    _title,
    captioned_pictures,
    clip_art_titles,
    concepts_of,
    plain_words,
    read_picture,
    says_what_it_shows,
)


@pytest.fixture(scope="module")
def pictures() -> CaptionedPictures:
    """All of them, small."""
    return captioned_pictures(size=16)


def words(caption: str) -> tuple[str, ...]:
    return tuple(sorted(caption.split()))


def of_split(pictures: CaptionedPictures, *splits: str) -> list[int]:
    return [i for i, split in enumerate(pictures.splits) if split in splits]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Lemon_(Whole) 2", "lemon whole"),
        ("A Père David's deer.", "a père david deer"),
        ("FACE WITH TEARS OF JOY", "face with tears of joy"),
        ("t-shirt", "t shirt"),
        ("#104", ""),
    ],
)
def test_captions_are_plain_words(text, plain):
    assert plain_words(text) == plain


def test_pictures_that_share_a_thing_have_one_concept():
    captions = ("red car", "car red", "auto", "bus", "coach", "tram")
    things = ("a", "b", "b", "c", "d", "e")
    drawn = (0, 1, 2, 3, 3, 4)
    assert concepts_of(captions, things, drawn) == (*["auto"] * 3, *["bus"] * 2, "tram")
    # A thing and a drawing of the same value are not the same.
    assert concepts_of(("x", "y"), (1, 2), (2, 3)) == ("x", "y")


def test_a_concept_does_not_depend_on_the_order_of_pictures():
    captions = [f"{a} {b}" for a in "abcd" for b in "abcd"]
    things = [i % 5 for i in range(16)]
    order = np.random.default_rng(0).permutation(16)
    again = concepts_of([captions[i] for i in order], [things[i] for i in order])
    assert list(again) == [concepts_of(captions, things)[i] for i in order]


def test_a_title_is_a_caption_where_its_keywords_or_folders_say_the_same():
    assert says_what_it_shows("Hens", ["animals", "hen"])
    assert says_what_it_shows("Two cats", ["mammals", "housecat", "cat"])
    assert not says_what_it_shows("Cavallo", ["mammal", "horse"])
    assert not says_what_it_shows("Map of the end", ["the", "of"])


def test_clip_art_titles_of_series_are_left_out():
    titles = clip_art_titles()
    often = Counter(map(plain_words, titles.values()))
    assert 600 < len(titles) < 1000
    assert max(often.values()) <= MOST_OF_A_TITLE
    assert "" not in often
    assert not any("card" in name for name in titles if name.startswith("recreation/games"))
    assert list(titles) == sorted(titles)
    few = clip_art_titles(limit=2)
    assert max(Counter(name.split("/")[0] for name in few).values()) == 2
    assert few.items() <= titles.items()


def test_no_caption_of_a_test_picture_is_seen_in_training(pictures):
    seen = {words(pictures.captions[i]) for i in of_split(pictures, "train", "vendor")}
    for split in ("validation", "test"):
        unseen = {words(pictures.captions[i]) for i in of_split(pictures, split)}
        assert len(unseen) > 300
        assert not seen & unseen
    tried, tested = (
        {words(pictures.captions[i]) for i in of_split(pictures, s)} for s in SPLITS[1:3]
    )
    assert not tried & tested


def test_no_concept_and_no_drawing_is_on_two_sides(pictures):
    for things in (pictures.concepts, [p.numpy().tobytes() for p in pictures.pixels]):
        sides: dict = {}
        for thing, split in zip(things, pictures.splits, strict=True):
            sides.setdefault(thing, set()).add("train" if split == "vendor" else split)
        assert all(len(found) == 1 for found in sides.values())


def test_a_held_out_drawing_has_its_caption_in_training_by_the_other_vendor(pictures):
    seen = {(pictures.captions[i], pictures.sources[i]) for i in of_split(pictures, "train")}
    held_out = of_split(pictures, "vendor")
    count = Counter(pictures.sources[i] for i in held_out)
    assert set(count) == {"google", "twitter"}
    assert min(count.values()) > 70
    drawn = of_split(pictures, "train", "vendor")
    emoji = {pictures.concepts[i] for i in drawn if pictures.sources[i] in count}
    share = len({pictures.concepts[i] for i in held_out}) / len(emoji)
    assert share == pytest.approx(HELD_OUT_EMOJI, abs=0.04)
    for i in held_out:
        caption, vendor = pictures.captions[i], pictures.sources[i]
        (other,) = {"google", "twitter"} - {vendor}
        assert (caption, other) in seen
        assert (caption, vendor) not in seen


def test_sources_and_sides_are_as_large_as_they_are_said_to_be(pictures):
    assert len(pictures) == len(pictures.pixels) == len(pictures.alpha) == len(pictures.sources)
    by_source = Counter(pictures.sources)
    assert tuple(by_source) == SOURCES
    assert by_source["google"] == by_source["twitter"] == 1906
    vendors = [
        [c for c, s in zip(pictures.captions, pictures.sources, strict=True) if s == vendor]
        for vendor in ("google", "twitter")
    ]
    assert vendors[0] == vendors[1]
    assert 0.2 < len(pictures.indices("test")) / len(pictures) < 0.3
    assert all(pictures.captions)
    with pytest.raises(ValueError, match="unknown split 'x'; there are: train"):
        pictures.indices("x")


def test_where_nothing_is_drawn_the_picture_is_white(pictures):
    background = (pictures.alpha == 0)[:, None].expand_as(pictures.pixels)
    assert 0.1 < background.double().mean() < 0.9
    assert (pictures.pixels[background] == 255).all()
    drawn = (pictures.alpha == 255)[:, None].expand_as(pictures.pixels)
    assert (pictures.pixels[drawn] < 255).double().mean() > 0.5


def test_titles_are_read_from_the_heads_of_drawings(tmp_path):
    drawing = tmp_path / "cat.svg"
    drawing.write_text(
        "<svg><dc:title>Cat &amp; dog</dc:title><rdf:li>pet</rdf:li><rdf:li>a &lt;b</rdf:li></svg>"
    )
    assert _title(drawing) == ("Cat & dog", ["pet", "a <b"])
    assert _title(tmp_path / "dog.svg") == ("", [])


def test_titles_may_be_confirmed_by_folders_and_huge_pictures_are_left_out(tmp_path, monkeypatch):
    """A dog filed under "dogs" without keywords, a horse under no horse, one picture of nine million pixels."""
    monkeypatch.setattr(captions_module, "asset_path", lambda name: tmp_path / name)
    files = {
        "pets/dogs/rex": ("Dog", 8),
        "pets/wild/bay": ("Horse", 8),
        "pets/dogs/big": ("A dog", 3000),
    }
    for name, (title, side) in files.items():
        png = tmp_path / "clip_art" / CLIP_ART / "png" / f"{name}.png"
        svg = tmp_path / "clip_art_titles" / CLIP_ART / "svg" / f"{name}.svg"
        for path in (png, svg):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (side, side)).save(png)
        svg.write_text(f"<dc:title>{title}</dc:title>")
    assert clip_art_titles() == {"pets/dogs/rex": "Dog"}


def test_no_picture_is_blank(pictures):
    assert (pictures.pixels.flatten(1).float().std(1) > 1).all()


def test_a_small_run_takes_the_first_pictures_alone():
    few = captioned_pictures(size=16, limit=2)
    assert 60 < len(few) < 250
    assert set(few.splits) >= {"train", "test"}


def test_a_picture_is_padded_to_a_square_and_laid_on_white(tmp_path):
    drawn = np.zeros((10, 20, 4), np.uint8)
    drawn[:, :10] = (255, 0, 0, 255)  # the right half is transparent black
    Image.fromarray(drawn).save(tmp_path / "flag.png")
    found = torch.from_numpy(read_picture(tmp_path / "flag.png", 20))
    assert found.shape == (20, 20, 4)
    assert found[10, 4].tolist() == [255, 0, 0, 255]
    assert found[10, 15].tolist() == [255, 255, 255, 0]
    assert found[2, 4].tolist() == [255, 255, 255, 0]
