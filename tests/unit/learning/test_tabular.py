from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import BadInput
from fedcore.learning.data.tabular import Table, category, number, table

pd = pytest.importorskip("pandas")

READ = table(
    target="ill",
    columns={
        "age": number(0, 120),
        "smoker": category("never", "former", may_be_missing=True),
        "chol": number(50, 700, missing=(0,)),
        "sex": category("f", "m"),
    },
)
COLUMNS = (
    "age", "smoker=never", "smoker=former", "smoker=other", "smoker_missing",
    "chol", "chol_missing", "sex=f", "sex=m", "sex=other",
)  # fmt: skip
FRAME = pd.DataFrame(
    {
        "note": ["x", "y", "z"],
        "ill": [0, 1, 1],
        "sex": ["f", "m", "x"],
        "chol": [200.0, np.nan, 0.0],
        "smoker": ["never", None, "pipe"],
        "age": [40, 50, 60],
    }
)
SCALE = SimpleNamespace(mean=np.array([50.0, 200.0]), std=np.array([10.0, 50.0]))


def test_columns_follow_the_declaration():
    rows = READ(FRAME)
    assert READ.columns == rows.layout.columns == COLUMNS
    assert rows.layout.names == ("age", "chol") and rows.layout.ranges == ((0, 120), (50, 700))
    assert rows.labels().tolist() == [0, 1, 1]
    assert rows.unknown == {"smoker": 1, "sex": 1}
    assert rows.take(np.array([0, 1])).unknown == {}


def test_features_keep_gaps_and_standardise():
    rows = READ(FRAME)
    np.testing.assert_array_equal(rows.features, [[40, 200], [50, np.nan], [60, np.nan]])
    done = rows.standardise(SCALE)
    assert done.x.tolist() == [
        [-1, 1, 0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0, 1, 0, 1, 0],
        [1, 0, 0, 1, 0, 0, 1, 0, 0, 1],
    ]


def test_csv_parquet_dict_and_frame_agree(tmp_path):
    FRAME.to_csv(tmp_path / "a.csv", index=False)
    FRAME.to_parquet(tmp_path / "a.parquet")
    read = [
        READ(FRAME),
        READ(tmp_path / "a.csv"),
        READ(str(tmp_path / "a.parquet")),
        READ(FRAME.to_dict("list")),
        READ(FRAME.convert_dtypes()),
        READ(FRAME.astype({"sex": "category", "smoker": "category"})),
    ]
    for rows in read:
        np.testing.assert_array_equal(rows.features, read[0].features)
        np.testing.assert_array_equal(rows.fixed, read[0].fixed)
        assert rows.y.tolist() == [0, 1, 1] and rows.layout == read[0].layout


def test_raw_rows_without_the_target_column():
    bare = FRAME.drop(columns="ill")
    np.testing.assert_array_equal(
        READ.inputs(bare, SCALE), READ(FRAME).standardise(SCALE).x.numpy()
    )


def test_a_description_rebuilds_the_reader():
    for made in (
        READ,
        table(target="t", columns={"a": number(0, 1)}, above=3),
        table(target="t", columns={"a": category(1, 2.0, True)}, classes=("no", "yes")),
        table(target="t", columns={"a": number(-1, 1, may_be_missing=True)}, regression=True),
    ):
        assert Table.from_json(json.loads(json.dumps(made.to_json()))) == made
        assert Table.from_json(made.layout.description) == made


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2}', "[]", '{"schema": 1, "target": "a"}'])
def test_other_descriptions_are_refused(text):
    with pytest.raises(BadInput, match="table description"):
        Table.from_json(text)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 120), st.sampled_from(["never", "former", "pipe", ""]),
            st.one_of(st.none(), st.floats(1, 1e6)), st.sampled_from(["f", "m", "d"]),
        ),
        min_size=1, max_size=20,
    )
)  # fmt: skip
def test_every_row_has_one_category_and_no_gap_is_left(values):
    age, smoker, chol, sex = zip(*values, strict=True)
    rows = READ({"age": age, "smoker": smoker, "chol": chol, "sex": sex, "ill": [0] * len(age)})
    x = rows.standardise(SCALE).x.numpy()
    assert np.isfinite(x).all() and x.shape == (len(values), len(COLUMNS))
    assert (x[:, 1:5].sum(axis=1) == 1).all() and (x[:, 7:].sum(axis=1) == 1).all()
    assert (x[:, 6] == [value is None for value in chol]).all()
    assert (x[x[:, 6] == 1, 5] == 0).all()


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [
        ([True, False], ["true", "false"]),
        (["TRUE", "False "], ["true", "false"]),
        ([1, 2.0], ["1", "2"]),
        (["1", "2.0"], ["1", "2"]),
        (np.array([1.0, 2.0]), ["1", "2"]),
    ],
)
def test_one_spelling_per_value(given_values, expected):
    read = table(target="t", columns={"a": category(*expected)})
    assert read({"a": given_values, "t": [0, 0]}).fixed.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_a_declared_value_is_not_a_gap():
    read = table(target="t", columns={"a": category("none", "some")})
    assert read({"a": ["none", "some"], "t": [0, 0]}).unknown == {}


