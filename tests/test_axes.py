"""The arrow grammar: what is printed parses back, shapes split and join, sizes solve, and bad strings say why."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlt_cli.axes import Arrow, LayoutError, bindings, dim_size, join, parse, shape, solve, split
from tlt_cli.families.table import known_families, load_family

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,5}", fullmatch=True)
DIMS = st.one_of(
    NAMES.map(lambda name: (name,)),
    st.lists(st.one_of(NAMES, st.integers(1, 9)), min_size=1, max_size=4)
    .filter(lambda dim: len({f for f in dim if isinstance(f, str)}) == sum(isinstance(f, str) for f in dim))
    .map(tuple),
)
SIDES = st.lists(DIMS, min_size=1, max_size=3).map(tuple)
ARROWS = st.one_of(
    SIDES.map(lambda side: Arrow(side, "", len(side))),
    st.tuples(SIDES, st.sampled_from(["<-", "->"]), SIDES).map(lambda t: Arrow(t[0] + t[2], t[1], len(t[0]))),
)
CARRIED = [(family, pattern) for family in known_families() for pattern in load_family(family).rows]


@given(ARROWS)
def test_what_is_printed_parses_back(arrow: Arrow) -> None:
    assert parse(str(arrow)) == arrow
    assert sorted([*arrow.outputs, *arrow.inputs]) == list(range(len(arrow.dims)))


@given(ARROWS, st.data())
def test_spaces_are_free(arrow: Arrow, data: st.DataObject) -> None:
    words = str(arrow).replace("(", " ( ").replace(")", " ) ").split()
    spaces = st.sampled_from([" ", "  ", "\t", "\n "])
    assert parse("".join(word + data.draw(spaces) for word in words)) == arrow


@given(ARROWS, st.data())
def test_split_and_join(arrow: Arrow, data: st.DataObject) -> None:
    sizes = {axis: data.draw(st.integers(1, 9)) for axis in sorted(arrow.axes)}
    factors = split(arrow, sizes)
    assert join(arrow, factors) == shape(arrow, sizes) == tuple(dim_size(dim, sizes) for dim in arrow.dims)
    assert math.prod(factors) == math.prod(shape(arrow, sizes))
    with pytest.raises(LayoutError, match=f"has {len(factors)} factors, but {len(factors) + 1} sizes"):
        join(arrow, [*factors, 2])


@given(ARROWS, st.data())
def test_solve_finds_each_lone_unknown(arrow: Arrow, data: st.DataObject) -> None:
    """Whatever one axis is unknown, the stored shape tells it; a shape that no size gives is refused."""
    sizes = {axis: data.draw(st.integers(1, 9)) for axis in sorted(arrow.axes)}
    stored = shape(arrow, sizes)
    assert solve(arrow, stored, sizes) == {}
    for unknown, size in sizes.items():
        known = {axis: other for axis, other in sizes.items() if axis != unknown}
        assert solve(arrow, stored, known) == {unknown: size}
    place = data.draw(st.integers(0, len(stored) - 1))
    wrong = [size + (index == place) for index, size in enumerate(stored)]
    with pytest.raises(LayoutError, match="does not fit"):
        solve(arrow, wrong, sizes)


@pytest.mark.parametrize(("family", "pattern"), CARRIED)
def test_every_row_of_every_table(family: str, pattern: str) -> None:
    table = load_family(family)
    arrow = table.rows[pattern]
    assert parse(str(arrow)) == arrow
    assert f'"{arrow}"' in table.text, "rows are written as they are printed"
    sizes = dict(zip(table.axes, (2, 3, 5, 7, 11, 13, 17, 19), strict=False))
    assert join(arrow, split(arrow, sizes)) == shape(arrow, sizes)


def test_layouts_of_the_field() -> None:
    """A Linear, its transpose, fused projections in both orders, a vector, a convolution."""
    sizes = {"kv": 4, "group": 2, "rotary": 8, "hidden": 128, "channel": 16, "head": 8, "out": 6, "in": 3}
    query = parse("(kv group 2 rotary) <- hidden")
    assert (query.sign, list(query.outputs), list(query.inputs)) == ("<-", [0], [1])
    assert shape(query, sizes) == (128, 128) and split(query, sizes) == (4, 2, 2, 8, 128)
    fused = parse("hidden -> (3 kv channel)")
    assert (fused.sign, list(fused.outputs), list(fused.inputs)) == ("->", [1], [0])
    assert shape(fused, sizes) == (128, 192) and split(fused, sizes) == (128, 3, 4, 16)
    woven = parse("(head 3 channel) <- hidden")
    assert shape(woven, sizes) == (384, 128) and split(woven, sizes) == (8, 3, 16, 128)
    vector = parse("(2 rotary)")
    assert (vector.sign, list(vector.outputs), list(vector.inputs)) == ("", [0], [])
    assert shape(vector, sizes) == (16,) and vector.axes == {"rotary"}
    convolution = parse("out <- in (3) (3)")
    assert shape(convolution, sizes) == (6, 3, 3, 3) and list(convolution.inputs) == [1, 2, 3]
    assert parse("(kv)") == parse("kv") and str(parse(" a<-( b 2 ) ")) == "a <- (b 2)"
    assert parse("a <- b") != parse("b -> a"), "the same matrix, stored otherwise"


BAD = {
    "": "empty layout",
    "   ": "empty layout",
    "<-": "nothing left of its arrow",
    "<- hidden": "nothing left of its arrow",
    "hidden <-": "nothing right of its arrow",
    "hidden -> ": "nothing right of its arrow",
    "a <- b <- c": "has 2 arrows",
    "a -> b <- c": "has 2 arrows",
    "a <- -> b": "has 2 arrows",
    "a <-> b": "has the character '>'",
    "a - b": "has the character '-'",
    "a < b": "has the character '<'",
    "a => b": "has the character '='",
    "a, b": "has the character ','",
    "[a b]": "has the character '['",
    "kv-heads": "has the character '-'",
    "a * b": "has the character '*'",
    "(a + b) <- c": "has the character '+'",
    "größe": "has the character 'ö'",
    "(² a)": "has the character '²'",
    "(٣ a)": "has the character '٣'",
    "a\x00b": r"has the character '\x00'",
    "...": "has the character '.'",
    "(a": "opens a bracket that is not closed",
    "(a <- b)": "opens a bracket that is not closed",
    "a)": "closes a bracket that was not opened",
    "a <- b)": "closes a bracket that was not opened",
    "((a b) c)": "brackets inside brackets; products are one level deep",
    "(a (b))": "brackets inside brackets",
    "()": "has an empty bracket",
    "a <- ()": "has an empty bracket",
    "3": "has the bare number 3; numbers stand in brackets",
    "3 <- hidden": "has the bare number 3",
    "2x": "has the bare number 2",
    "(0 a)": "has the factor 0; factors are at least 1",
    f"({'9' * 5000} a)": "below a billion",
    "(a b a)": "has the axis a twice in one dim",
    "hidden <- (kv kv)": "has the axis kv twice in one dim",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_strings_say_what_is_wrong(text: str) -> None:
    with pytest.raises(LayoutError) as caught:
        parse(text)
    message = str(caught.value)
    assert BAD[text] in message and "\n" not in message
    assert not text.strip() or repr(text) in message, "the layout is quoted"


@given(st.text(alphabet="ab2() <->+²\n"))
def test_no_string_does_anything_else(text: str) -> None:
    try:
        arrow = parse(text)
    except LayoutError as error:
        assert "\n" not in str(error)
    else:
        assert parse(str(arrow)) == arrow


@pytest.mark.parametrize(
    ("stored", "known", "message"),
    [
        ((64,), {}, r"has 2 dims, but the shape \[64\] has 1"),
        ((64, 128, 1), {}, "has 2 dims, but the shape"),
        ((63, 128), {"kv": 4}, r"\(kv 2 rotary\) of .* is stored as 63, which does not fit kv=4"),
        ((0, 128), {"kv": 4}, "is stored as 0"),
        ((64, 128), {"kv": 0}, "is stored as 64, which does not fit kv=0"),
        ((64, 128), {"kv": 4, "rotary": 4}, "is stored as 64, which does not fit kv=4, rotary=4"),
        ((64, 128), {"hidden": 64}, "hidden of .* is stored as 128, which does not fit hidden=64"),
    ],
)
def test_shapes_that_no_size_gives(stored: tuple[int, ...], known: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        solve(parse("(kv 2 rotary) <- hidden"), stored, known)


def test_two_unknowns_are_left_open() -> None:
    assert solve(parse("(kv 2 rotary) <- hidden"), (64, 128), {}) == {"hidden": 128}
    with pytest.raises(LayoutError, match=r"no size is known for the axis kv .known: hidden=128"):
        shape(parse("(kv 2 rotary) <- hidden"), {"hidden": 128})
    assert bindings({}) == "nothing"


def test_one_axis_in_two_dims_must_agree() -> None:
    assert solve(parse("hidden <- hidden"), (8, 8), {}) == {"hidden": 8}
    with pytest.raises(LayoutError, match=r"hidden of .* is stored as 9, which does not fit hidden=8"):
        solve(parse("hidden <- hidden"), (8, 9), {})