def test_booleans_are_numbers():
    read = table(target="t", columns={"a": number(0, 1, may_be_missing=True)})
    for values in ([True, False], ["TRUE", "false"], np.array([True, False])):
        assert read({"a": values, "t": [0, 0]}).features[:, 0].tolist() == [1, 0]
    assert np.isnan(read(pd.DataFrame({"a": [pd.NA, pd.NaT], "t": [0, 0]})).features).all()


# ----------------------------------------------------------------------------------- targets


def targets(values, **how):
    return table(target="t", columns={"a": number(0, 1)}, **how)(
        {"a": [0] * len(values), "t": values}
    ).y


def test_targets():
    assert targets(["0", "2"]).tolist() == [0, 2]
    assert targets([0, 2, -1], above=0).tolist() == [0, 1, 0]
    assert targets(["ill", "well"], classes=("well", "ill")).tolist() == [1, 0]
    assert targets([True, False], classes=(False, True)).tolist() == [1, 0]
    assert str(targets(["1.5"], regression=True).dtype) == "torch.float32"


@pytest.mark.parametrize(
    ("values", "how", "says", "hint"),
    [
        ([0, 1.5], {}, "row 2: found 1.5, expected a class", "above="),
        ([0, -1], {}, "row 2: found -1", "classes="),
        ([0, None], {}, "row 2: found a missing value", "observed"),
        (["a"], {}, "found 'a', expected a number", "category"),
        (["a"], {"classes": ("b", "c")}, "found 'a', expected one of b, c", "classes="),
        ([np.inf], {"regression": True}, "infinite", ""),
    ],
)
def test_bad_targets(values, how, says, hint):
    with pytest.raises(BadInput) as caught:
        targets(values, **how)
    assert says in str(caught.value) and hint in caught.value.remedy


# ------------------------------------------------------------------------------------ refusals


def read_csv(tmp_path, text, **columns):
    (tmp_path / "va.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    read = table(target="t", columns=columns or {"a": number(0, 10)})
    return read(tmp_path / "va.csv")


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("a,t\n1,0\nx,0\n", "va.csv: column 'a', row 2: found 'x', expected a number", "category"),
        ('a,t\n"1,5",0\n', "found '1,5'", "point"),
        ("a,t\n1_0,0\n", "found '1_0'", ""),
        ("a,t\n,0\n", "column 'a', row 1: found a missing value (1 in all)", "may_be_missing=True"),
        ("a,t\ninf,0\n", "infinite", ""),
        ("b,t\n1,0\n", "found no column 'a'", "b, t"),
        ("a;t\n1;0\n", "found no column 'a', 't'", "commas"),
        ("a,a,t\n1,1,0\n", "two columns called 'a'", ""),
        ("a,t\n1,0,3\n", "row 1: found 3 fields, expected 2", "quotes"),
        ("", "empty file", ""),
        (b"a,t\n\xff,0\n", "not UTF-8", "UTF-8"),
        ("a,t\n" + "9" * 60 + "x,0\n", "...", ""),
    ],
)
def test_bad_csv(tmp_path, text, says, hint):
    with pytest.raises(BadInput) as caught:
        read_csv(tmp_path, text)
    assert str(caught.value).startswith("va.csv") and says in str(caught.value)
    assert hint in caught.value.remedy and "\n" not in str(caught.value)


def test_unobserved_category_that_was_not_declared_so(tmp_path):
    with pytest.raises(BadInput, match="row 2: found a missing value"):
        read_csv(tmp_path, "a,t\nx,0\nNA,0\n", a=category("x"))


def test_a_byte_order_mark_and_blank_lines_are_harmless(tmp_path):
    assert len(read_csv(tmp_path, b"\xef\xbb\xbfa,t\n1,0\n\n2,1\n")) == 2


def test_header_without_rows_is_an_empty_table(tmp_path):
    assert len(read_csv(tmp_path, "a,t\n")) == 0


@pytest.mark.parametrize("source", ["no.csv", "no.parquet", "table.xlsx", 3, None])
def test_bad_sources(source):
    with pytest.raises(BadInput, match="table"):
        READ(source)


def test_broken_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(BadInput, match=r"a\.parquet"):
        READ(tmp_path / "a.parquet")


def test_columns_of_different_lengths():
    with pytest.raises(BadInput, match="different lengths"):
        table(target="t", columns={"a": number(0, 1)})({"a": [1], "t": [0, 1]})


@pytest.mark.parametrize(
    "build",
    [
        number,
        lambda: number(may_be_missing=True),
        lambda: number(1, 1),
        lambda: number(0, np.inf),
        lambda: number("a", 2),
        category,
        lambda: category("a", "a"),
        lambda: category(1, "1.0"),
        lambda: table(target="t", columns={}),
        lambda: table(target="t", columns=["a"]),
        lambda: table(target="t", columns={"a": (0, 1)}),
        lambda: table(target="a", columns={"a": number(0, 1)}),
        lambda: table(target="t", columns={"a": number(0, 1)}, above=0, regression=True),
        lambda: table(
            target="t", columns={"a": number(0, 1, missing=(0,)), "a_missing": number(0, 1)}
        ),
    ],
)
def test_bad_declarations(build):
    with pytest.raises(BadInput):
        build()
